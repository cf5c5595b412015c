"""Pairs below or beyond the range of their dtype: the product is kept, whatever it takes."""

from __future__ import annotations

import pytest
import torch

from cloq_export.adapt import CloqOptions, cholesky_root, init_cloq, init_svd, stored_pair
from cloq_export.errors import NonFiniteError

HALF = torch.float16


def factors(scale_a: float = 1.0, scale_b: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lora_a = scale_a * torch.randn(4, 40, generator=generator, dtype=torch.float64)
    return lora_a, scale_b * torch.randn(24, 4, generator=generator, dtype=torch.float64)


def lost(pair, lora_a, lora_b) -> float:
    exact = lora_b @ lora_a * (pair.alpha / pair.rank)
    return float((pair.lora_B.double() @ pair.lora_A.double() * pair.scaling - exact).norm() / exact.norm())


def test_ordinary_factors_are_only_cast() -> None:
    lora_a, lora_b = factors(0.05, 0.1)
    pair = stored_pair(lora_a, lora_b, HALF)
    assert torch.equal(pair.lora_A, lora_a.to(HALF))
    assert torch.equal(pair.lora_B, lora_b.to(HALF))
    assert pair.alpha == 4.0
    assert stored_pair(lora_a, lora_b, HALF, alpha=8.0).scaling == 2.0


@pytest.mark.parametrize(
    ("scale_a", "scale_b"), [(1e-7, 0.1), (0.1, 1e-7), (1e-9, 1e3), (1e6, 0.1), (0.1, 1e6), (1e-12, 1e9), (1e5, 1e2)]
)
def test_factors_out_of_range_trade_powers_of_two(scale_a, scale_b) -> None:
    lora_a, lora_b = factors(scale_a, scale_b)
    pair = stored_pair(lora_a, lora_b, HALF)
    assert pair.lora_A.dtype == pair.lora_B.dtype == HALF
    assert lost(pair, lora_a, lora_b) < 2e-3
    ratio = float(pair.lora_A.abs().max() / lora_a.abs().max())
    assert round(torch.log2(torch.tensor(ratio)).item()) != 0


@pytest.mark.parametrize(("scale_a", "scale_b"), [(1e-9, 1e-9), (1e6, 1e6)])
def test_products_out_of_range_are_stored_in_float32(scale_a, scale_b) -> None:
    lora_a, lora_b = factors(scale_a, scale_b)
    pair = stored_pair(lora_a, lora_b, HALF)
    assert pair.lora_A.dtype == pair.lora_B.dtype == torch.float32
    assert lost(pair, lora_a, lora_b) < 1e-6
    assert stored_pair(lora_a, lora_b, torch.bfloat16).lora_A.dtype == torch.bfloat16


@pytest.mark.parametrize("which", [0, 1])
def test_a_factor_of_zeros_stays_one(which) -> None:
    pair = list(factors(1e-7, 1.0))
    pair[which] = torch.zeros_like(pair[which])
    stored = stored_pair(*pair, HALF)
    assert float(stored.product().abs().max()) == 0.0
    assert stored.lora_A.dtype == HALF


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_what_is_no_number_is_refused(value) -> None:
    lora_a, lora_b = factors()
    lora_a[1, 2] = value
    lora_b *= 1e10
    with pytest.raises(NonFiniteError, match=r"LoRA [AB] holds NaN or Inf"):
        stored_pair(lora_a, lora_b, HALF)


@pytest.mark.parametrize("size", [1e-8, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("split", ["paper", "balanced", "transposed"])
def test_the_closed_form_is_as_good_at_any_size(size, split, layer, correction) -> None:
    drawn = layer(16, 24)
    root = cholesky_root(torch.linalg.cholesky(drawn.gram))
    residual = size * drawn.residual
    pair = init_cloq(residual, torch.zeros_like(residual), root, 4, CloqOptions(split=split)).pair
    assert drawn.error(correction(pair) / size) <= 1.01 * drawn.least_error(4)


@pytest.mark.parametrize("size", [1e-8, 1e7])
def test_singular_vectors_are_as_good_at_any_size(size, layer, correction) -> None:
    weight = size * layer(16, 24).residual
    left = [weight - correction(init_svd(weight, torch.zeros_like(weight), 4, dtype=d)) for d in (HALF, torch.float32)]
    assert float(left[0].norm()) <= 1.01 * float(left[1].norm())
