"""Which weights float16 scales cannot hold, judged by what a layer would lose and not by a tiny group in it."""

from __future__ import annotations

import pytest
import torch

from cloq_export.quantize import (
    QuantizeOptions,
    exceeds_float16,
    lost_energy,
    lost_groups,
    quantize_group,
    reach_fault,
)
from cloq_export.quantize.grid import raise_zeros
from cloq_export.types import QuantSpec

GRIDS = [QuantSpec(bits, size, symmetric) for bits in (2, 3, 4, 8) for size in (-1, 16) for symmetric in (False, True)]


def drawn(exponent: int = 0) -> torch.Tensor:
    return 0.02 * 2.0**exponent * torch.randn(24, 64, generator=torch.Generator().manual_seed(0))


def relative_error(weight: torch.Tensor, spec: QuantSpec) -> float:
    rounded = quantize_group([weight], spec, None, QuantizeOptions(method="rtn")).layers[0].dequantize()
    return float((weight - rounded).norm() / weight.norm())


@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_what_is_not_refused_is_rounded_about_as_well_as_it_can_be(spec) -> None:
    best = relative_error(drawn(), spec)
    faults = [reach_fault(drawn(-exponent), spec) for exponent in range(30)]
    first = next(exponent for exponent, fault in enumerate(faults) if fault)
    assert all(faults[first:]), "what is too small stays too small"
    assert first > 3
    for exponent in range(first):
        assert relative_error(drawn(-exponent), spec) < max(2.5 * best, 0.025)
    # And what is refused would really be lost.
    assert relative_error(drawn(-first), spec) > 1.5 * best
    assert f"too small for {spec.bits} bits" in str(faults[first])


@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_tiny_rows_and_groups_among_others_are_ordinary(spec) -> None:
    weight = drawn()
    weight[:12] *= 1e-7
    weight[:, :16] *= 1e-9
    weight[20] = 0.0
    assert reach_fault(weight, spec) is None
    lost = lost_groups(weight, spec)
    assert bool(lost[:12].all())
    assert not bool(lost[20].any()), "zeros lose nothing"
    energy = lost_energy(weight, lost)
    assert float(energy[12:20, 16:].sum()) == 0.0
    torch.testing.assert_close(energy[:12], weight[:12].double().square())


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-30])
def test_a_layer_of_almost_nothing(value) -> None:
    weight = torch.full((4, 16), value)
    assert bool(reach_fault(weight, QuantSpec(4, 16))) == (value > 0)


def test_weights_beyond_float16() -> None:
    weight = drawn()
    weight[3, 5] = -1e5
    assert exceeds_float16(weight)
    assert "its weights reach 1e+05, and codes with float16 scales hold them safely up to 32752" in str(
        reach_fault(weight, QuantSpec(4, 16))
    )
    weight[3, 5] = 3e4
    assert reach_fault(weight, QuantSpec(2, 16, symmetric=True)) is None
    half = quantize_group([weight], QuantSpec(2, 16, symmetric=True), None, QuantizeOptions(method="rtn")).layers[0]
    assert bool(torch.isfinite(half.dequantize(torch.float16)).all())


@pytest.mark.parametrize("method", ["rtn", "optq"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_layout_that_stores_zero_less_one_gets_zeros_of_one(bits, method) -> None:
    weight = drawn().abs() + 0.01
    plain, raised = (
        quantize_group([weight], QuantSpec(bits, 16), None, QuantizeOptions(method=method, least_zero=least)).layers[0]
        for least in (0, 1)
    )
    assert bool((plain.zeros == 0).all())
    assert bool((raised.zeros == 1).all())
    # One code less: the step widens, so that the largest weights are still reached.
    share = plain.spec.max_code / (plain.spec.max_code - 1)
    torch.testing.assert_close(raised.scales.float(), plain.scales.float() * share, rtol=1e-3, atol=0)
    assert float((weight - raised.dequantize()).norm()) < 2.5 * float((weight - plain.dequantize()).norm())


def test_zeros_that_fit_are_left_alone() -> None:
    scales, zeros = torch.full((2, 3), 0.5, dtype=torch.float16), torch.full((2, 3), 4, dtype=torch.uint8)
    kept = raise_zeros(scales, zeros, QuantSpec(4, 16), 1)
    assert kept[0] is scales
    assert kept[1] is zeros
