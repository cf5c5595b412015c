"""Quality beside the float model: perplexity ratios with a bootstrap interval, answers with McNemar's test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from cloq_export.errors import ShapeError
from cloq_export.parity.numerics import by_position
from cloq_export.parity.perplexity import ratio_of_losses, summarize_losses

LEVEL = 0.95
RESAMPLES = 10_000


def losses_of(logprobs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean negative log-likelihood of each window, (windows,) float64, in nats.

    Args:
        logprobs: one (n,) tensor per window, all equally long.
    """
    return torch.stack([-values.to(torch.float64).mean() for values in logprobs])


def bootstrap_ratio(
    losses: torch.Tensor,
    reference: torch.Tensor,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the ratio of two perplexities on the same windows.

    `ratio = exp(mean d)`, `d = losses - reference`; windows are drawn with replacement, and both models keep their
    window together (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).

    Args:
        losses: (windows,) mean negative log-likelihood of the model in question.
        reference: (windows,) of the model it is compared with.
        seed: of the draw.
        resamples: how often windows are drawn.
        level: of the interval.

    Returns:
        (lower, upper); NaN for less than two windows.

    Raises:
        ShapeError: the two have different windows.
    """
    if losses.shape != reference.shape or losses.ndim != 1:
        raise ShapeError(
            f"losses of {tuple(losses.shape)} and {tuple(reference.shape)} windows cannot be paired; measure both "
            "models on the same windows."
        )
    count = losses.numel()
    if count < 2:
        return math.nan, math.nan
    difference = (losses - reference).to(torch.float64)
    drawn = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))
    means = difference[drawn].mean(1)
    tail = (1 - level) / 2
    bounds = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).exp()
    return float(bounds[0]), float(bounds[1])


def perplexity_entry(
    logprobs: Sequence[torch.Tensor], reference: Sequence[torch.Tensor] | None, *, seed: int = 0
) -> dict[str, Any]:
    """Return perplexity with its standard error, and beside a float model the ratio with its interval.

    Args:
        logprobs: of the model, one (n,) tensor per window, all equally long.
        reference: of the float model on the same windows; None for the float model itself.
        seed: of the bootstrap.

    Returns:
        dict: "perplexity", "standard_error", "by_position", and with a reference "ratio_to_float", "ratio_lower" and
        "ratio_upper". What is not a finite number is None.
    """
    losses = losses_of(logprobs)
    measured = summarize_losses(losses, logprobs[0].numel() + 1)
    entry: dict[str, Any] = {
        "perplexity": _finite(measured.perplexity),
        "standard_error": _finite(measured.standard_error),
        "by_position": dict(by_position(logprobs)),
    }
    if reference is not None:
        against = losses_of(reference)
        lower, upper = bootstrap_ratio(losses, against, seed=seed)
        entry |= {
            "ratio_to_float": _finite(ratio_of_losses(losses, against)[0]),
            "ratio_lower": _finite(lower),
            "ratio_upper": _finite(upper),
        }
    return entry


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """Test whether two models answer the same problems equally well, by McNemar's exact test.

    Of the problems that only one of the two solves, each falls to either with probability 1/2 under the null
    hypothesis: `p = min(1, 2 P(X <= min(b, c)))`, `X ~ Binomial(b + c, 1/2)` (McNemar, Psychometrika 12, 1947).

    Args:
        first: for each problem whether the first model solves it.
        second: the same of the second model.

    Returns:
        dict: "only_first", "only_second", "p_value" (1 where the two never differ).

    Raises:
        ShapeError: the two have different problems.
    """
    if len(first) != len(second):
        raise ShapeError(f"{len(first)} and {len(second)} answers cannot be paired; ask both models the same problems.")
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    discordant, least = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(discordant, count) for count in range(least + 1))
    # Whole numbers up to the last division: 2**-n would vanish for a thousand problems.
    p_value = min(1.0, 2 * tail / 2**discordant)
    return {"only_first": only_first, "only_second": only_second, "p_value": p_value}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
