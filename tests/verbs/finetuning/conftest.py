"""A run to train on, and one that was trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_finetunes import SMALL

from cloq_export.recipe import FineTuneRecipe, Recipe
from cloq_export.verbs.finetune import finetune
from cloq_export.verbs.run import run as make_run

RecipeFor = Callable[..., Recipe]
Contents = Callable[[Path], dict[str, str]]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, recipe_for: RecipeFor, silent: Console) -> Path:
    """Return a finished 2-bit run; it must only be read."""
    out = tmp_path_factory.mktemp("made") / "run"
    make_run(recipe_for("llama", bits=2, adapter_dtype="float32"), out, console=silent)
    return out


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def options(texts: dict[str, str]) -> Callable[..., FineTuneRecipe]:
    def recipe(**changes: Any) -> FineTuneRecipe:
        return FineTuneRecipe.from_mapping(SMALL | {"data": texts["calibration"]} | changes)

    return recipe


Trained = tuple[Path, dict[str, str], dict[str, Any]]


@pytest.fixture(scope="session")
def trained(
    made: Path, tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str], silent: Console, contents: Contents
) -> Trained:
    """Return a run with a trained adapter, what was in it before, and the summary; it must only be read."""
    out = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(made, out)
    before = contents(out)
    recipe = FineTuneRecipe.from_mapping(SMALL | {"data": texts["calibration"]})
    return out, before, finetune(out, recipe, console=silent)
