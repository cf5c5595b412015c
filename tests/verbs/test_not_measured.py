"""A run that is asked not to measure makes the same files, needs no text for it, and is measured by a later call."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.cli import main
from cloq_export.recipe import Recipe
from cloq_export.verbs.recording import CODES_ALONE, run_record
from cloq_export.verbs.run import run


def test_it_is_left_out_and_made_up_for(
    recipe_for: Callable[..., Recipe], contents: Callable[[Path], dict[str, str]], tmp_path: Path, silent: Console
) -> None:
    out = tmp_path / "run"
    summary = run(recipe_for(measure=False, eval_text="absent.txt"), out, console=silent)
    assert summary.perplexity is None
    assert any("cloq eval" in command for command in summary.next)
    directory = RunDirectory.open(out)
    assert directory.state == "done"
    assert "evaluation" not in directory.reports()
    record = run_record(directory)
    assert record is not None
    assert record.quality is None
    assert set(record.probes) == {CODES_ALONE, "cloq"}

    made = contents(out / "checkpoint"), contents(out / "adapters")
    measured = run(recipe_for(), out, console=silent)
    assert (contents(out / "checkpoint"), contents(out / "adapters")) == made
    assert measured.perplexity is not None
    again = run_record(RunDirectory.open(out))
    assert again is not None
    assert again.quality is not None
    assert again.probes == record.probes


def test_what_is_not_measured_cannot_be_gated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments: Any = ["run", "m", "--out", str(tmp_path / "o"), "--no-measure", "--gate", "ratio=2"]
    assert main(arguments) == 2
    assert "--gate judges what is measured; leave --no-measure out" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_the_printed_result_says_null(recipe_for: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_for(measure=False)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_mapping()))
    assert main(["run", "--recipe", str(tmp_path / "recipe.json"), "--out", str(tmp_path / "o"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] is None
