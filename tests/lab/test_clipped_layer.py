"""ApiQ's quantizer beside its formulas, and that what it gives can be stored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cloq_export.lab.clipped_layer import ClippedLayer, StoredForm
from cloq_export.types import QuantSpec


def clipped(weight: torch.Tensor, spec: QuantSpec, rank: int = 2) -> ClippedLayer:
    parameter = nn.Parameter(torch.full(weight.shape, torch.nan))
    return ClippedLayer(parameter, weight, StoredForm(spec, rank, torch.float16), dtype=torch.float32, seed=4)


def draw(shape=(6, 40), seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_start_rounds_on_nearly_the_whole_range(symmetric: bool) -> None:
    weight, spec = draw(), QuantSpec(3, 8, symmetric=symmetric)
    layer = clipped(weight, spec)
    layer.install()
    quantized, pair = layer.result()
    assert pair is not None
    share = 1.0 / (1.0 + torch.exp(torch.tensor(-4.0)))
    for row in range(6):
        for group in range(5):
            values = weight[row, 8 * group : 8 * group + 8]
            low, high = share * values.min().clamp(max=0), share * values.max().clamp(min=0)
            reach = 2 * torch.maximum(-low, high) if symmetric else high - low
            scale = (reach / 7).half().float()
            zero = torch.tensor(4.0) if symmetric else (-low / scale).round().clamp(0, 7)
            assert quantized.scales[row, group].float() == scale
            assert quantized.zeros[row, group] == zero
            codes = ((values / scale).round() + zero).clamp(0, 7)
            assert torch.equal(quantized.codes[row, 8 * group : 8 * group + 8].float(), codes)
    assert torch.equal(pair.lora_B, torch.zeros(6, 2, dtype=torch.float16))
    assert torch.equal(layer.parameter.data, quantized.dequantize() + pair.product())


@pytest.mark.parametrize("bits", [2, 4])
def test_groups_of_one_sign_and_of_zeros_can_be_stored(bits: int) -> None:
    weight = torch.cat([draw(seed=1).abs() + 0.5, -draw(seed=2).abs() - 0.5, torch.zeros(1, 40)])
    layer = clipped(weight, QuantSpec(bits, -1))
    layer.install()
    for _ in range(5):
        layer.step(layer.parameter.data - weight, 1.0)
        layer.install()
    quantized, pair = layer.result()
    assert pair is not None
    assert torch.isfinite(layer.parameter.data).all()
    assert torch.equal(layer.parameter.data, quantized.dequantize() + pair.product())


def test_training_fits_ranges_and_pair() -> None:
    weight = draw((16, 64), seed=3)
    weight[:, ::16] *= 6.0  # extremes that are better cut
    errors = {}
    for rank in (0, 4):
        layer = clipped(weight, QuantSpec(2, 16), rank)
        layer.install()
        errors[rank] = [float((layer.parameter.data - weight).square().sum())]
        for _ in range(150):
            layer.step(2.0 * (layer.parameter.data - weight), 1.0)
            layer.install()
        errors[rank].append(float((layer.parameter.data - weight).square().sum()))
    assert errors[0][1] < 0.97 * errors[0][0]  # the rates are ApiQ's, meant for thousands of steps
    assert errors[4][1] < 0.97 * errors[0][1]
    assert clipped(weight, QuantSpec(2, 16), 0).result()[1] is None
