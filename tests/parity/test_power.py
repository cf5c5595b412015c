"""Confidence limits of a drop and of a ratio: against slow searches, and how often they hold what they promise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch

from cloq_export.parity.power import (
    CHANCE,
    FALSE_ALARM,
    UNSEEN,
    chance_limit,
    drop_upper,
    false_alarm,
    questions_needed,
    ratio_interval,
    smallest_rise,
)


def likeliest_won(lost: int, won: int, questions: int, drop: float) -> float:
    """Return the share of questions won that is most likely under a drop, by a search of the likelihood."""

    def surprise(q: float) -> float:
        shares = (q + drop, q, 1 - 2 * q - drop)
        counts = (lost, won, questions - lost - won)
        return -sum(count * math.log(max(share, 1e-300)) for count, share in zip(counts, shares, strict=True) if count)

    bounds = (max(0.0, -drop), (1 - drop) / 2)
    return float(scipy.optimize.minimize_scalar(surprise, bounds=bounds, method="bounded", options={"xatol": 1e-10}).x)


@pytest.mark.parametrize(("lost", "won", "questions"), [(7, 0, 100), (12, 5, 100), (0, 0, 20), (3, 9, 50), (1, 1, 8)])
def test_the_limit_is_the_drop_that_the_score_test_just_allows(lost: int, won: int, questions: int) -> None:
    def score(drop: float) -> float:
        q = likeliest_won(lost, won, questions, drop)
        spread = math.sqrt(questions * (2 * q + drop * (1 - drop)))
        return (lost - won - questions * drop) / spread + scipy.stats.norm.isf(UNSEEN)

    wanted = scipy.optimize.brentq(score, (lost - won) / questions + 1e-9, 1 - 1e-9)
    assert float(drop_upper(lost, won, questions)) == pytest.approx(wanted, abs=1e-5)


def test_the_limits_of_many_cases_are_those_of_each() -> None:
    cases = np.array(list(itertools.product(range(5), range(5))))
    alone = [float(drop_upper(int(lost), int(won), 30)) for lost, won in cases]
    assert drop_upper(cases[:, 0], cases[:, 1], 30).tolist() == alone
    assert float(drop_upper(0, 0, 100)) == pytest.approx(1.6449**2 / (100 + 1.6449**2), rel=1e-4)
    assert float(drop_upper(5, 0, 5)) == 1.0


@pytest.mark.parametrize(("questions", "loss", "chance"), [(40, 0.1, 0.1), (100, 0.1075, 0.05), (100, 0.07, 0.2)])
def test_a_drop_passes_below_its_own_size_as_rarely_as_promised(questions: int, loss: float, chance: float) -> None:
    generator = np.random.default_rng(0)
    lost, won, _ = generator.multinomial(questions, (chance / 2 + loss, chance / 2, 1 - chance - loss), 20_000).T
    unseen = float(np.mean(drop_upper(lost, won, questions) <= loss))
    assert unseen < UNSEEN + 0.015  # the score test is not exact: it keeps its level on the average


@pytest.mark.parametrize("questions", [8, 30, 100, 400])
def test_a_model_that_loses_nothing_keeps_the_limit(questions: int) -> None:
    limit, chance = chance_limit(questions, 0.05), 0.05
    generator = np.random.default_rng(1)
    lost, won, _ = generator.multinomial(questions, (chance / 2, chance / 2, 1 - chance), 20_000).T
    missed = float(np.mean(drop_upper(lost, won, questions) > limit))
    assert missed <= FALSE_ALARM + 0.003
    assert missed == pytest.approx(false_alarm(questions, limit, chance), abs=0.003)
    assert drop_upper(0, 0, questions) < limit


def test_seven_points_of_a_hundred_questions_are_beyond_the_limit() -> None:
    for chance in (CHANCE["float32"], 0.07):
        limit = chance_limit(100, chance)
        assert scipy.stats.binomtest(7, 7).pvalue > 0.01  # which McNemar's test lets pass
        assert all(drop_upper(7 + won, won, 100) > limit for won in range(20))
    assert drop_upper(2, 2, 100) < chance_limit(100, 0.05)


@pytest.mark.parametrize("loss", [0.2, 0.1, 0.05])
def test_as_many_questions_as_a_loss_needs(loss: float) -> None:
    needed = questions_needed(loss, 0.05)
    assert chance_limit(needed, 0.05) <= loss < chance_limit(needed - 1, 0.05)


@pytest.mark.parametrize("windows", [3, 4, 8])
def test_the_interval_of_few_windows_covers_what_it_promises(windows: int) -> None:
    generator = torch.Generator().manual_seed(windows)
    held = plain = 0
    for _ in range(1000):
        d = 0.1 + 0.02 * torch.randn(windows, generator=generator, dtype=torch.float64)
        lower, upper = ratio_interval(d, torch.zeros(windows))
        held += lower <= math.exp(0.1) <= upper
        drawn = d[torch.randint(windows, (200, windows), generator=generator)].mean(1)
        low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64))
        plain += bool(low <= 0.1 <= high)
    assert held / 1000 == pytest.approx(0.95, abs=0.02)
    assert plain / 1000 < 0.92  # windows drawn with replacement


def test_the_interval_is_that_of_scipy() -> None:
    generator = torch.Generator().manual_seed(2)
    hard = 3 + 0.5 * torch.randn(16, generator=generator, dtype=torch.float64)
    losses = hard + 0.1 + 0.03 * torch.randn(16, generator=generator, dtype=torch.float64)
    wanted = scipy.stats.ttest_rel(losses.numpy(), hard.numpy()).confidence_interval(0.95)
    assert ratio_interval(losses, hard) == pytest.approx((math.exp(wanted.low), math.exp(wanted.high)))
    # Pairing removes how hard windows are.
    lower, upper = ratio_interval(losses, hard)
    assert lower < math.exp(0.1) < upper < lower + 0.1
    assert ratio_interval(hard, hard) == (1.0, 1.0)
    assert all(math.isnan(bound) for bound in ratio_interval(torch.ones(1), torch.ones(1)))


def test_the_smallest_rise_is_found_as_often_as_promised() -> None:
    generator = torch.Generator().manual_seed(3)
    spread, windows = 0.02, 16
    known = torch.randn(windows, generator=generator, dtype=torch.float64)
    known = spread * (known - known.mean()) / known.std()
    found = smallest_rise(known, torch.zeros(windows))
    assert found.loss is not None
    raised = 0
    for _ in range(2000):
        d = math.log1p(found.loss) + spread * torch.randn(windows, generator=generator, dtype=torch.float64)
        raised += ratio_interval(d, torch.zeros(windows))[0] > 1
    assert raised / 2000 == pytest.approx(1 - found.beta, abs=0.05)
    assert smallest_rise(torch.ones(1), torch.ones(1)).loss is None
