"""The GPU benchmarks run from end to end at toy sizes on the CPU: a GPU's time is not spent on finding faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cloq_export.kernels import dispatch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not dispatch.has_triton(), reason="Triton exists for Linux only")
def test_one_command_runs_every_benchmark_and_names_the_hardware(tmp_path):
    result = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_all.py"), "--smoke", "--json", str(result)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads(result.read_text())
    assert report["device"]["kind"] == "cpu"
    parts = {name: part["result"] for name, part in report["parts"].items()}
    assert {row["preset"] for row in parts["initialisation"]["rows"]} == {"paper", "default"}
    for row in parts["initialisation"]["rows"]:
        assert (row["blocks"], row["projected"]) == (2, False)
        assert row["floor_seconds"]["solve"] > 0
    assert {row["base"] for row in parts["training"]["rows"]} == {"float", "packed", "nf4"}
    kernels = [row["kernel"] for row in parts["kernels"]["rows"]]
    assert [name.split()[0] for name in kernels] == [
        *("linear", "linear", "dequantize", "gram", "grid", "proximal", "column")
    ]
    assert all(row["seconds"] > 0 for row in parts["kernels"]["rows"])


def test_without_a_gpu_nothing_is_measured(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_all.py"), "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "torch sees no GPU; nothing was measured" in done.stderr
    assert not (tmp_path / "gpu.json").exists()
