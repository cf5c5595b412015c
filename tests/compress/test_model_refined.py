"""Refinement of a whole model: its derivatives are autograd's, a block at a time; runs get better, and end the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.compress.model_refined import ModelObjective
from cloq_export.errors import UsageError
from cloq_export.models.blocks import find_blocks, find_linears
from cloq_export.models.source import open_model
from cloq_export.models.stream import BlockStream
from cloq_export.quantize.grid import fit_grid, round_to_grid
from cloq_export.recipe import Recipe
from cloq_export.refine import TrainedLayer
from cloq_export.types import LoraPair, QuantizedLayer, QuantSpec
from cloq_export.verbs.adapt import adapt
from cloq_export.verbs.run import run as make_run

RecipeFor = Callable[..., Recipe]
Contents = Callable[[Path], dict[str, str]]
SMALL: dict[str, Any] = {"bits": 2, "samples": 16, "refine": "model", "refine_steps": 20}


@pytest.fixture(autouse=True)
def _several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloq_export.compress.strategies.TOKENS_PER_STEP", 64)


def _rounded(parameter: nn.Parameter) -> TrainedLayer:
    """Return a layer on 2-bit codes with a pair that mends nothing."""
    weight, spec = parameter.data, QuantSpec(2, 16)
    scales, zeros = fit_grid(weight, spec)
    spread = (values.float().repeat_interleave(16, 1) for values in (scales, zeros))
    layer = QuantizedLayer(round_to_grid(weight, *spread, 3).to(torch.uint8), scales, zeros, spec)
    generator = torch.Generator().manual_seed(weight.shape[0])
    pair = LoraPair(
        torch.randn(2, weight.shape[1], generator=generator) * 0.1,
        torch.randn(weight.shape[0], 2, generator=generator) * 0.1,
        2.0,
    )
    return TrainedLayer(parameter, (layer, pair), dtype=torch.float32, scales=True)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "opt"])
def test_error_and_derivatives_are_those_of_the_whole_model(
    architecture: str, recipe_for: RecipeFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloq_export.compress.model_refined._TOKENS_AT_ONCE", 10)
    model = open_model(recipe_for(architecture).model, dtype=torch.float32).model.eval().requires_grad_(False)
    blocks = find_blocks(model, "")
    windows = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(0))
    stream = BlockStream(model, blocks, windows, device="cpu", batch=2)
    linears = [find_linears(block, blocks.prefix(index)) for index, block in enumerate(blocks)]
    layers = [{name: _rounded(linear.weight) for name, linear in of_block.items()} for of_block in linears]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    objective = ModelObjective(stream, layers, [1])
    error, found = objective.error([0, 1]), dict(objective.gradients(1))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert not parameter.requires_grad

    with torch.no_grad():
        wanted = model(windows).logits.log_softmax(-1)
    parameters = {name: linear.weight for of_block in linears for name, linear in of_block.items()}
    for of_block in layers:
        for layer in of_block.values():
            layer.install()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    each = (wanted.exp() * (wanted - model(windows).logits.log_softmax(-1))).sum(-1).mean(1)
    assert error > 0.01
    assert error == pytest.approx(float(each.detach().mean()), rel=1e-4)
    expected = torch.autograd.grad(each[2:].mean(), list(parameters.values()))
    assert set(found) == set(parameters)
    for name, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6 * float(gradient.abs().max()) + 1e-9)


def test_a_run_gets_better_and_ends_with_the_same_bytes_wherever_it_was_stopped(
    tmp_path: Path, recipe_for: RecipeFor, silent: Console, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, whole, stopped = recipe_for("llama", **SMALL), tmp_path / "whole", tmp_path / "stopped"
    summary = make_run(recipe, whole, console=silent)
    certificates = RunDirectory.open(whole).certificates()
    assert len(certificates) == 14
    assert len({(c.refined_error_before, c.refined_error_after, c.refined_step) for c in certificates}) == 1
    assert certificates[0].refined_error_after < certificates[0].refined_error_before  # type: ignore[operator]
    assert not any(c.notes for c in certificates)
    assert summary.seconds["refine"] > 0
    assert summary.seconds["refine the model"] > 0
    assert not (whole / "work").exists()

    gradients, steps_of_last = ModelObjective.gradients, 0

    def counted(*args: Any) -> Any:
        nonlocal steps_of_last
        steps_of_last += 1
        return gradients(*args)

    for place, name, number, fault, told in (
        (RunDirectory, "write_layer", 5, KeyboardInterrupt, pytest.raises(KeyboardInterrupt)),
        (
            ModelObjective,
            "gradients",
            5,
            torch.OutOfMemoryError,
            pytest.raises(
                UsageError, match=r"memory ran out in the refinement of the model.*the solved layers are kept"
            ),
        ),
        (RunDirectory, "write_layer", 8, KeyboardInterrupt, pytest.raises(KeyboardInterrupt)),
    ):
        plain, calls = getattr(place, name), 0

        def stop(*args: Any, plain: Any = plain, number: int = number, fault: type[BaseException] = fault) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                raise fault
            return plain(*args)

        with monkeypatch.context() as patch:
            steps_of_last = 0
            patch.setattr(ModelObjective, "gradients", counted)
            patch.setattr(place, name, stop)
            with told:
                make_run(recipe, stopped, console=silent)
        assert (stopped / "work" / "solved" / "layers").is_dir()
    # Stopped in the fifth step, it went on from the fourth: a judgement comes every second one.
    assert steps_of_last == 16
    notes = make_run(recipe, stopped, console=silent).notes
    assert "continued a refinement that had 14 of 14 layers solved" in notes
    assert contents(stopped) == contents(whole)
    assert not (stopped / "work").exists()


def test_a_divergence_that_is_no_number_keeps_the_refined_blocks(
    tmp_path: Path, recipe_for: RecipeFor, silent: Console, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(recipe_for("llama", **{**SMALL, "refine": "block"}), tmp_path / "blocks", console=silent)
    monkeypatch.setattr("cloq_export.compress.model_refined.divergence", lambda _, wanted: wanted.sum() * torch.nan)
    make_run(recipe_for("llama", **SMALL), tmp_path / "run", console=silent)
    kept, blocks = (RunDirectory.open(tmp_path / name) for name in ("run", "blocks"))
    for certificate in kept.certificates():
        assert certificate.notes[-1] == (
            "the refinement was given up after 0 steps and the layer kept at its start: the error turned NaN or Inf"
        )
        one, other = kept.read_layer(certificate.module), blocks.read_layer(certificate.module)
        assert torch.equal(one.quantized.codes, other.quantized.codes)
        assert torch.equal(one.quantized.scales, other.quantized.scales)
        assert one.lora is not None
        assert other.lora is not None
        assert torch.equal(one.lora.lora_A, other.lora.lora_A)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_codes_of_blocks_stay_and_the_rest_is_trained(
    rank: int, tmp_path: Path, recipe_for: RecipeFor, silent: Console
) -> None:
    make_run(recipe_for("llama", **{**SMALL, "refine": "block", "rank": rank}), tmp_path / "start", console=silent)
    make_run(recipe_for("llama", **{**SMALL, "rank": rank}), tmp_path / "run", console=silent)
    start, run = (RunDirectory.open(tmp_path / name) for name in ("start", "run"))
    for name in run.completed_modules():
        before, after = start.read_layer(name), run.read_layer(name)
        assert torch.equal(before.quantized.codes, after.quantized.codes)
        assert torch.equal(before.quantized.zeros, after.quantized.zeros)
        assert not torch.equal(before.quantized.scales, after.quantized.scales)
        assert (after.lora is None) == (rank == 0)


def test_an_adapter_for_codes_that_stand_is_trained_alone(
    tmp_path: Path, recipe_for: RecipeFor, silent: Console
) -> None:
    make_run(recipe_for("llama", **{**SMALL, "refine": "none"}), tmp_path / "run", console=silent)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run" / "layers").iterdir()}
    changes = {"rank": 2, "adapter_name": "small", "refine": "model", "refine_steps": 20}
    adapt(tmp_path / "run", changes, console=silent)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run" / "layers").iterdir()} == before
    report = RunDirectory.open(tmp_path / "run").read_report("adapter-small")["layers"]
    assert all(layer["refined_error_after"] < layer["refined_error_before"] for layer in report)


def test_experts_that_no_token_reaches_stand_still(tmp_path: Path, recipe_for: RecipeFor, silent: Console) -> None:
    recipe = recipe_for("plain-experts", **{**SMALL, "refine_steps": 4, "samples": 4})
    make_run(recipe, tmp_path / "run", console=silent)
    unreached = [c for c in RunDirectory.open(tmp_path / "run").certificates() if c.tokens == 0]
    assert unreached
    assert all(c.method == "rtn" for c in unreached)
