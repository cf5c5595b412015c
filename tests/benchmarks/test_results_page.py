"""docs/results.md says what the committed result files say."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_the_page_is_what_the_files_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    results = importlib.import_module("render_results")
    assert results.PAGE.read_text(encoding="utf-8") == results.render(), (
        "docs/results.md is out of date; run python benchmarks/render_results.py"
    )
    files = {path.name for path in results.RESULTS.glob("*.json")}
    elsewhere = {
        "init_quality.json",
        "init_quality_tried.json",
        "init_speed.json",
        "kernels_cpu.json",
        "packing_speed.json",
    }
    assert files <= set(results.PARTS) | elsewhere, "a result file that no page shows"
