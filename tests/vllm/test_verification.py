"""`cloq verify` through vLLM: over HTTP on a tiny model with both adapters, and in the engine on a real one."""

from __future__ import annotations

import importlib
import pathlib
import random
from collections.abc import Callable
from typing import Any

import pytest

from cloq_export.models.source import DEMO_MODEL
from cloq_export.parity.gate import GATES
from cloq_export.recipe import DEMO, Recipe
from cloq_export.verbs.run import run as make_run
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verify import verify

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("only_on_cpu")]


def test_over_http(
    export: Any, write_float_model: Callable[[pathlib.Path], pathlib.Path], engine_python: str, tmp_path: pathlib.Path
) -> None:
    draw = random.Random(0)
    words = " ".join(f"w{draw.randrange(93)}" for _ in range(200))
    (tmp_path / "text.txt").write_text(words, encoding="utf-8")
    # These exports were never certified.
    (tmp_path / "gate.yaml").write_text("certificate: null\n", encoding="utf-8")
    options = VerifyOptions(
        reference=str(write_float_model(tmp_path / "float")),
        runtime="vllm-server",
        gate=tmp_path / "gate.yaml",
        text=str(tmp_path / "text.txt"),
        window=32,
        windows=4,
        prompts=8,
        new_tokens=8,
        python=pathlib.Path(engine_python),
        out=tmp_path / "parity",
    )
    report = verify(export.folder, options)
    assert report.passed, (report.gates, report.missing)
    assert report.missing == ()
    assert {row.adapter for row in report.numerics if row.measured == "served"} == {"one", "two", None}
    assert report.isolation.max <= 1e-4
    assert report.metrics["live_modules"] == 1
    assert (tmp_path / "parity" / "parity.html").is_file()


def test_a_real_model(engine_python: str, tmp_path: pathlib.Path) -> None:
    """The short form of benchmarks/served_parity.py: SmolLM2-135M-Instruct, quickly rounded to 3 bits."""
    parity = importlib.import_module("served_parity")
    texts = {"calibration": "embedded", "eval_text": "embedded", "eval_window": 64, "eval_windows": 1}
    quick = {"bits": 3, "method": "rtn", "rank": 8, "samples": 2, "seqlen": 128}
    make_run(Recipe.from_mapping({**DEMO, **texts, **quick}), tmp_path / "run", demo=True)
    row = parity.measure(
        tmp_path / "run",
        DEMO_MODEL,
        "float32",
        python=pathlib.Path(engine_python),
        text="embedded",
        window=128,
        windows=2,
        prompts=12,
        new_tokens=12,
        liveness_tokens=24,
    )
    assert row["passed"], (row["gates"], row["missing"])
    assert row["adapters"] == ["cloq", "noisy1"]
    assert row["metrics"]["greedy_flips"] == 0
    assert row["metrics"]["mixed_batch_difference_max"] <= 1e-4
    assert row["metrics"]["live_modules"] == 1
    assert set(row["metrics"]) >= set(GATES) - {name for name in GATES if name.startswith("gsm8k")}
    assert "passed" in parity.line_of(row)
