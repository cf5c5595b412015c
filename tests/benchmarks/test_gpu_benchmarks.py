"""The GPU benchmarks run from end to end at toy sizes on the CPU: a GPU's time is not spent on finding faults."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_device import pretended_gpus

from cloq_export import kernels
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
        *("gram", "grid", "proximal", "column", "linear", "linear", "dequantize")
    ]
    decoded = parts["decoding"]["rows"]
    assert [(row["adapters"], row["texts"]) for row in decoded] == [(0, 1), (0, 8), (1, 1), (1, 8), (8, 8)]
    assert all(row["seconds"] > 0 for row in parts["kernels"]["rows"])


def test_without_a_gpu_nothing_is_measured(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_all.py"), "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(r"torch sees no GPU \(.+\); nothing was measured", done.stderr)
    assert not (tmp_path / "gpu.json").exists()


@pytest.fixture
def gpu_all(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_all")


def test_what_is_wrong_with_a_machine_is_said_and_what_it_cannot_run_is_left_out(
    gpu_all: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ran = []

    def run_part(arguments: list[str], seconds: float, result: Path) -> dict[str, Any]:
        ran.append(arguments)
        return {"ended": "exit code 0"}

    monkeypatch.setattr(gpu_all, "run_part", run_part)
    monkeypatch.setattr(gpu_all, "missing_packages", lambda: ["peft"])
    monkeypatch.setattr(gpu_all, "sanitizer", lambda *_: {})
    monkeypatch.setattr(sys, "argv", ["gpu_all.py", "--json", str(tmp_path / "gpu.json")])
    with pretended_gpus(total=16 << 30, capability=(7, 5)), pytest.raises(SystemExit, match="failed: kernels"):
        gpu_all.main()
    said = capsys.readouterr().out
    for fault in ("compute capability 7.5 is below 8.0", "17 GB of the GPU are free", "peft is not installed"):
        assert fault in said.partition("==")[0]
    report = json.loads((tmp_path / "gpu.json").read_text())
    left_out = {name for name, part in report["parts"].items() if part["ended"].startswith("not run: ")}
    assert left_out == {
        *("kernels", "training", "decoding", "initialisation 7b", "initialisation 7b in 8 GB"),
    }
    assert len(ran) == len(report["parts"]) - 5


def test_a_first_kernel_is_tried_and_its_fault_is_one_line(gpu_all: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpus():
        assert gpu_all.launches() == ""

        def failing(*_: Any) -> None:
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with")

        monkeypatch.setattr(kernels, "packed_linear", failing)
        assert gpu_all.launches() == (
            "a first kernel does not run: CUDA error: no kernel image is available for execution on the device"
        )
        monkeypatch.setattr(kernels, "packed_linear", lambda x, *_: torch.zeros(1, 64, device=x.device))
        assert gpu_all.launches() == "a first kernel computes wrong numbers"


def test_a_machine_without_a_compiler_measures_nothing(gpu_all: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_all, "has_triton", lambda: True)
    monkeypatch.setattr(gpu_all.shutil, "which", lambda name: None)
    with pretended_gpus(capability=(9, 0)) as gpus:
        held = torch.empty(3 << 30, dtype=torch.uint8, device="meta")
        gpus.in_use[0] += held.numel()
        faults = gpu_all.machine_faults(torch.device("cuda", 0))
    assert [part for fault, part in faults.items() if "no C compiler is on the PATH" in fault] == ["all"]
    assert [part for fault, part in faults.items() if "taken by another program" in fault] == [""]


def test_a_part_that_is_cut_off_counts_as_far_as_it_came(gpu_all: Any, tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        "import pathlib, sys, time\n"
        "pathlib.Path(sys.argv[2]).write_text('{\"rows\": [1]}')\n"
        "print('one row', flush=True)\n"
        "time.sleep(60)\n"
    )
    found = gpu_all.run_part([str(script)], 2.0, tmp_path / "rows.json")
    assert found["ended"] == "stopped after 2 s"
    assert found["result"] == {"rows": [1]}
    assert "one row" in found["output"]
