"""The grid's promises on every kind of group, and its search against a plain loop in float64."""

from __future__ import annotations

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloq_export.errors import NonFiniteError, ShapeError
from cloq_export.quantize import grid
from cloq_export.quantize.grid import SEARCH_RANGE_FRACTIONS, SEARCH_REFINEMENT, fit_grid, round_to_grid
from cloq_export.types import QuantizedLayer, QuantSpec

SMALLEST_NORMAL, LARGEST = 2.0**-14, 65504.0
GROUP = 16

specs = st.builds(QuantSpec, st.sampled_from([2, 3, 4, 8]), st.sampled_from([-1, 8, 16]), st.booleans())
methods = st.sampled_from(["searched", "minmax"])
# Magnitudes from far below float16's smallest number to its largest, with exact zeros and repeated values.
numbers = st.one_of(
    st.floats(-LARGEST, LARGEST, width=32),
    st.floats(-1.0, 1.0, width=32),
    st.sampled_from([0.0, 0.5, *map(float, np.float32([-1e-30, 1e-5]))]),
)
weights = arrays.arrays(np.float32, (3, GROUP), elements=numbers).map(torch.from_numpy)
quick = settings(max_examples=150, deadline=None, derandomize=True)


def quantize(weight: torch.Tensor, spec: QuantSpec, method: str) -> QuantizedLayer:
    scales, zeros = fit_grid(weight, spec, method)
    span = spec.columns_per_group(weight.shape[1])
    spread = (values.float().repeat_interleave(span, 1) for values in (scales, zeros))
    return QuantizedLayer(round_to_grid(weight, *spread, spec.max_code).to(torch.uint8), scales, zeros, spec)


def search_measure(weight: torch.Tensor, layer: QuantizedLayer) -> np.ndarray:
    """Return the sum of |error|^2.5 of every group, (out, groups) float64."""
    scales, zeros = layer.scales.double().numpy()[..., None], layer.zeros.double().numpy()[..., None]
    codes = layer.codes.double().numpy().reshape(*layer.scales.shape, -1)
    error = np.abs(weight.double().numpy().reshape(codes.shape) - scales * (codes - zeros))
    return (error**2.5).sum(-1)


@quick
@given(weights, specs, methods)
def test_scales_are_normal_float16_and_zeros_are_codes(weight, spec, method) -> None:
    scales, zeros = fit_grid(weight, spec, method)
    groups = GROUP // spec.columns_per_group(GROUP)
    assert scales.shape == zeros.shape == (3, groups)
    assert scales.dtype == torch.float16
    assert zeros.dtype == torch.uint8
    assert bool(((scales >= SMALLEST_NORMAL) & (scales <= LARGEST)).all())
    assert int(zeros.max()) <= spec.max_code
    if spec.symmetric:
        assert bool((zeros == 2 ** (spec.bits - 1)).all())


@quick
@given(weights, specs, methods)
def test_zero_stays_exactly_zero(weight, spec, method) -> None:
    layer = quantize(torch.where(weight > 0, weight, 0.0), spec, method)
    assert bool((layer.dequantize()[weight <= 0] == 0).all())


@quick
@given(weights, specs)
def test_the_search_never_loses_to_minmax_by_its_own_measure(weight, spec) -> None:
    searched = search_measure(weight, quantize(weight, spec, "searched"))
    spanned = search_measure(weight, quantize(weight, spec, "minmax"))
    assert (searched <= spanned * (1 + 1e-4) + 1e-30).all()


@quick
@given(weights, specs)
def test_minmax_errs_by_half_a_step(weight, spec) -> None:
    """Half a step; at the ends of the range a little more, because scale and zero are themselves rounded."""
    if spec.symmetric:
        return
    layer = quantize(weight, spec, "minmax")
    steps = layer.scales.double().repeat_interleave(spec.columns_per_group(GROUP), 1)
    error = (weight.double() - layer.dequantize(torch.float64)).abs()
    assert bool((error <= 0.65 * steps).all())


@quick
@given(
    arrays.arrays(np.float32, (3, GROUP), elements=st.floats(0.25, 512.0, width=32)).map(torch.from_numpy),
    specs,
    methods,
    st.sampled_from([-4, 1, 5]),
    st.booleans(),
)
def test_doubling_the_weights_doubles_the_scales_alone(weight, spec, method, doublings, mixed) -> None:
    signed = weight * torch.where(torch.arange(GROUP) % 3 == 0, -1.0, 1.0) if mixed else weight
    scales, zeros = fit_grid(signed, spec, method)
    scaled_scales, scaled_zeros = fit_grid(signed * 2.0**doublings, spec, method)
    usable = scaled_scales > SMALLEST_NORMAL
    assert torch.equal((scales.double() * 2.0**doublings)[usable], scaled_scales.double()[usable])
    assert torch.equal(zeros[usable], scaled_zeros[usable])


@pytest.mark.parametrize("method", ["searched", "minmax"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("value", [1.0, -1.0, 0.0371, -250.0, 60000.0])
def test_a_constant_group_is_kept_to_float16(value, bits, method) -> None:
    layer = quantize(torch.full((2, 24), value), QuantSpec(bits, 8), method)
    relative = (layer.dequantize() - value).abs().max() / abs(value)
    assert relative <= 2.0**-11
    assert bool((layer.zeros == (0 if value > 0 else 2**bits - 1)).all())


@pytest.mark.parametrize("method", ["searched", "minmax"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_an_all_zero_group_is_kept_exactly(symmetric, method) -> None:
    weight = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    weight[:, 8:16] = 0.0
    layer = quantize(weight, QuantSpec(2, 8, symmetric), method)
    assert bool((layer.dequantize()[:, 8:16] == 0).all())


@pytest.mark.parametrize("method", ["searched", "minmax"])
def test_one_sided_groups_put_zero_at_the_end_of_the_codes(method) -> None:
    weight = torch.rand(4, 64, generator=torch.Generator().manual_seed(0)) + 0.01
    assert bool((quantize(weight, QuantSpec(4, 16), method).zeros == 0).all())
    assert bool((quantize(-weight, QuantSpec(4, 16), method).zeros == 15).all())


@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e-8])
def test_weights_below_the_smallest_scale_vanish_without_harm(magnitude) -> None:
    weight = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)) * magnitude
    layer = quantize(weight, QuantSpec(4, 16), "searched")
    assert bool((layer.scales == SMALLEST_NORMAL).all())
    assert bool((layer.dequantize() == 0).all())


def least_error_by_plain_search(values: np.ndarray, spec: QuantSpec) -> float:
    """Return the sum of |error|^2.5 over one group at the best range: the coarse fractions, then the fine offsets."""
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)

    def error(fraction: float) -> float:
        if spec.symmetric:
            scale = np.float64(np.float16(2 * max(-low, high) * fraction / spec.max_code))
            zero = 2 ** (spec.bits - 1)
        else:
            scale = np.float64(np.float16((high - low) * fraction / spec.max_code))
            zero = np.clip(np.rint(-low * fraction / scale), 0, spec.max_code)
        codes = np.clip(np.rint(values / scale) + zero, 0, spec.max_code)
        return float((np.abs(values - scale * (codes - zero)) ** 2.5).sum())

    best = min(SEARCH_RANGE_FRACTIONS, key=error)
    for offset in SEARCH_REFINEMENT:
        best = min(best, best + offset, key=error)
    return error(best)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_search_equals_a_plain_loop_over_ranges(bits, symmetric) -> None:
    spec = QuantSpec(bits, 32, symmetric)
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(bits)) ** 3 * 0.1
    found = search_measure(weight, quantize(weight, spec, "searched"))
    groups = weight.double().numpy().reshape(6, 2, 32)
    expected = [[least_error_by_plain_search(group, spec) for group in row] for row in groups]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_search_gains_much_at_two_bits() -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(2, 64)
    searched, spanned = (
        float((weight - quantize(weight, spec, method).dequantize()).square().sum())
        for method in ("searched", "minmax")
    )
    assert searched < 0.75 * spanned


@pytest.mark.parametrize("method", ["searched", "minmax"])
def test_pieces_that_fit_the_cache_change_nothing(method, monkeypatch) -> None:
    weight = torch.randn(7, 96, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(3, 32)
    whole = fit_grid(weight, spec, method)
    for elements in (1, 33, 64, 500):
        monkeypatch.setattr(grid, "SEARCH_CHUNK_ELEMENTS", elements)
        assert all(torch.equal(*pair) for pair in zip(fit_grid(weight, spec, method), whole, strict=True))


def test_round_to_grid_takes_the_nearest_code() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 40, generator=generator)
    scales = torch.rand(5, 1, generator=generator) + 0.05
    zeros = torch.randint(0, 8, (5, 1), generator=generator).float()
    codes = round_to_grid(weight, scales, zeros, 7)
    every = scales.unsqueeze(-1) * (torch.arange(8) - zeros.unsqueeze(-1))
    nearest = (weight.unsqueeze(-1) - every).abs().amin(-1)
    torch.testing.assert_close((weight - scales * (codes - zeros)).abs(), nearest)


@pytest.mark.parametrize("method", ["searched", "minmax"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(value, method) -> None:
    weight = torch.zeros(2, 16)
    weight[1, 3] = value
    with pytest.raises(NonFiniteError, match=r"a weight is NaN or Inf; repair the source model before quantizing it\."):
        fit_grid(weight, QuantSpec(4, 8), method)


def test_weights_too_large_for_a_float16_scale_are_refused() -> None:
    weight = torch.ones(2, 16)
    weight[0, 0] = -70000.0
    with pytest.raises(NonFiniteError, match=r"magnitude 7e\+04 cannot be scaled in float16 \(largest 65504\); leave"):
        fit_grid(weight, QuantSpec(4, 8))
    weight[0, 0] = -LARGEST
    layer = quantize(weight, QuantSpec(2, 8), "searched")
    # The search may shrink the range by some of its steps.
    assert float(layer.dequantize()[0, 0]) == pytest.approx(-LARGEST, rel=0.1)


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ShapeError, match=r"40 inputs cannot be cut into groups of 16; choose a group size that divides 40"
    ):
        fit_grid(torch.zeros(2, 40), QuantSpec(4, 16))


@pytest.mark.parametrize(("bits", "shrink"), [(2, 0.8), (3, 0.9), (2, 0.95), (4, 1.0)])
def test_a_shrunk_range_has_the_step_and_zero_of_magrs_authors(bits: int, shrink: float) -> None:
    """`scale = beta (max - min) / (2**bits - 1)`, `zero = round(-min / scale)`, channel by channel."""
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(bits))
    weight[3] = weight[3].abs()
    scales, zeros = fit_grid(weight, QuantSpec(bits, -1), "minmax", shrink)
    for row, scale, zero in zip(weight.tolist(), scales[:, 0].tolist(), zeros[:, 0].tolist(), strict=True):
        low, high = min(0.0, *row), max(0.0, *row)
        expected = shrink * (high - low) / (2**bits - 1)
        assert scale == pytest.approx(expected, rel=2**-10)
        # The zero is taken for the scale as it is stored, and stays among the codes.
        assert zero == min(2**bits - 1, max(0, round(-low / scale)))
    if shrink == 1.0:
        plain = fit_grid(weight, QuantSpec(bits, -1), "minmax")
        assert torch.equal(scales, plain[0])
        assert torch.equal(zeros, plain[1])
    searched = [fit_grid(weight, QuantSpec(bits, 16), "searched", share)[0] for share in (shrink, 1.0)]
    assert torch.equal(*searched)
