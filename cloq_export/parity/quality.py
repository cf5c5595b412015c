"""Quality compared with the float model: perplexity ratios with their interval, answers with McNemar's test."""

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
from cloq_export.parity.power import drop_upper, ratio_interval, smallest_rise


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
    """A perplexity over the float model's; None is no finite number.

    Args:
        ratio_to_float: the ratio.
        ratio_lower: lower end of its interval.
        ratio_upper: upper end of its interval.
        ratio_smallest_rise: smallest relative rise that the windows tell from chance.
    """

    ratio_to_float: float | None
    ratio_lower: float | None
    ratio_upper: float | None
    ratio_smallest_rise: float | None = None


@dataclasses.dataclass(frozen=True)
class PerplexityRow(Result):
    """What was measured of one model; None is no finite number.

    Args:
        model: "float", "reference", "packed" or "served".
        adapter: with which adapter.
        perplexity: on all windows.
        standard_error: of it.
        by_position: over the place in the window.
        ratio: to the float model's; None for the float model itself.
    """

    model: str
    adapter: str | None
    perplexity: float | None
    standard_error: float | None
    by_position: ByPosition
    ratio: Ratio | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the row as the report holds it: the ratio's figures among the others."""
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
        drop: share of the questions that the second model loses compared with the first, those that it wins taken off.
        drop_upper: upper confidence limit of the drop.
    """

    only_first: int
    only_second: int
    p_value: float
    drop: float
    drop_upper: float


def losses_of(logprobs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean negative log-likelihood of each window, (windows,) float64, in nats.

    Args:
        logprobs: one (n,) tensor per window, all equally long.
    """
    return torch.stack([-values.to(torch.float64).mean() for values in logprobs])


def perplexity_row(
    model: str,
    adapter: str | None,
    logprobs: Sequence[torch.Tensor],
    reference: Sequence[torch.Tensor] | None,
) -> PerplexityRow:
    """Return perplexity with its standard error, and given a float model the ratio with its interval.

    Args:
        model: its name.
        adapter: with which adapter.
        logprobs: of the model, one (n,) tensor per window, all equally long.
        reference: of the float model on the same windows; None for the float model itself.
    """
    losses = losses_of(logprobs)
    measured = summarize_losses(losses, logprobs[0].numel() + 1)
    ratio = None
    if reference is not None:
        against = losses_of(reference)
        value, (lower, upper) = ratio_of_losses(losses, against)[0], ratio_interval(losses, against)
        rise = smallest_rise(losses, against).loss
        ratio = Ratio(_finite(value), _finite(lower), _finite(upper), rise)
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
        first: for each problem whether the first model solves it; without any the drop may be as large as 1.
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
    drop, upper = 0.0, 1.0
    if first:
        drop = (only_first - only_second) / len(first)
        upper = float(drop_upper(only_first, only_second, len(first)))
    return PairedTest(only_first, only_second, p_value, drop, upper)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
