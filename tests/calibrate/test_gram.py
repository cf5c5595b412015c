"""The Gram accumulator against float64, on correlated activations with outlier channels as real models have them."""

from __future__ import annotations

import pytest
import torch

from cloq_export.calibrate.gram import GramAccumulator
from cloq_export.errors import NonFiniteError, ShapeError


def correlated(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    scale = torch.ones(width)
    scale[:: max(1, width // 3)] = 30.0
    return (torch.randn(tokens, width, generator=generator) @ mix) * scale + 0.3


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("width", [1, 7, 63, 64, 65, 200, 513])
@pytest.mark.parametrize("weighting", ["none", "inverse_norm"])
def test_gram_equals_float64(width: int, weighting: str) -> None:
    batches = [correlated(n, width, seed) for seed, n in enumerate((300, 1, 257))]
    sums = GramAccumulator(width, weighting=weighting)
    for batch in batches:
        sums.add(batch)
    x = torch.cat(batches).double()
    w = 1 / x.norm(dim=1) if weighting == "inverse_norm" else torch.ones(len(x), dtype=torch.float64)
    stats = sums.stats()
    assert stats.gram.dtype == torch.float32
    assert relative_error(stats.gram, (x * w[:, None]).T @ x) < 1e-6
    assert torch.equal(stats.gram, stats.gram.T)
    assert stats.tokens == 558
    assert stats.drift is None


@pytest.mark.parametrize("weighting", ["none", "inverse_norm"])
def test_drift_has_the_layers_own_input_on_the_left(weighting: str) -> None:
    x, f = correlated(400, 96, 1), correlated(400, 96, 2)
    sums = GramAccumulator(96, weighting=weighting, drift=True)
    sums.add(x[:150], f[:150])
    sums.add(x[150:], f[150:])
    stats = sums.stats()
    w = 1 / x.double().norm(dim=1) if weighting == "inverse_norm" else torch.ones(400, dtype=torch.float64)
    expected = (x.double() * w[:, None]).T @ (f - x).double()
    assert stats.drift is not None
    # Both operands may be rounded to bfloat16 (relative 2^-9 each), the sums are not.
    assert relative_error(stats.drift, expected) < 2.0**-8
    assert relative_error(stats.drift, expected.T) > 0.05


def test_drift_of_equal_streams_is_exactly_zero() -> None:
    x = correlated(400, 96)
    sums = GramAccumulator(96, drift=True)
    sums.add(x, x.clone())
    drift = sums.stats().drift
    assert drift is not None
    assert not drift.any()


def test_rounded_inputs_are_summed_as_the_layers_multiply_them_on_any_processor() -> None:
    x = correlated(300, 96)
    sums = GramAccumulator(96, rounded=True)
    sums.add(x)
    taken = x.to(torch.bfloat16).double()
    assert relative_error(sums.stats().gram, taken.T @ taken) < 1e-6
    assert relative_error(sums.stats().gram, x.double().T @ x.double()) > 1e-4


def test_given_weights_multiply_the_weighting() -> None:
    x = correlated(50, 40)
    weights = torch.rand(2, 25, generator=torch.Generator().manual_seed(3))
    sums = GramAccumulator(40, weighting="inverse_norm")
    sums.add(x.view(2, 25, 40), weights=weights)
    w = weights.view(-1).double() / x.double().norm(dim=1)
    assert relative_error(sums.stats().gram, (x.double() * w[:, None]).T @ x.double()) < 1e-6


def test_tokens_of_zeros_are_counted_and_add_nothing() -> None:
    x = correlated(20, 16)
    x[5] = 0
    sums = GramAccumulator(16, weighting="inverse_norm")
    sums.add(x)
    stats = sums.stats()
    assert stats.tokens == 20
    assert bool(torch.isfinite(stats.gram).all())


def test_no_token_gives_zeros() -> None:
    sums = GramAccumulator(8)
    sums.add(torch.empty(0, 8))
    stats = sums.stats()
    assert stats.tokens == 0
    assert not stats.gram.any()


@pytest.mark.parametrize("ambient", ["autocast", "medium"])
def test_enclosing_reduced_precision_does_not_reach_the_sums(ambient: str) -> None:
    x, f = correlated(900, 160, 1), correlated(900, 160, 2)
    plain = GramAccumulator(160, drift=True)
    plain.add(x, f)
    guarded = GramAccumulator(160, drift=True)
    before = torch.get_float32_matmul_precision()
    try:
        if ambient == "medium":
            torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16, enabled=ambient == "autocast"):
            guarded.add(x, f)
        assert torch.get_float32_matmul_precision() == ("medium" if ambient == "medium" else before)
    finally:
        torch.set_float32_matmul_precision(before)
    one, other = plain.stats(), guarded.stats()
    assert torch.equal(one.gram, other.gram)
    assert one.drift is not None
    assert other.drift is not None
    assert torch.equal(one.drift, other.drift)
    # What autocast would have done: a Gram matrix that no Cholesky takes, and one that ours does.
    torch.linalg.cholesky(other.gram.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighting", ["none", "inverse_norm"])
def test_half_precision_inputs_are_summed_without_further_rounding(dtype: torch.dtype, weighting: str) -> None:
    x = correlated(700, 130).to(dtype)
    sums = GramAccumulator(130, weighting=weighting)
    sums.add(x)
    d = x.double()
    w = 1 / d.norm(dim=1) if weighting == "inverse_norm" else torch.ones(700, dtype=torch.float64)
    assert relative_error(sums.stats().gram, (d * w[:, None]).T @ d) < 1e-6


def test_batches_may_come_in_any_shape_and_size() -> None:
    x = correlated(240, 48)
    whole, pieces = (GramAccumulator(48, weighting="inverse_norm") for _ in range(2))
    whole.add(x.view(4, 60, 48))
    for piece in x.flip(0).split(7):
        pieces.add(piece)
    assert relative_error(pieces.stats().gram, whole.stats().gram.double()) < 1e-6
    assert pieces.tokens == whole.tokens == 240


def test_inputs_are_left_as_they_are() -> None:
    x = correlated(30, 24)
    kept = x.clone()
    sums = GramAccumulator(24, weighting="inverse_norm", drift=True)
    sums.add(x, x)
    assert torch.equal(x, kept)


def test_strided_and_gradient_carrying_inputs() -> None:
    x = correlated(60, 80)[:, ::2].requires_grad_()
    sums = GramAccumulator(40)
    sums.add(x)
    gram = sums.stats().gram
    assert not gram.requires_grad
    assert relative_error(gram, x.detach().double().T @ x.detach().double()) < 1e-6


def test_stats_do_not_end_the_accumulation() -> None:
    x = correlated(60, 40)
    sums = GramAccumulator(40)
    sums.add(x[:30])
    first = sums.stats()
    kept = first.gram.clone()
    sums.add(x[30:])
    assert torch.equal(first.gram, kept)
    assert relative_error(sums.stats().gram, x.double().T @ x.double()) < 1e-6


def test_non_finite_inputs_are_named() -> None:
    sums = GramAccumulator(8)
    x = torch.ones(4, 8)
    x[2, 3] = float("nan")
    sums.add(x)
    with pytest.raises(NonFiniteError, match="Gram matrix holds NaN or Inf"):
        sums.stats()


def test_wrong_shapes_are_refused() -> None:
    x = torch.ones(4, 8)
    with pytest.raises(ShapeError, match=r"takes \(\.\.\., 9\)"):
        GramAccumulator(9).add(x)
    with pytest.raises(ShapeError, match="float model's inputs are missing"):
        GramAccumulator(8, drift=True).add(x)
    with pytest.raises(ShapeError, match="create it with drift=True"):
        GramAccumulator(8).add(x, x)
    with pytest.raises(ShapeError, match="same tokens"):
        GramAccumulator(8, drift=True).add(x, x[:2])
    with pytest.raises(ShapeError, match=r"token weights have shape \(3,\)"):
        GramAccumulator(8).add(x, weights=torch.ones(3))
