"""A disk that is full or cannot be written loses nothing that was done."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from run_modes import modes

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.errors import FormatError, RunDirectoryError
from cloq_export.files import atomic, tensor_writer
from cloq_export.recipe import Recipe
from cloq_export.verbs.evaluate import evaluate
from cloq_export.verbs.export import export as write_export
from cloq_export.verbs.options import EvaluateOptions, ExportOptions
from cloq_export.verbs.run import run as make_run

RecipeFor = Callable[..., Recipe]
Contents = Callable[[Path], dict[str, str]]


@pytest.fixture
def full_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function to a context in which the disk has so many bytes left."""

    def context(space: int, code: int = errno.ENOSPC) -> Any:
        patch = pytest.MonkeyPatch.context()
        left = space

        class Limited:
            def __enter__(self) -> None:
                entered = patch.__enter__()
                write = os.write

                def write_all(descriptor: int, view: memoryview) -> None:
                    nonlocal left
                    taken = min(left, len(view))
                    left -= taken
                    write(descriptor, view[:taken])
                    if taken < len(view):
                        raise OSError(code, os.strerror(code))

                for module in (atomic, tensor_writer):
                    entered.setattr(module, "write_all", write_all)

            def __exit__(self, *details: Any) -> None:
                patch.__exit__(*details)

        return Limited()

    return context


@modes
def test_a_full_disk_keeps_what_was_done(
    mode: dict[str, float],
    tmp_path: Path,
    recipe_for: RecipeFor,
    silent: Console,
    contents: Contents,
    uninterrupted: Any,
    full_at: Callable[..., Any],
) -> None:
    recipe, out = recipe_for("llama", bits=3, **mode), tmp_path / "run"
    done = -1
    # Each try has a little more space than the last: it fails in the first file, in layers, adapter and checkpoint.
    for space in (100, 30_000, 60_000, 40_000, 20_000, 30_000, 45_000):
        with full_at(space), pytest.raises(RunDirectoryError, match="the disk is full while writing") as error:
            make_run(recipe, out, console=silent)
        assert "free some space and run the same command again" in str(error.value)
        assert not [name for name in contents(out) if name.endswith(".partial")] if out.exists() else True
        completed = len(RunDirectory.open(out).completed_modules()) if RunDirectory.is_run(out) else 0
        assert completed > done or completed == 14
        done = completed
        if completed:
            assert RunDirectory.open(out).state == "running"
    assert done == 14
    make_run(recipe, out, console=silent)
    assert contents(out) == contents(uninterrupted("llama", mode))


def test_a_disk_that_fills_up_while_the_tokenizer_is_copied(
    tmp_path: Path, recipe_for: RecipeFor, silent: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = recipe_for("llama"), tmp_path / "run"

    def fail(source: Any, target: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", fail)
        with pytest.raises(RunDirectoryError, match=r"the disk is full while writing .*checkpoint"):
            make_run(recipe, out, console=silent)
    assert not (out / "checkpoint").exists()
    with pytest.raises(FormatError, match="is a run without a checkpoint yet; write it with: cloq export"):
        evaluate(out, EvaluateOptions(recipe.eval_text, 16, 1), console=silent)
    made = write_export(out, ExportOptions(), console=silent)
    assert (out / "checkpoint" / "tokenizer.json").exists()
    assert (made.folder / "tokenizer.json").exists()


def test_a_disk_that_cannot_be_written(
    tmp_path: Path, recipe_for: RecipeFor, silent: Console, full_at: Callable[..., Any]
) -> None:
    with full_at(50_000, errno.EROFS), pytest.raises(RunDirectoryError, match="cannot be written: Read-only file sys"):
        make_run(recipe_for("llama"), tmp_path / "run", console=silent)
    assert RunDirectory.open(tmp_path / "run").completed_modules()
