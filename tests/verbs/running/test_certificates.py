"""The figures of a run's layers, computed again from what the layers of whole models really meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from layers_as_made import calibration_windows, reference_model, stored_layers
from run_modes import ERROR_AWARE, INDEPENDENT, modes
from torch import nn

from cloq_export.models.source import open_model
from cloq_export.recipe import Recipe

RecipeFor = Callable[..., Recipe]


def inputs_met(model: nn.Module, modules: Iterable[str], windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what each linear of a whole model is given on the windows, (tokens, in) float64."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]).double())
        )
        for name in modules
    ]
    with torch.no_grad():
        model(windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
@pytest.mark.parametrize(
    "mode",
    [INDEPENDENT, {**ERROR_AWARE, "float_share": 0.5}, {**ERROR_AWARE, "float_share": 1.0}],
    ids=["independent", "half paired", "all paired"],
)
def test_certificates_hold_on_what_the_layers_really_meet(
    family: str, mode: dict[str, float], recipe_for: RecipeFor, run_recipe: Any
) -> None:
    """Every figure again in float64, from whole models: the float one, and the compressed one as it is served."""
    recipe = recipe_for(family, bits=2, overrides={"*.layers.1.*": {"bits": 4}}, **mode)
    run, _ = run_recipe(recipe)
    layers = stored_layers(run)
    source = open_model(recipe.model).model
    windows = calibration_windows(recipe)
    exact = inputs_met(source, layers, windows)
    # In the error-aware mode a layer is calibrated behind the compressed layers before it, which is where it serves.
    met = inputs_met(reference_model(recipe, layers, adapted=True), layers, windows) if recipe.error_aware else exact
    paired = int(recipe.float_share * windows.numel())
    for module, layer in layers.items():
        weight = source.get_submodule(module).weight.detach().double()
        gram = met[module].T @ met[module]
        damping = recipe.damping * gram.diagonal().mean()
        damped = gram + damping * torch.eye(len(gram), dtype=torch.float64)
        # The drift is told by the first batches, those that run through the float model too.
        told, away = met[module][:paired], (exact[module] - met[module])[:paired]
        told_gram = told.T @ told
        told_gram += recipe.damping * told_gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        # Wider codes take less of the share, 2 / bits of it.
        share = recipe.error_aware * {2: 1.0, 4: 0.5}[layer.quantized.spec.bits]
        target = weight + share * torch.linalg.solve(told_gram, told.T @ away @ weight.T).T
        root = torch.linalg.cholesky(damped)

        def error_of(difference: torch.Tensor, root: torch.Tensor = root, target: torch.Tensor = target) -> float:
            return float((difference @ root).norm() / (target @ root).norm())

        certificate = layer.certificate
        assert certificate is not None
        assert layer.lora is not None
        quantized = layer.quantized.dequantize().double()
        product = layer.lora.lora_B.double() @ layer.lora.lora_A.double()
        left_over = torch.linalg.svdvals((target - quantized) @ root)[recipe.rank :]
        largest = [torch.linalg.svdvals(matrix @ root)[0] for matrix in (target - quantized - product, target)]
        expected = {
            "error_quantized": error_of(target - quantized),
            "error_adapted": error_of(target - quantized - product),
            "error_bound": float(left_over.norm() / (target @ root).norm()),
            "damping": float(damping),
            "effective_rank": float(gram.trace() ** 2 / gram.square().sum()),
        }
        # The drift may be summed from operands rounded to bfloat16, eight bits.
        tolerance = 1e-2 if recipe.error_aware else 2e-3
        assert {key: getattr(certificate, key) for key in expected} == pytest.approx(expected, rel=tolerance), module
        # By subspace iteration, which stays a few percent below where singular values crowd.
        assert certificate.spectral_error_adapted == pytest.approx(float(largest[0] / largest[1]), rel=3e-2)
        assert certificate.error_bound <= certificate.error_adapted * (1 + 1e-6)
        assert certificate.error_adapted <= 1.01 * certificate.error_bound
        assert certificate.error_adapted < certificate.error_quantized
        assert certificate.tokens == windows.numel()
        assert certificate.rank == 4
        assert certificate.notes == ()
        assert certificate.target == (f"error-aware target, share {share}" if share else "float weight")
    report = run.read_report("layers")["layers"]
    assert [entry["module"] for entry in report] == [certificate.module for certificate in run.certificates()]


def test_the_error_aware_mode_brings_the_output_closer(recipe_for: RecipeFor, run_recipe: Any) -> None:
    """Not a promise for every model, but a sign the right way round: here it lowers the error behind the last block."""
    errors = {}
    for name, mode in (("independent", INDEPENDENT), ("error-aware", ERROR_AWARE)):
        recipe = recipe_for("llama", bits=2, samples=16, **mode)
        run, _ = run_recipe(recipe, name)
        windows = calibration_windows(recipe)
        source = open_model(recipe.model).model
        served = reference_model(recipe, stored_layers(run), adapted=True)
        with torch.no_grad():
            behind = [model.model(windows, use_cache=False).last_hidden_state for model in (source, served)]
        errors[name] = float((behind[0] - behind[1]).norm())
    assert errors["error-aware"] < 0.98 * errors["independent"]


@modes
def test_bfloat16_arithmetic_gives_nearly_the_same_statistics(
    mode: dict[str, float], recipe_for: RecipeFor, run_recipe: Any
) -> None:
    exact, rounded = (
        run_recipe(recipe_for("llama", bits=4, precision=precision, **mode), precision)[0].certificates()
        for precision in ("float32", "bfloat16")
    )
    for one, other in zip(exact, rounded, strict=True):
        assert one != other
        # bfloat16 keeps eight bits of each activation; damping is a mean over them, the error a small difference.
        assert one.damping == pytest.approx(other.damping, rel=0.05)
        assert one.error_adapted == pytest.approx(other.error_adapted, rel=0.2)
