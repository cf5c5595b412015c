"""Runs of tiny models, in several batches as real ones, and runs that nothing disturbed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.recipe import Recipe
from cloq_export.verbs.run import run as make_run
from cloq_export.verbs.summary import RunSummary

RecipeFor = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def _several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut four windows of 32 tokens into two batches, as real calibration sets are."""
    monkeypatch.setattr("cloq_export.compress.strategies.TOKENS_PER_BATCH", 64)


@pytest.fixture
def run_recipe(tmp_path: Path, silent: Console) -> Callable[..., tuple[RunDirectory, RunSummary]]:
    def run(recipe: Recipe, name: str = "run") -> tuple[RunDirectory, RunSummary]:
        summary = make_run(recipe, tmp_path / name, console=silent)
        return RunDirectory.open(tmp_path / name), summary

    return run


@pytest.fixture(scope="session")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, recipe_for: RecipeFor, silent: Console
) -> Callable[[str, dict[str, float]], Path]:
    """Return a function to the directory of a run that nothing disturbed; it must only be read."""
    made: dict[tuple[Any, ...], Path] = {}

    def run(family: str, mode: dict[str, float]) -> Path:
        key = (family, *mode.values())
        if key not in made:
            made[key] = tmp_path_factory.mktemp("uninterrupted") / "run"
            make_run(recipe_for(family, bits=3, **mode), made[key], console=silent)
        return made[key]

    return run
