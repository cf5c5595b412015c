"""Bootstrap intervals and McNemar's test against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from cloq_export.errors import ShapeError
from cloq_export.parity.quality import bootstrap_ratio, by_position, losses_of, mcnemar, perplexity_row


def pair(windows: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    hard = 3 + 0.5 * torch.randn(windows, generator=generator, dtype=torch.float64)
    return hard + 0.1 + 0.03 * torch.randn(windows, generator=generator, dtype=torch.float64), hard


def test_the_interval_is_that_of_scipy() -> None:
    losses, reference = pair()
    lower, upper = bootstrap_ratio(losses, reference, seed=1)
    other = scipy.stats.bootstrap(
        ((losses - reference).numpy(),), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert lower == pytest.approx(math.exp(other.low), rel=1e-3)
    assert upper == pytest.approx(math.exp(other.high), rel=1e-3)
    assert bootstrap_ratio(losses, reference, seed=1) == (lower, upper)
    assert bootstrap_ratio(losses, reference, seed=2) != (lower, upper)


def test_pairing_removes_how_hard_windows_are() -> None:
    losses, reference = pair()
    lower, upper = bootstrap_ratio(losses, reference)
    assert lower < math.exp(0.1) < upper < lower + 0.1
    assert bootstrap_ratio(reference, reference) == (1.0, 1.0)


def test_one_window_gives_no_interval() -> None:
    assert all(math.isnan(bound) for bound in bootstrap_ratio(torch.ones(1), torch.ones(1)))
    with pytest.raises(ShapeError, match="cannot be paired"):
        bootstrap_ratio(torch.ones(3), torch.ones(4))
    entry = perplexity_row("served", None, [torch.full((5,), -2.0)], [torch.full((5,), -1.0)])
    assert entry.ratio.ratio_to_float == pytest.approx(math.e)
    assert entry.ratio.ratio_lower is entry.standard_error is None


def test_losses_are_summed_in_double_precision() -> None:
    values = torch.full((100_000,), -0.1)
    assert float(losses_of([values])[0]) == float(torch.tensor(0.1).double())


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (3, 11), (40, 25), (600, 700)])
def test_the_exact_test_is_that_of_scipy(only_first: int, only_second: int) -> None:
    first = [True] * only_first + [False] * only_second + [True, False] * 3
    second = [False] * only_first + [True] * only_second + [True, False] * 3
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second) == (only_first, only_second)
    discordant = only_first + only_second
    wanted = scipy.stats.binomtest(only_first, discordant, 0.5).pvalue if discordant else 1.0
    assert found.p_value == pytest.approx(wanted, rel=1e-9)
    assert mcnemar(second, first).p_value == found.p_value


def test_answers_to_other_problems_are_not_paired() -> None:
    with pytest.raises(ShapeError, match="3 and 2 answers cannot be paired"):
        mcnemar([True] * 3, [True] * 2)


def test_perplexity_by_position() -> None:
    windows = [-torch.arange(1.0, 7.0), -torch.arange(1.0, 7.0) - 1]
    found = by_position(windows, bins=3)
    assert found.position == (3, 5, 7)
    assert found.perplexity == pytest.approx((math.exp(2.0), math.exp(4.0), math.exp(6.0)))
    assert len(by_position(windows, bins=99).position) == 6
