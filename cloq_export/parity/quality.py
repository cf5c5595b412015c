"""Quality beside the float model: perplexity ratios with a bootstrap interval, answers with McNemar's test."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from scipy.stats import binomtest

from cloq_export.errors import ShapeError
from cloq_export.parity.perplexity import ratio_of_losses, summarize_losses
from cloq_export.parity.plain import Result

LEVEL = 0.95
RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class ByPosition(Result):
    """Perplexity over the place in the window, windows taken together.

    Args:
        position: of the last token of each piece, counted from 1.
        perplexity: of each piece.
    """

    position: tuple[int, ...]
    perplexity: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Ratio(Result):
    """A perplexity over the float model's, with the ends of its interval; None is no finite number."""

    ratio_to_float: float | None
    ratio_lower: float | None
    ratio_upper: float | None


@dataclasses.dataclass(frozen=True)
class PerplexityRow(Result):
    """What was measured of one model; None is no finite number.

    Args:
        model: "float", "reference", "packed" or "served".
        adapter: with which adapter.
        perplexity: on all windows.
        standard_error: of it.
        by_position: over the place in the window.
        ratio: beside the float model; None for the float model itself.
    """

    model: str
    adapter: str | None
    perplexity: float | None
    standard_error: float | None
    by_position: ByPosition
    ratio: Ratio | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the row as the report holds it: the ratio's figures beside the others."""
        row = super().to_json()
        del row["ratio"]
        return row | (self.ratio.to_json() if self.ratio is not None else {})


@dataclasses.dataclass(frozen=True)
class PairedTest(Result):
    """McNemar's exact test of two models on the same questions.

    Args:
        only_first: questions that the first model alone answers right.
        only_second: questions that the second model alone answers right.
        p_value: 1 where the two never differ.
    """

    only_first: int
    only_second: int
    p_value: float


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


def perplexity_row(
    model: str,
    adapter: str | None,
    logprobs: Sequence[torch.Tensor],
    reference: Sequence[torch.Tensor] | None,
    *,
    seed: int = 0,
) -> PerplexityRow:
    """Return perplexity with its standard error, and beside a float model the ratio with its interval.

    Args:
        model: its name.
        adapter: with which adapter.
        logprobs: of the model, one (n,) tensor per window, all equally long.
        reference: of the float model on the same windows; None for the float model itself.
        seed: of the bootstrap.
    """
    losses = losses_of(logprobs)
    measured = summarize_losses(losses, logprobs[0].numel() + 1)
    ratio = None
    if reference is not None:
        against = losses_of(reference)
        ends = bootstrap_ratio(losses, against, seed=seed)
        ratio = Ratio(*map(_finite, (ratio_of_losses(losses, against)[0], *ends)))
    return PerplexityRow(
        model, adapter, _finite(measured.perplexity), _finite(measured.standard_error), by_position(logprobs), ratio
    )


def by_position(logprobs: Sequence[torch.Tensor], bins: int = 16) -> ByPosition:
    """Return perplexity over the place in the window, windows taken together.

    Args:
        logprobs: one (n,) tensor per window, all equally long.
        bins: pieces that a window is cut into, at most.
    """
    table = -torch.stack([values.to(torch.float64) for values in logprobs])
    pieces = table.tensor_split(min(bins, table.shape[1]), dim=1)
    ends = torch.tensor([piece.shape[1] for piece in pieces]).cumsum(0) + 1
    return ByPosition(
        tuple(int(end) for end in ends), tuple(math.exp(min(float(piece.mean()), 700.0)) for piece in pieces)
    )


def mcnemar(
    first: Sequence[bool], second: Sequence[bool], alternative: Literal["two-sided", "greater"] = "two-sided"
) -> PairedTest:
    """Test whether two models answer the same problems equally well, by McNemar's exact test.

    Of the problems that only one of the two solves, each falls to either with probability 1/2 under the null
    hypothesis: `p = min(1, 2 P(X <= min(b, c)))`, `X ~ Binomial(b + c, 1/2)` (McNemar, Psychometrika 12, 1947).

    Args:
        first: for each problem whether the first model solves it.
        second: the same of the second model.
        alternative: "greater" asks whether the first model is better, `p = P(X >= b)`.

    Raises:
        ShapeError: the two have different problems.
    """
    if len(first) != len(second):
        raise ShapeError(f"{len(first)} and {len(second)} answers cannot be paired; ask both models the same problems.")
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    differing = only_first + only_second
    p_value = float(binomtest(only_first, differing, alternative=alternative).pvalue) if differing else 1.0
    return PairedTest(only_first, only_second, p_value)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
