"""Refinement in the whole pipeline: the blocks get better, the bytes stay the same, a bad end is kept and said."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.compress.block_refined import BlockRefiner, SolvedBlock
from cloq_export.recipe import Recipe
from cloq_export.refine import train_layers
from cloq_export.verbs.adapt import adapt
from cloq_export.verbs.export import export as write_export
from cloq_export.verbs.inspect import inspect as inspect_folder
from cloq_export.verbs.options import ExportOptions
from cloq_export.verbs.run import run as make_run

RecipeFor = Callable[..., Recipe]
Contents = Callable[[Path], dict[str, str]]
SMALL: dict[str, Any] = {"bits": 2, "samples": 16, "refine_steps": 20, "error_aware": 0.5}


@pytest.fixture(autouse=True)
def _several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloq_export.compress.strategies.TOKENS_PER_STEP", 64)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, recipe_for: RecipeFor, silent: Console) -> Path:
    """Return a finished run, made once; it must only be read."""
    folder = tmp_path_factory.mktemp("block") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cloq_export.compress.strategies.TOKENS_PER_STEP", 64)
        make_run(recipe_for("llama", refine="block", **SMALL), folder, console=silent)
    return folder


def test_the_held_out_error_falls(made: Path) -> None:
    certificates = RunDirectory.open(made).certificates()
    assert len(certificates) == 14
    for certificate in certificates:
        before, after = certificate.refined_error_before, certificate.refined_error_after
        assert before is not None
        assert after is not None
        assert after <= before
        assert certificate.method == "optq"
        # The bound is that of the refined codes.
        assert certificate.error_bound <= certificate.error_adapted * (1 + 1e-4)
    better = [c for c in certificates if c.refined_error_after < c.refined_error_before]  # type: ignore[operator]
    assert len(better) >= 7
    # One block, one error.
    assert len({c.refined_error_before for c in certificates}) == 2


@pytest.mark.parametrize(("asked", "steps"), [pytest.param(0, 200, marks=pytest.mark.slow), (7, 7)])
def test_steps_without_a_number_are_those_of_the_package(
    asked: int,
    steps: int,
    tmp_path: Path,
    recipe_for: RecipeFor,
    silent: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []

    def watched(layers: Any, objective: Any, schedule: Any) -> Any:
        assert (len(objective.trained), len(objective.judging)) == (8, 1)
        made.append(schedule.steps)
        return train_layers(layers, objective, dataclasses.replace(schedule, steps=1))

    monkeypatch.setattr("cloq_export.compress.block_refined.train_layers", watched)
    recipe = recipe_for("llama", refine="block", **{**SMALL, "refine_steps": asked})
    make_run(recipe, tmp_path / "run", console=silent)
    assert set(made) == {steps}


@pytest.mark.parametrize("rank", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_codes_are_trained_where_there_is_no_adapter(
    rank: int, tmp_path: Path, recipe_for: RecipeFor, silent: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, changed = BlockRefiner.refine_block, []

    def watched(self: BlockRefiner, block: SolvedBlock, targets: Any) -> Any:
        refined = plain(self, block, targets)
        for name, layer in block.solved.items():
            before, after = layer.quantized, refined[name].quantized
            assert torch.equal(before.zeros, after.zeros)
            changed.append(float((before.codes != after.codes).double().mean()))
        return refined

    monkeypatch.setattr(BlockRefiner, "refine_block", watched)
    recipe = recipe_for("llama", **{**SMALL, "rank": rank, "refine": "block", "refine_steps": 60, "samples": 96})
    make_run(recipe, tmp_path / "run", console=silent)
    assert len(changed) == 14
    if rank:
        assert max(changed) == 0.0
        return
    assert sum(share > 0 for share in changed) >= 7
    assert max(changed) < 0.2


def test_a_run_that_was_stopped_anywhere_ends_with_the_same_bytes(
    tmp_path: Path,
    recipe_for: RecipeFor,
    silent: Console,
    contents: Contents,
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped between two layers of one block, then robbed of some layers: blocks are refined again as a whole."""
    expected = contents(made)
    recipe, run = recipe_for("llama", refine="block", **SMALL), tmp_path / "run"
    plain, written = RunDirectory.write_layer, 0

    def stop(*args: Any) -> None:
        nonlocal written
        written += 1
        if written == 10:
            raise KeyboardInterrupt
        plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_layer", stop)
        with pytest.raises(KeyboardInterrupt):
            make_run(recipe, run, console=silent)
    assert len(list((run / "layers").iterdir())) == 9
    make_run(recipe, run, console=silent)
    assert contents(run) == expected
    for path in random.Random(0).sample(sorted((run / "layers").iterdir()), 3):
        path.unlink()
    shutil.rmtree(run / "checkpoint")
    make_run(recipe, run, console=silent)
    assert contents(run) == expected


def test_a_diverging_block_is_kept_at_its_start_and_reported(
    tmp_path: Path, recipe_for: RecipeFor, silent: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cloq_export.compress.block_refined.relative_error", lambda output, target: (output - target).sum() * torch.nan
    )
    summary = make_run(recipe_for("llama", refine="block", **SMALL), tmp_path / "run", console=silent)
    layers = RunDirectory.open(tmp_path / "run").read_report("layers")["layers"]
    for layer in layers:
        assert layer["refined_step"] == 0
        assert layer["notes"] == [
            "the refinement was given up after 0 steps and the layer kept at its start: the error turned NaN or Inf"
        ]
    assert any("the error turned NaN or Inf" in warning for warning in summary.layers.warnings)
    # What is kept is what was solved: its pair is the closed form.
    assert all(layer["error_adapted"] == pytest.approx(layer["error_bound"], rel=1e-3) for layer in layers)


@pytest.mark.parametrize("layout", ["gptq_v2", "compressed_tensors"])
def test_refined_layers_export_like_any_other(layout: str, tmp_path: Path, made: Path, silent: Console) -> None:
    folder = tmp_path / "run"
    shutil.copytree(made, folder)
    write_export(folder, ExportOptions(format=layout, out=tmp_path / "export"), console=silent)
    assert inspect_folder(tmp_path / "export", verify=True)


def test_adapters_alone_are_refined_for_codes_that_stand(tmp_path: Path, made: Path, silent: Console) -> None:
    run = tmp_path / "run"
    shutil.copytree(made, run)
    before = {path.name: path.read_bytes() for path in (run / "layers").iterdir()}
    adapt(run, {"rank": 2, "adapter_name": "small"}, console=silent)
    assert {path.name: path.read_bytes() for path in (run / "layers").iterdir()} == before
    report = RunDirectory.open(run).read_report("adapter-small")["layers"]
    assert {layer["rank"] for layer in report} == {2}
    assert any(layer["refined_error_after"] < layer["refined_error_before"] for layer in report)


def test_experts_that_no_token_reaches_are_refined_around(
    tmp_path: Path, recipe_for: RecipeFor, silent: Console
) -> None:
    recipe = recipe_for("plain-experts", refine="block", **{**SMALL, "refine_steps": 4, "samples": 4})
    make_run(recipe, tmp_path / "run", console=silent)
    certificates = RunDirectory.open(tmp_path / "run").certificates()
    unreached = [c for c in certificates if c.tokens == 0]
    assert unreached
    assert all(c.method == "rtn" and c.error_adapted == c.error_quantized for c in unreached)
