"""How small a loss a gate could have seen: limits on a loss of accuracy, and how many questions they need.

Two models answer the same n questions; b of them the first alone answers right, c the second alone. The drop is
`(b - c) / n`, and the gate bounds its upper confidence limit: a drop as large as the limit then passes with a
probability of at most alpha, regardless of the p-value of a test of equality.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import torch
from scipy.stats import binom, norm, t

from cloq_export.parity.plain import Result

# A drop of the limit passes unseen with this probability.
UNSEEN = 0.05
# A model that loses nothing misses the gate with this probability.
FALSE_ALARM = 0.01
# Questions that a model which loses nothing answers otherwise by chance: rounding turns near-ties around.
CHANCE: Mapping[str, float] = {"float32": 0.05}
CHANCE_HALF = 0.07
# Of the interval of a perplexity ratio, both ends together, and of what is said of it.
LEVEL = 0.95
RATIO_UNSEEN = 0.2
# Bits of a confidence limit; more do not fit into float64.
_HALVINGS = 55
# Probability of cases that are too rare to be counted, which count as beyond any limit.
_LEFT_OUT = 1e-5


@dataclasses.dataclass(frozen=True)
class SmallestLoss(Result):
    """The smallest loss that a gate could have seen.

    Args:
        loss: a share of the questions, or a relative rise of perplexity; None where none could be seen.
        alpha: probability with which the gate is missed though nothing is lost; None where nothing tells how
            differently the two models answer.
        beta: probability with which a loss of this size passes unseen.
    """

    loss: float | None
    alpha: float | None
    beta: float


def drop_upper(lost: int | np.ndarray, won: int | np.ndarray, questions: int, unseen: float = UNSEEN) -> np.ndarray:
    """Return the upper confidence limit of a drop of accuracy, paired by question.

    The limit is the largest drop D that the score test does not refuse (Tango, Statistics in Medicine 17, 1998):

        (b - c - n D) / sqrt(n (2 q + D (1 - D))) = -z,      q = (sqrt(B^2 - 8 n C) - B) / (4 n),
        B = (2 n - b + c) D - b - c,      C = -c D (1 - D)

    with b lost, c won, z the quantile of 1 - `unseen`, and q the most likely share of questions won under D.

    Args:
        lost: b, a number or an array of them.
        won: c, likewise.
        questions: n.
        unseen: one-sided, in 0..1.

    Returns:
        ndarray: float64, from the drop that was measured to 1.
    """
    b, c = np.asarray(lost, dtype=np.float64), np.asarray(won, dtype=np.float64)
    z = norm.isf(unseen)
    low, high = np.broadcast_arrays((b - c) / questions, np.float64(1.0))
    low, high = low.copy(), high.copy()
    for _ in range(_HALVINGS):
        drop = (low + high) / 2
        linear = (2 * questions - b + c) * drop - b - c
        root = np.sqrt(np.maximum(linear**2 + 8 * questions * c * drop * (1 - drop), 0))
        q = np.maximum(root - linear, 0) / (4 * questions)
        spread = np.sqrt(questions * np.maximum(2 * q + drop * (1 - drop), 0))
        inside = b - c - questions * drop >= -z * spread
        low, high = np.where(inside, drop, low), np.where(inside, high, drop)
    return high


def chance_limit(questions: int, chance: float) -> float:
    """Return the limit on `drop_upper` that a model which loses nothing keeps, but for false alarms.

    Of n questions each is answered otherwise with probability `chance`, and lost or won alike; the limit is the
    smallest value that `drop_upper` exceeds with probability `FALSE_ALARM` at most.

    Args:
        questions: n.
        chance: share of the questions.
    """
    uppers, weights = _by_chance(questions, chance)
    order = np.argsort(-uppers, kind="stable")
    beyond = np.cumsum(weights[order]) + _LEFT_OUT
    place = int(np.searchsorted(beyond, FALSE_ALARM, side="right"))
    return float(uppers[order][min(place, len(order) - 1)])


def false_alarm(questions: int, limit: float, chance: float) -> float:
    """Return how probably a model that loses nothing misses a limit on `drop_upper`; arguments as in `chance_limit`."""
    uppers, weights = _by_chance(questions, chance)
    return min(1.0, float(weights[uppers > limit].sum()) + _LEFT_OUT)


def questions_needed(loss: float, chance: float) -> int:
    """Return how many questions are needed for a limit: a model that loses nothing must keep it.

    Args:
        loss: the limit on `drop_upper`, in 0..1 without the ends.
        chance: as for `chance_limit`.

    Returns:
        int: the smallest number from which on `chance_limit` is at most `loss`, found by halving.
    """
    # As many as the normal distribution asks for, and from there to both sides.
    many = max(2, math.ceil(chance * ((norm.isf(UNSEEN) + norm.isf(FALSE_ALARM)) / loss) ** 2))
    while chance_limit(many, chance) > loss:
        many *= 2
    few = max(1, many // 4)
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if chance_limit(middle, chance) <= loss else (middle, many)
    return many


def ratio_interval(losses: torch.Tensor, reference: torch.Tensor, level: float = LEVEL) -> tuple[float, float]:
    """Return Student's interval of the ratio of two perplexities on the same windows.

    `exp(mean d -+ t s / sqrt(n))`, d = `losses - reference` window by window, s its standard deviation, t the
    quantile of Student's distribution with n - 1 degrees of freedom. Both models keep their window together.
    Drawing windows with replacement covers too little where they are few (`tests/parity/test_power.py`).

    Args:
        losses: (windows,) mean negative log-likelihood of the model in question.
        reference: (windows,) of the model it is compared with.
        level: of the interval.

    Returns:
        (lower, upper); NaN for less than two windows.
    """
    difference = (losses - reference).to(torch.float64)
    count = difference.numel()
    if count < 2:
        return math.nan, math.nan
    half = float(t.isf((1 - level) / 2, count - 1)) * float(difference.std()) / math.sqrt(count)
    mean = float(difference.mean())
    return _exp(mean - half), _exp(mean + half)


def smallest_rise(losses: torch.Tensor, reference: torch.Tensor) -> SmallestLoss:
    """Return the smallest relative rise of a perplexity ratio that the windows tell from chance.

    `exp((t_alpha + t_beta) s / sqrt(n)) - 1`, s and t as in `ratio_interval`.

    Args:
        losses: (windows,) as in `ratio_interval`.
        reference: (windows,) as in `ratio_interval`.
    """
    alpha, count = (1 - LEVEL) / 2, losses.numel()
    if count < 2:
        return SmallestLoss(None, alpha, RATIO_UNSEEN)
    error = float((losses - reference).to(torch.float64).std()) / math.sqrt(count)
    quantiles = float(t.isf(alpha, count - 1)) + float(t.isf(RATIO_UNSEEN, count - 1))
    rise = _exp(quantiles * error) - 1
    return SmallestLoss(rise if math.isfinite(rise) else None, alpha, RATIO_UNSEEN)


def _by_chance(questions: int, chance: float) -> tuple[np.ndarray, np.ndarray]:
    """Return `drop_upper` of what chance alone may lose and win, and how probable each is, both (cases,)."""
    least = _LEFT_OUT / 2
    differing = np.arange(min(int(binom.isf(least, questions, chance)) + 1, questions) + 1)
    # Rows are how many answers differ, columns how many of them are lost.
    weights = binom.pmf(differing[:, None], questions, chance) * binom.pmf(differing[None, :], differing[:, None], 0.5)
    numbers, lost = np.nonzero(weights > least / weights.size)
    return drop_upper(lost, numbers - lost, questions), weights[numbers, lost]


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
