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
    drawn = {name: svg for path in results.RESULTS.glob("*.json") for name, svg in results.plots(path).items()}
    assert {path.name: path.read_text(encoding="utf-8") for path in results.PLOTS.iterdir()} == drawn
    files = {path.name for path in results.RESULTS.glob("*.json")}
    elsewhere = {
        "init_quality.json",
        "init_quality_low_rank.json",
        "init_quality_tried.json",
        "init_speed.json",
        "kernels_cpu.json",
        "packing_speed.json",
    }
    assert files <= set(results.PARTS) | elsewhere, "a result file that no page shows"
