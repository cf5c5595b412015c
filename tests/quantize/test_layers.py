"""Layers that share an input, solved together, are the layers solved alone; every option does what it says."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from cloq_export.errors import NonFiniteError, ShapeError
from cloq_export.quantize import DampedGram, QuantizeOptions, damp_gram, layers, quantize_group
from cloq_export.quantize.comq import refit_scales, sweep_codes
from cloq_export.quantize.grid import fit_grid
from cloq_export.quantize.magr import reduce_magnitude
from cloq_export.types import QuantizedLayer, QuantSpec

IN = 192


@pytest.fixture(scope="module")
def damped(correlated_gram) -> DampedGram:
    return damp_gram(correlated_gram(IN, seed=11, fraction=0.0), 0.01)


@pytest.fixture(scope="module")
def targets() -> list[torch.Tensor]:
    """Return three weights of different height and size, as q, k and v are."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, IN, generator=generator) * size for rows, size in ((24, 0.05), (8, 0.2), (9, 0.01))]


def spread(layer: QuantizedLayer) -> tuple[torch.Tensor, torch.Tensor]:
    span = layer.in_features // layer.scales.shape[1]
    return layer.scales.float().repeat_interleave(span, 1), layer.zeros.float().repeat_interleave(span, 1)


@pytest.mark.parametrize("group_size", [64, -1])
@pytest.mark.parametrize("method", ["rtn", "optq"])
def test_a_joint_solve_equals_separate_ones(method, group_size, targets, damped, eliminate) -> None:
    spec, options = QuantSpec(3, group_size), QuantizeOptions(method=method)
    joint = quantize_group(targets, spec, damped, options)
    assert len(joint.layers) == 3
    assert joint.notes == ()
    for target, layer in zip(targets, joint.layers, strict=True):
        (alone,) = quantize_group([target], spec, damped, options).layers
        assert torch.equal(layer.scales, alone.scales)
        assert torch.equal(layer.zeros, alone.zeros)
        if method == "rtn":
            assert torch.equal(layer.codes, alone.codes)
        else:
            # Products of another shape may sum in another order, so both are held against the oracle.
            oracle = eliminate(target, *spread(layer), spec.max_code, damped.gram)
            oracle.assert_equal_up_to_ties(layer.codes)
            oracle.assert_equal_up_to_ties(alone.codes)


def test_a_joint_magr_solve_serves_every_layer_as_well_as_separate_ones(targets, damped) -> None:
    spec, options = QuantSpec(2, 64), QuantizeOptions(method="magr")
    joint = quantize_group(targets, spec, damped, options).layers
    for target, layer in zip(targets, joint, strict=True):
        (alone,) = quantize_group([target], spec, damped, options).layers
        together, apart = (float(damped.weighted(target - result.dequantize()).norm()) for result in (layer, alone))
        # MagR stops when all rows together have settled, so a few codes differ from those of layers alone.
        assert together == pytest.approx(apart, rel=0.05)


@pytest.mark.parametrize("grid", ["searched", "minmax"])
@pytest.mark.parametrize("bits", [2, 4])
def test_rounding_takes_the_nearest_point_of_the_fitted_grid(bits, grid, targets) -> None:
    spec = QuantSpec(bits, 64)
    (layer,) = quantize_group(targets[:1], spec, None, QuantizeOptions(method="rtn", grid=grid)).layers
    assert all(
        torch.equal(*pair) for pair in zip(fit_grid(targets[0], spec, grid), (layer.scales, layer.zeros), strict=True)
    )
    scales, zeros = spread(layer)
    every = scales.unsqueeze(-1) * (torch.arange(2**bits) - zeros.unsqueeze(-1))
    nearest = (targets[0].unsqueeze(-1) - every).abs().amin(-1)
    torch.testing.assert_close((targets[0] - layer.dequantize()).abs(), nearest)


@pytest.mark.parametrize("method", ["optq", "magr"])
def test_without_statistics_every_method_rounds(method, targets) -> None:
    spec = QuantSpec(4, 32)
    rounded = quantize_group(targets, spec, None, QuantizeOptions(method="rtn"))
    blind = quantize_group(targets, spec, None, QuantizeOptions(method=method, sweeps=2, refit=True))
    for one, other in zip(rounded.layers, blind.layers, strict=True):
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scales, other.scales)


@pytest.mark.parametrize(("bits", "share"), [(2, 0.75), (3, 0.6), (4, 0.6)])
def test_optq_is_well_below_rounding_on_correlated_inputs(bits, share, targets, damped) -> None:
    spec = QuantSpec(bits, 64)
    errors = {}
    for method in ("rtn", "optq"):
        group = quantize_group(targets, spec, damped, QuantizeOptions(method=method))
        errors[method] = [
            float(damped.weighted(w - layer.dequantize()).norm())
            for w, layer in zip(targets, group.layers, strict=True)
        ]
    assert all(walked < share * rounded for walked, rounded in zip(errors["optq"], errors["rtn"], strict=True))


@pytest.mark.parametrize("method", ["optq", "magr"])
def test_sweeps_and_refits_serve_the_original_weight(method, targets, damped) -> None:
    spec = QuantSpec(2, 64)

    def errors(sweeps: int, refit: bool) -> np.ndarray:
        options = QuantizeOptions(method=method, sweeps=sweeps, refit=refit)
        group = quantize_group(targets, spec, damped, options)
        return np.array(
            [
                float(damped.weighted(w - layer.dequantize()).norm())
                for w, layer in zip(targets, group.layers, strict=True)
            ]
        )

    plain, swept, refitted, both = errors(0, False), errors(3, False), errors(0, True), errors(3, True)
    assert (swept < plain).all()
    assert (refitted < plain).all()
    assert (both < np.minimum(swept, refitted)).all()


@pytest.mark.parametrize("method", ["optq", "magr"])
def test_refit_and_sweep_follow_each_other_on_the_original_weight(method, targets, damped) -> None:
    spec, target = QuantSpec(2, 64), targets[0]

    def solve(sweeps: int, refit: bool) -> QuantizedLayer:
        return quantize_group([target], spec, damped, QuantizeOptions(method, sweeps=sweeps, refit=refit)).layers[0]

    def sweep(layer: QuantizedLayer) -> torch.Tensor:
        return sweep_codes(target, layer.codes, *spread(layer), spec.max_code, damped.gram)

    layer = solve(0, False)
    assert torch.equal(solve(1, False).codes, sweep(layer))
    for sweeps in (1, 2):
        scales = refit_scales(target, layer.codes, layer.scales, layer.zeros, damped.gram)
        layer = QuantizedLayer(layer.codes, scales, layer.zeros, spec)
        if sweeps == 1:
            assert torch.equal(solve(0, True).scales, scales)
        layer = QuantizedLayer(sweep(layer), scales, layer.zeros, spec)
        together = solve(sweeps, True)
        assert torch.equal(together.scales, layer.scales)
        assert torch.equal(together.codes, layer.codes)


def test_magr_quantizes_the_smoothed_weight(targets, damped, eliminate) -> None:
    spec, alpha = QuantSpec(2, 64), 3e-3
    (layer,) = quantize_group(targets[:1], spec, damped, QuantizeOptions(method="magr", magr_alpha=alpha)).layers
    smoothed = reduce_magnitude(targets[0], damped.gram, 64, alpha).weight
    scales, _ = fit_grid(smoothed, spec)
    assert torch.equal(layer.scales, scales)
    assert float(scales.float().mean()) < 0.9 * float(fit_grid(targets[0], spec)[0].float().mean())
    eliminate(smoothed, *spread(layer), spec.max_code, damped.gram).assert_equal_up_to_ties(layer.codes)


def test_magr_that_ran_out_of_steps_is_noted(targets, damped, monkeypatch) -> None:
    monkeypatch.setattr(layers, "reduce_magnitude", functools.partial(reduce_magnitude, max_iterations=4))
    group = quantize_group(targets, QuantSpec(2, 64), damped, QuantizeOptions(method="magr"))
    assert group.notes == ("MagR stopped after 4 iterations before it converged",)


def test_targets_are_left_as_they_were(targets, damped) -> None:
    copies = [target.clone() for target in targets]
    quantize_group(targets, QuantSpec(2, 64), damped, QuantizeOptions(method="magr", sweeps=1, refit=True))
    assert all(torch.equal(target, copy) for target, copy in zip(targets, copies, strict=True))


def test_faults_are_refused_before_any_work(targets, damped) -> None:
    with pytest.raises(ShapeError, match=r"192 inputs cannot be cut into groups of 56"):
        quantize_group(targets, QuantSpec(4, 56), damped, QuantizeOptions())
    broken = targets[1].clone()
    broken[2, 5] = float("nan")
    with pytest.raises(NonFiniteError, match="a weight is NaN or Inf"):
        quantize_group([targets[0], broken], QuantSpec(4, 64), damped, QuantizeOptions())
