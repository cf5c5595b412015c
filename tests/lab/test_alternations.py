"""LoftQ and LQ-LoRA against slow oracles."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cloq_export.lab.alternations import init_loftq, init_lq_lora
from cloq_export.quantize import QuantizeOptions, quantize_group
from cloq_export.types import QuantizedLayer, QuantSpec

SPEC = QuantSpec(2, 8, False)


def rounded(weight: torch.Tensor) -> QuantizedLayer:
    return quantize_group([weight], SPEC, None, QuantizeOptions(method="rtn", grid="minmax")).layers[0]


def a_weight(out_features: int, in_features: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(in_features, in_features, generator=generator)
    return torch.randn(out_features, in_features, generator=generator) @ mixed / in_features


def slow_round(weight: np.ndarray) -> np.ndarray:
    """Round group by group, each on the grid from its smallest to its largest entry with zero in between."""
    result = np.empty_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], SPEC.group_size):
            group = weight[row, start : start + SPEC.group_size]
            low, high = min(group.min(), 0.0), max(group.max(), 0.0)
            scale = float(np.float16(max((high - low) / 3, 2.0**-14)))
            zero = np.clip(np.round(-low / scale), 0, 3)
            codes = np.clip(np.round(group / scale) + zero, 0, 3)
            result[row, start : start + SPEC.group_size] = scale * (codes - zero)
    return result


def slow_loftq(weight: np.ndarray, rank: int, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    product = np.zeros_like(weight)
    for _ in range(iterations):
        codes = slow_round(weight - product)
        u, s, vt = np.linalg.svd(weight - codes)
        product = sum(s[i] * np.outer(u[:, i], vt[i]) for i in range(rank))
    return codes, product


@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("shape", [(12, 24), (40, 16)])
def test_loftq_is_the_alternation_of_its_paper(shape: tuple[int, int], iterations: int) -> None:
    weight = a_weight(*shape)
    layer, pair = init_loftq(weight, rounded, 4, iterations=iterations, dtype=torch.float32)
    codes, product = slow_loftq(weight.double().numpy(), 4, iterations)
    np.testing.assert_allclose(layer.dequantize().numpy(), codes, atol=1e-5)
    np.testing.assert_allclose(pair.product().numpy(), product, atol=1e-4)


def slow_lq_lora(weight: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    codes, kept, smallest = np.zeros_like(weight), None, np.inf
    while True:
        u, s, vt = np.linalg.svd(weight - codes)
        product = sum(s[i] * np.outer(u[:, i], vt[i]) for i in range(rank))
        codes = slow_round(weight - product)
        error = np.linalg.norm(weight - codes - product)
        if error >= smallest:
            return kept  # type: ignore[return-value]
        smallest, kept = error, (codes, product)


@pytest.mark.parametrize("shape", [(12, 24), (40, 16)])
def test_lq_lora_is_the_alternation_of_its_paper(shape: tuple[int, int]) -> None:
    weight = a_weight(*shape)
    layer, pair = init_lq_lora(weight, rounded, 4, dtype=torch.float32)
    codes, product = slow_lq_lora(weight.double().numpy(), 4)
    np.testing.assert_allclose(layer.dequantize().numpy(), codes, atol=1e-5)
    np.testing.assert_allclose(pair.product().numpy(), product, atol=1e-4)
    first, of_first = init_lq_lora(weight, rounded, 4, iterations=1, dtype=torch.float32)
    error = (weight - layer.dequantize() - pair.product()).norm()
    assert error <= (weight - first.dequantize() - of_first.product()).norm()


def test_alternating_helps_the_weight_error() -> None:
    weight = a_weight(40, 32)

    def error(iterations: int) -> float:
        layer, pair = init_loftq(weight, rounded, 6, iterations=iterations, dtype=torch.float32)
        return float((weight - layer.dequantize() - pair.product()).norm())

    assert error(5) < error(1) < float((weight - rounded(weight).dequantize()).norm())
