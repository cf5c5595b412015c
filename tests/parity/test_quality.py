"""Perplexity with its ratio, and McNemar's test against scipy."""

from __future__ import annotations

import math
from unittest.mock import ANY

import pytest
import scipy.stats
import torch

from cloq_export.errors import ShapeError
from cloq_export.parity.power import drop_upper, ratio_interval
from cloq_export.parity.quality import Ratio, by_position, losses_of, mcnemar, perplexity_row


def pair(windows: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    hard = 3 + 0.5 * torch.randn(windows, generator=generator, dtype=torch.float64)
    return hard + 0.1 + 0.03 * torch.randn(windows, generator=generator, dtype=torch.float64), hard


def test_a_perplexity_has_its_ratio_with_an_interval() -> None:
    losses, reference = pair()
    row = perplexity_row("served", None, [-losses[:, None][n] for n in range(16)], [-each[None] for each in reference])
    lower, upper = ratio_interval(losses, reference)
    assert row.ratio == Ratio(pytest.approx(math.exp(float((losses - reference).mean()))), lower, upper, ANY)
    assert lower < row.ratio.ratio_to_float < upper
    assert 0 < row.ratio.ratio_smallest_rise < 0.1


def test_one_window_gives_no_interval() -> None:
    entry = perplexity_row("served", None, [torch.full((5,), -2.0)], [torch.full((5,), -1.0)])
    assert entry.ratio == Ratio(pytest.approx(math.e), None, None, None)
    assert entry.standard_error is None


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
    assert found.drop == (only_first - only_second) / len(first) == -mcnemar(second, first).drop
    assert found.drop < found.drop_upper == drop_upper(only_first, only_second, len(first))


def test_answers_to_other_problems_are_not_paired() -> None:
    with pytest.raises(ShapeError, match="3 and 2 answers cannot be paired"):
        mcnemar([True] * 3, [True] * 2)


def test_perplexity_by_position() -> None:
    windows = [-torch.arange(1.0, 7.0), -torch.arange(1.0, 7.0) - 1]
    found = by_position(windows, bins=3)
    assert found.position == (3, 5, 7)
    assert found.perplexity == pytest.approx((math.exp(2.0), math.exp(4.0), math.exp(6.0)))
    assert len(by_position(windows, bins=99).position) == 6
