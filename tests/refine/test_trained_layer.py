"""The written-out derivatives beside finite differences, and the start that nothing has moved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cloq_export.quantize.grid import fit_grid, round_to_grid
from cloq_export.refine import Rates, TrainedLayer
from cloq_export.types import LoraPair, QuantizedLayer, QuantSpec


def solved_layer(spec: QuantSpec, rank: int = 3, shape=(7, 48)) -> tuple[QuantizedLayer, LoraPair]:
    generator = torch.Generator().manual_seed(spec.bits)
    weight = torch.randn(shape, generator=generator) * 0.05
    scales, zeros = fit_grid(weight, spec)
    span = shape[1] // scales.shape[1]
    spread = (values.float().repeat_interleave(span, 1) for values in (scales, zeros))
    codes = round_to_grid(weight, *spread, spec.max_code).to(torch.uint8)
    pair = LoraPair(
        (torch.randn(rank, shape[1], generator=generator) * 0.02).half(),
        torch.randn(shape[0], rank, generator=generator).half(),
        alpha=2.0 * rank,
    )
    return QuantizedLayer(codes, scales, zeros, spec), pair


@pytest.mark.parametrize("trains_codes", [False, True])
@pytest.mark.parametrize(
    "spec", [QuantSpec(2, 16), QuantSpec(3, -1), QuantSpec(4, 24, symmetric=True), QuantSpec(8, 48)]
)
def test_the_start_is_what_was_given(spec, trains_codes) -> None:
    quantized, pair = solved_layer(spec)
    parameter = nn.Parameter(torch.full(quantized.codes.shape, torch.nan))
    # Far from what the codes say: they still are the start.
    weight = torch.randn(quantized.codes.shape, generator=torch.Generator().manual_seed(5)) if trains_codes else None
    layer = TrainedLayer(parameter, (quantized, pair), dtype=torch.float32, scales=True, weight=weight)
    layer.install()
    assert torch.equal(parameter.data, quantized.dequantize() + pair.product())
    stored, stored_pair = layer.result()
    assert stored_pair is not None
    for field in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(stored, field), getattr(quantized, field))
    assert torch.equal(stored_pair.lora_A, pair.lora_A)
    assert torch.equal(stored_pair.lora_B, pair.lora_B)
    assert stored_pair.alpha == pair.alpha


def test_derivatives_equal_finite_differences() -> None:
    """The loss is any smooth function of the served weight; sums are in float64, steps symmetric."""
    quantized, pair = solved_layer(QuantSpec(2, 16))
    shape = quantized.codes.shape
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    parts = {
        "log_scales": quantized.scales.double().log().unsqueeze(-1),
        "lora_A": pair.lora_A.double(),
        "lora_B": pair.lora_B.double(),
    }
    centred = (quantized.codes.double().view(7, -1, 16) - quantized.zeros.double().unsqueeze(-1)).requires_grad_(False)

    def served(values: dict[str, torch.Tensor]) -> torch.Tensor:
        quantized_part = (centred * values["log_scales"].exp()).view(shape)
        return quantized_part + pair.scaling * values["lora_B"] @ values["lora_A"]

    def loss(values: dict[str, torch.Tensor]) -> float:
        return float((served(values) * direction).sin().sum())

    gradient = (served(parts) * direction).cos() * direction
    parameter = nn.Parameter(torch.empty(shape))
    layer = TrainedLayer(parameter, (quantized, pair), dtype=torch.float32, scales=True)
    found = layer.derivatives(gradient.float())
    assert set(found) == set(parts)
    for name, part in parts.items():
        for position in range(0, part.numel(), 5):
            away = torch.zeros_like(part)
            away.view(-1)[position] = 1e-5
            up, down = ({**parts, name: part + sign * away} for sign in (1.0, -1.0))
            expected = (loss(up) - loss(down)) / 2e-5
            assert float(found[name].reshape(-1)[position]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_a_step_goes_downhill_and_stays_storable() -> None:
    quantized, pair = solved_layer(QuantSpec(2, 16))
    wanted = quantized.dequantize() * 1.05 + 0.9 * pair.product()
    parameter = nn.Parameter(torch.empty(quantized.codes.shape))
    layer = TrainedLayer(parameter, (quantized, pair), dtype=torch.float32, scales=True)
    layer.install()
    before = float((parameter.data - wanted).square().sum())
    for _ in range(20):
        layer.step(2.0 * (parameter.data - wanted), 1.0)
        layer.install()
    assert float((parameter.data - wanted).square().sum()) < 0.3 * before
    stored, stored_pair = layer.result()
    assert stored_pair is not None
    assert torch.equal(parameter.data, stored.dequantize() + stored_pair.product())  # trained on what is stored
    assert torch.equal(stored.codes, quantized.codes)
    assert torch.equal(stored.zeros, quantized.zeros)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_step_moves_the_outermost_weight_as_far_on_every_grid(bits: int) -> None:
    """By the scale, in distances of two codes; positions go by as much of the range."""
    weight, _, quantized = correlated_rows(bits=bits, width=16, rows=5)
    rates = Rates(scales=1e-2, adapter=0.0, codes=3e-2)
    layer = TrainedLayer(
        nn.Parameter(torch.empty(weight.shape)),
        (quantized, None),
        dtype=torch.float32,
        scales=True,
        weight=weight,
        rates=rates,
    )
    before = {name: tensor.clone() for name, tensor in layer.state().items()}
    layer.step(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)), 1.0)
    after = layer.state()
    outermost = quantized.spec.max_code * (after["log_scales"] - before["log_scales"]).abs()
    assert torch.allclose(outermost, torch.tensor(3e-2), rtol=1e-4)
    moved = (after["positions"] - before["positions"]).abs().max() * quantized.spec.max_code
    assert float(moved) == pytest.approx(9e-2, rel=1e-3)


def test_scales_stand_still_where_only_the_pair_is_trained() -> None:
    quantized, pair = solved_layer(QuantSpec(3, 16))
    parameter = nn.Parameter(torch.empty(quantized.codes.shape))
    layer = TrainedLayer(parameter, (quantized, pair), dtype=torch.float32, scales=False)
    layer.step(torch.ones(quantized.codes.shape), 1.0)
    stored, stored_pair = layer.result()
    assert torch.equal(stored.scales, quantized.scales)
    assert stored_pair is not None
    assert not torch.equal(stored_pair.lora_A, pair.lora_A)


def test_without_a_gradient_nothing_moves() -> None:
    """An expert without a token in the batch."""
    quantized, pair = solved_layer(QuantSpec(2, 16))
    parameter = nn.Parameter(torch.empty(quantized.codes.shape))
    layer = TrainedLayer(parameter, (quantized, pair), dtype=torch.float32, scales=True)
    layer.step(torch.zeros(quantized.codes.shape), 1.0)
    layer.install()
    assert torch.equal(parameter.data, quantized.dequantize() + pair.product())


def correlated_rows(bits: int, width: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, QuantizedLayer]:
    """Return W, H of correlated inputs, and W rounded to nearest."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(width, width, generator=generator) * 0.3 + torch.randn(width, 1, generator=generator)
    inputs = torch.randn(256, width, generator=generator) @ mixing
    weight = torch.randn(rows, width, generator=generator) * 0.05
    spec = QuantSpec(bits, width)
    scales, zeros = fit_grid(weight, spec)
    spread = (values.float().repeat_interleave(width, 1) for values in (scales, zeros))
    codes = round_to_grid(weight, *spread, spec.max_code).to(torch.uint8)
    return weight, inputs.t() @ inputs / 256, QuantizedLayer(codes, scales, zeros, spec)


def test_trained_codes_come_near_the_best_of_all_codes() -> None:
    """The oracle tries every row of codes: 4^8 of them, for the scales that stand."""
    weight, gram, start = correlated_rows(bits=2, width=8, rows=6)
    every = torch.cartesian_prod(*[torch.arange(4.0)] * 8)

    def errors(quantized: torch.Tensor) -> torch.Tensor:
        off = quantized - weight
        return (off @ gram * off).sum(-1)

    grids = zip(weight, start.scales.float(), start.zeros.float(), strict=True)
    offs = [(every - zero) * scale - row for row, scale, zero in grids]
    best = torch.stack([(off @ gram * off).sum(-1).min() for off in offs])
    parameter = nn.Parameter(torch.empty(weight.shape))
    rates = Rates(scales=0.0, adapter=0.0, codes=1e-2)
    layer = TrainedLayer(parameter, (start, None), dtype=torch.float32, scales=False, weight=weight, rates=rates)
    layer.install()
    reached = before = errors(parameter.data)
    for step in range(300):
        layer.step(2.0 * (parameter.data - weight) @ gram, 1.0 - step / 300)
        layer.install()
        reached = torch.minimum(reached, errors(parameter.data))
    stored = layer.result()[0]
    assert torch.equal(stored.dequantize(), parameter.data)
    assert torch.equal(stored.scales, start.scales)
    assert torch.equal(stored.zeros, start.zeros)
    assert bool((reached >= best * (1 - 1e-5)).all())
    assert float((reached - best).sum()) < 0.05 * float((before - best).sum())


def test_a_code_goes_straight_through_its_rounding_and_stays_in_its_range() -> None:
    quantized, _ = solved_layer(QuantSpec(3, 16))
    weight = quantized.dequantize()
    rates = Rates(scales=0.0, adapter=0.0, codes=0.25)
    parameter = nn.Parameter(torch.empty(weight.shape))
    layer = TrainedLayer(parameter, (quantized, None), dtype=torch.float32, scales=False, weight=weight, rates=rates)
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    expected = gradient.view(7, -1, 16) * quantized.scales.float().unsqueeze(-1)
    assert torch.equal(layer.derivatives(gradient)["positions"], expected)
    for _ in range(80):
        layer.step(torch.ones(weight.shape), 1.0)
    assert int(layer.result()[0].codes.max()) == 0
    # What has run against the end of the range turns around at once.
    for _ in range(120):
        layer.step(-torch.ones(weight.shape), 1.0)
    assert int(layer.result()[0].codes.min()) == 7


def test_what_was_kept_of_trained_codes_comes_back() -> None:
    weight, gram, start = correlated_rows(bits=2, width=16, rows=5)
    rates = Rates(scales=1e-2, adapter=0.0, codes=5e-2)

    def fresh() -> tuple[nn.Parameter, TrainedLayer]:
        parameter = nn.Parameter(torch.empty(weight.shape))
        layer = TrainedLayer(parameter, (start, None), dtype=torch.float32, scales=True, weight=weight, rates=rates)
        layer.install()
        return parameter, layer

    def train(parameter: nn.Parameter, layer: TrainedLayer, steps: int) -> None:
        for _ in range(steps):
            layer.step((parameter.data - weight) @ gram, 1.0)
            layer.install()

    parameter, layer = fresh()
    train(parameter, layer, 20)
    kept = {name: tensor.clone() for name, tensor in layer.state().items()}
    assert not torch.equal(layer.result()[0].codes, start.codes)
    other_parameter, other = fresh()
    other.restore(kept)
    other.install()
    for one, two in ((parameter, layer), (other_parameter, other)):
        train(one, two, 10)
    assert torch.equal(parameter.data, other_parameter.data)
    assert torch.equal(layer.result()[0].codes, other.result()[0].codes)
