"""KL divergence of distributions against a loop over the vocabulary, and its bound where part of it is known."""

from __future__ import annotations

import math

import pytest
import torch

from cloq_export.engines.protocol import TokenDistributions
from cloq_export.errors import ShapeError
from cloq_export.parity.divergence import (
    EXACT,
    LOWER_BOUND,
    WatchedDivergences,
    count_compared,
    divergences,
    mean_probability_factor,
    summarize_divergences,
    windows_compared,
)


def distributions(seed: int, places: int = 40, vocabulary: int = 60, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(places, vocabulary, generator=generator)).log_softmax(-1)


def slow_divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    return sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))


def top(logprobs: torch.Tensor, count: int) -> TokenDistributions:
    best = logprobs.topk(count, dim=-1)
    return TokenDistributions(best.values, best.indices)


def test_the_divergence_is_that_of_the_definition() -> None:
    p, q = distributions(0), distributions(1)
    found = divergences(p, TokenDistributions(q))
    wanted = [slow_divergence(a, b) for a, b in zip(p, q, strict=True)]
    assert found.kl.tolist() == pytest.approx(wanted, rel=1e-5)
    assert found.same_best.tolist() == [a.argmax() == b.argmax() for a, b in zip(p, q, strict=True)]
    row = summarize_divergences([found])
    ordered = sorted(found.kl.tolist())
    # 39.6 of 40 tokens: the smallest value that 99 % do not exceed is the largest one.
    assert (row.kl_mean, row.kl_quantile_99, row.kl_max) == pytest.approx((sum(ordered) / 40, ordered[-1], ordered[-1]))
    assert (row.tokens, row.estimate, row.known_tokens) == (40, EXACT, 60)


def test_nothing_is_far_from_itself_and_rounding_makes_nothing_negative() -> None:
    p = distributions(2, spread=20.0)
    same = divergences(p, TokenDistributions(p))
    assert float(same.kl.max()) < 1e-6
    assert bool(same.same_best.all())
    near = divergences(p, TokenDistributions((p + 1e-4 * distributions(3)).log_softmax(-1)))
    assert float(near.kl.min()) >= 0


@pytest.mark.parametrize("seed", range(4))
def test_some_tokens_give_a_lower_bound_that_grows_with_their_number(seed: int) -> None:
    p, q = distributions(seed, spread=1.0), distributions(seed + 10, spread=1.0)
    exact = divergences(p, TokenDistributions(q)).kl
    before = torch.zeros_like(exact)
    for count in (1, 5, 20, 40, 59):
        found = divergences(p, top(q, count))
        assert bool((found.kl <= exact + 1e-5).all())
        assert bool((found.kl >= before - 1e-2).all())
        assert found.same_best.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
        before = found.kl
    # All but one token: nothing is merged, and the bound gives away what float32 does not tell of the last one.
    assert torch.allclose(before, exact, atol=1e-2)
    row = summarize_divergences([divergences(p, top(q, 20))])
    assert (row.estimate, row.known_tokens) == (LOWER_BOUND, 20)


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ShapeError, match=r"distributions of \(40, 50\) and \(40, 60\)"):
        divergences(distributions(0), TokenDistributions(distributions(1, vocabulary=50)))
    broken = distributions(1)
    broken[3] = math.nan
    row = summarize_divergences([divergences(distributions(0), TokenDistributions(broken))])
    assert row.kl_mean is row.kl_quantile_99 is row.kl_max is None


def test_a_token_without_probability() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0]]).log()
    q = torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert float(divergences(p, TokenDistributions(q)).kl) == pytest.approx(math.log(2))
    assert math.isinf(float(divergences(q, TokenDistributions(p)).kl))


def test_the_mean_factor_of_a_probability() -> None:
    measured, expected = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.0, -2.0])
    assert mean_probability_factor(measured, expected) == pytest.approx((math.exp(0.5) + 1 + math.e) / 3)
    assert mean_probability_factor(expected, expected) == 1.0
    assert mean_probability_factor(torch.tensor([math.nan]), torch.tensor([0.0])) is None


def test_only_as_many_windows_as_memory_allows() -> None:
    windows = [[1] * 512] * 16
    assert len(windows_compared(windows, 100)) == 4
    assert len(windows_compared(windows, 128_000)) == 2
    assert len(windows_compared(windows, 10_000_000)) == 1
    assert windows_compared([], 100) == []
    assert count_compared(4096, 100) == 1


def test_models_that_come_one_after_the_other() -> None:
    watched = WatchedDivergences("float")
    p, q, targets = distributions(0), distributions(1), torch.arange(40)
    watched.watch("quantized")(0, q, targets)
    assert watched.of("quantized") is None  # the yardstick had not come
    p, q = p.log_softmax(-1), q.log_softmax(-1)  # as logits they are made log-probabilities once more
    watched.watch("float")(0, distributions(0), targets)
    watched.watch("quantized")(0, distributions(1), targets)
    found = watched.of("quantized")
    assert found is not None
    assert found[0] == summarize_divergences([divergences(p, TokenDistributions(q))])
    assert found[1] == mean_probability_factor(q[targets, targets], p[targets, targets])
    assert watched.of("float") is None
