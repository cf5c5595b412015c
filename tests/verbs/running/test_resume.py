"""The same command ends with the same bytes, and what may not be continued is refused."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from run_modes import ERROR_AWARE, INDEPENDENT, modes

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.errors import RunDirectoryError
from cloq_export.files import tensor_writer
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.recipe import Recipe
from cloq_export.verbs.adapt import adapt
from cloq_export.verbs.export import export as write_export
from cloq_export.verbs.options import ExportOptions
from cloq_export.verbs.run import run as make_run

RecipeFor = Callable[..., Recipe]
Contents = Callable[[Path], dict[str, str]]


@modes
def test_two_runs_write_the_same_bytes(
    mode: dict[str, float],
    tmp_path: Path,
    recipe_for: RecipeFor,
    silent: Console,
    contents: Contents,
    uninterrupted: Any,
) -> None:
    make_run(recipe_for("llama", bits=3, **mode), tmp_path / "somewhere" / "else", console=silent)
    expected = contents(uninterrupted("llama", mode))
    assert contents(tmp_path / "somewhere" / "else") == expected
    assert len(expected) > 20
    assert not [name for name in expected if name.endswith(".partial")]
    # Running it once more measures again and changes nothing.
    make_run(recipe_for("llama", bits=3, **mode), tmp_path / "somewhere" / "else", console=silent)
    assert contents(tmp_path / "somewhere" / "else") == expected


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("llama", ERROR_AWARE),
        ("plain-experts", INDEPENDENT),
        ("mixtral", ERROR_AWARE),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("llama", INDEPENDENT), ("plain-experts", ERROR_AWARE), ("mixtral", INDEPENDENT))
        ),
    ],
)
def test_whatever_is_missing_is_made_again(
    mode: dict[str, float],
    family: str,
    tmp_path: Path,
    recipe_for: RecipeFor,
    silent: Console,
    contents: Contents,
    uninterrupted: Any,
) -> None:
    """Any subset of layers, whole groups and single members of one, and the parts made from them."""
    whole = uninterrupted(family, mode)
    expected = contents(whole)
    shutil.copytree(whole, tmp_path / "run")
    layers = sorted((tmp_path / "run" / "layers").iterdir())
    drawn = random.Random(0)
    for count in (1, 3, len(layers) // 2):
        for path in drawn.sample(layers, count):
            path.unlink()
        if count == 3:
            damaged = next(path for path in layers if path.exists())
            damaged.write_bytes(damaged.read_bytes()[:-7])
            shutil.rmtree(tmp_path / "run" / "checkpoint")
        make_run(recipe_for(family, bits=3, **mode), tmp_path / "run", console=silent)
        assert contents(tmp_path / "run") == expected


def test_another_recipe_is_refused_and_the_difference_said(
    tmp_path: Path, recipe_for: RecipeFor, silent: Console, contents: Contents, uninterrupted: Any
) -> None:
    shutil.copytree(uninterrupted("llama", INDEPENDENT), tmp_path / "run")
    before = contents(tmp_path / "run")
    refused = [
        ({"bits": 2}, r"holds another run: bits: 3 in the run, 2 asked\. Use the run's own options"),
        ({"rank": 8, "seed": 5}, r"rank: 4 in the run, 8 asked; seed: 0 in the run, 5 asked"),
        ({"error_aware": 0.25}, r"error_aware: 0\.0 in the run, 0\.25 asked"),
        ({"overrides": {"*.q_proj": {"bits": 8}}}, r"overrides: \[\] in the run, \[\{.*q_proj.*\}\] asked"),
    ]
    for changes, message in refused:
        with pytest.raises(RunDirectoryError, match=message):
            make_run(recipe_for("llama", **{"bits": 3, **INDEPENDENT, **changes}), tmp_path / "run", console=silent)
    assert contents(tmp_path / "run") == before
    # What only says how it is measured or cut into files may change.
    make_run(
        recipe_for("llama", bits=3, eval_windows=2, max_shard_size="20KB", **INDEPENDENT),
        tmp_path / "run",
        console=silent,
    )
    assert RunDirectory.open(tmp_path / "run").read_report("evaluation")["windows"] == 2
    assert len(list((tmp_path / "run" / "checkpoint").glob("model-*.safetensors"))) > 2


def test_another_source_or_text_under_the_same_name_is_refused(
    tmp_path: Path, recipe_for: RecipeFor, silent: Console, contents: Contents
) -> None:
    shutil.copytree(recipe_for("llama").model, tmp_path / "model")
    shutil.copy(recipe_for("llama").calibration, tmp_path / "text.txt")
    recipe = recipe_for("llama", model=str(tmp_path / "model"), calibration=str(tmp_path / "text.txt"))
    make_run(recipe, tmp_path / "run", console=silent)
    before = contents(tmp_path / "run")
    text = (tmp_path / "text.txt").read_text()
    (tmp_path / "text.txt").write_text(text.replace("w1 ", "w2 "))
    message = (
        r"calibrated on another text: .*text\.txt \(sha256 \w{12}…\) in the run, .*text\.txt \(sha256 \w{12}…\) now"
    )
    with pytest.raises(RunDirectoryError, match=message):
        make_run(recipe, tmp_path / "run", console=silent)
    with pytest.raises(RunDirectoryError, match=message):
        adapt(tmp_path / "run", {"rank": 2, "adapter_name": "second"}, console=silent)
    (tmp_path / "text.txt").write_text(text)

    weights = tmp_path / "model" / "model.safetensors"
    tensors, metadata = read_safetensors(weights)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.01
    tensor_writer.write_safetensors(weights, tensors, metadata)
    with pytest.raises(RunDirectoryError, match=r"source model: sha256:\w{12}… in the run, sha256:\w{12}… asked"):
        make_run(recipe, tmp_path / "run", console=silent)
    with pytest.raises(RunDirectoryError, match=r"model has changed since .* was made"):
        adapt(tmp_path / "run", {"rank": 2, "adapter_name": "second"}, console=silent)
    # An export takes everything from the run; only a checkpoint that is lost has to be made from the source again.
    write_export(tmp_path / "run", ExportOptions(out=tmp_path / "export"), console=silent)
    kept = tmp_path / "kept"
    (tmp_path / "run" / "checkpoint").rename(kept)
    with pytest.raises(RunDirectoryError, match=r"model has changed since .* was made"):
        write_export(tmp_path / "run", ExportOptions(out=tmp_path / "export"), console=silent)
    kept.rename(tmp_path / "run" / "checkpoint")
    after = contents(tmp_path / "run")
    assert {name: digest for name, digest in after.items() if not name.startswith("work/")} == before


def test_a_run_in_use_and_a_run_that_is_not_finished(
    tmp_path: Path, recipe_for: RecipeFor, silent: Console, uninterrupted: Any
) -> None:
    out = tmp_path / "run"
    shutil.copytree(uninterrupted("llama", INDEPENDENT), out)
    recipe = recipe_for("llama", bits=3, **INDEPENDENT)
    with RunDirectory.open(out) as held:
        held.set_state("running")
        with pytest.raises(RunDirectoryError, match=f"is in use by process {os.getpid()}; wait until it ends"):
            make_run(recipe, out, console=silent)
    (out / "layers" / "model.layers.1.mlp.gate_proj.safetensors").unlink()
    message = r"lacks 1 of 14 layers, the first model\.layers\.1\.mlp\.gate_proj; finish it with the command"
    with pytest.raises(RunDirectoryError, match=message):
        write_export(out, ExportOptions(), console=silent)
    with pytest.raises(RunDirectoryError, match=message):
        adapt(out, {"adapter_name": "second"}, console=silent)
