"""Differences of log-probabilities between two runtimes that read the same tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch

from cloq_export.engines.protocol import ScoresPrompts, ServedModel
from cloq_export.errors import ShapeError
from cloq_export.parity.divergence import mean_probability_factor
from cloq_export.parity.generation import AskedTexts
from cloq_export.parity.plain import Result

QUANTILES = (0.5, 0.9, 0.99, 0.999)
# Decades of the histogram: 1e-9 up to 10, and what lies beyond at both ends.
_DECADES = range(-9, 2)
_BINS_PER_DECADE = 2


def measure_logprobs(
    model: ScoresPrompts, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None]
) -> list[torch.Tensor]:
    """Ask a runtime for log-probabilities, and check that it gave as many as there are.

    Args:
        model: the runtime.
        token_ids: sequences of two or more tokens.
        adapters: for each sequence the name of its adapter, or None.

    Returns:
        list: one (n - 1,) float32 tensor per sequence.

    Raises:
        ShapeError: the runtime gave another number of log-probabilities than there are tokens to predict.
    """
    measured = model.prompt_logprobs(token_ids, adapters)
    if len(measured) != len(token_ids):
        raise ShapeError(f"the runtime answered {len(measured)} of {len(token_ids)} sequences; it drops requests.")
    for values, ids in zip(measured, token_ids, strict=True):
        if tuple(values.shape) != (len(ids) - 1,):
            raise ShapeError(
                f"the runtime gave {tuple(values.shape)} log-probabilities for a sequence of {len(ids)} tokens; "
                f"({len(ids) - 1},) are needed, one for each token but the first."
            )
    return [values.to(torch.float32) for values in measured]


@dataclasses.dataclass(frozen=True)
class Histogram(Result):
    """How many values lie between two edges each; the first and last bin are open.

    Args:
        edges: powers of ten.
        counts: one more than edges.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LogprobDifferences(Result):
    """What the absolute differences `|log p - log p_ref|` per token amount to; None where one is NaN or Inf.

    Args:
        tokens: how many.
        max: the largest.
        mean: of them.
        quantiles: share of the tokens -> smallest value that it does not exceed.
        histogram: of them.
        token_mult_prob_error: mean of `exp |log p - log p_ref|`, by what factor a probability is off.
    """

    tokens: int
    max: float | None
    mean: float | None
    quantiles: Mapping[str, float | None]
    histogram: Histogram | None
    token_mult_prob_error: float | None = None


@dataclasses.dataclass(frozen=True)
class Flip(Result):
    """Where a text parts from the reference's with another token than a near-tie.

    Args:
        prompt: its number.
        position: of the token in the text.
        expected: the reference's token, None behind its end.
        served: the token that was served, None behind its end.
        gap: of the two log-probabilities, None where the model has no end token.
    """

    prompt: int
    position: int
    expected: int | None
    served: int | None
    gap: float | None


@dataclasses.dataclass(frozen=True)
class GreedyTexts(Result):
    """How the greedy texts of one adapter compare with the reference's.

    Args:
        adapter: the adapter; None is the base alone.
        prompts: how many.
        new_tokens: at most, in each text.
        agreement: share of equal texts; None without prompts.
        ties: texts that part at a near-tie.
        flips: texts that part elsewhere.
        tie_gap: largest gap of log-probabilities that counts as a tie.
        first_flip: the first of those that part elsewhere.
    """

    adapter: str | None
    prompts: int
    new_tokens: int
    agreement: float | None
    ties: int
    flips: int
    tie_gap: float
    first_flip: Flip | None


def compare_logprobs(measured: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> LogprobDifferences:
    """Return what the absolute differences `|log p - log p_ref|` per token amount to.

    Args:
        measured: of the runtime in question, one (n,) tensor per sequence.
        expected: of the runtime that it is compared with, same shapes.

    Raises:
        ShapeError: the two differ in shape.
    """
    if [tuple(a.shape) for a in measured] != [tuple(b.shape) for b in expected]:
        raise ShapeError("log-probabilities of different sequences were compared; measure both on the same tokens.")
    differences = torch.cat([torch.empty(0, dtype=torch.float64), *map(_difference, measured, expected)])
    tokens = differences.numel()
    if not tokens or not bool(torch.isfinite(differences).all()):
        return LogprobDifferences(tokens, None, None, {str(share): None for share in QUANTILES}, None)
    ordered = differences.sort().values
    # The smallest value that a share of the tokens does not exceed: a value that was measured, not one between two.
    quantiles = {str(share): float(ordered[math.ceil(share * tokens) - 1]) for share in QUANTILES}
    factor = mean_probability_factor(torch.cat(list(measured)), torch.cat(list(expected)))
    largest, mean = float(ordered[-1]), float(differences.mean())
    return LogprobDifferences(tokens, largest, mean, quantiles, _histogram(differences), factor)


def largest_difference(measured: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float | None:
    """Return the largest absolute difference, None if one is NaN or Inf, or if there is nothing to compare."""
    return compare_logprobs(measured, expected).max


def compare_greedy(
    reference: ServedModel,
    asked: AskedTexts,
    expected: Sequence[Sequence[int]],
    measured: Sequence[Sequence[int]],
    tie: float,
) -> GreedyTexts:
    """Compare greedy continuations with those of the reference, and tell near-ties from wrong tokens.

    Where two texts part, the reference is asked how far apart the two tokens are: a gap that the allowed difference
    of log-probabilities can turn around is a tie, a larger one is a flip. End tokens are not compared themselves,
    because runtimes differ in giving them.

    Args:
        reference: the yardstick.
        asked: for which texts.
        expected: the reference's continuations.
        measured: the runtime's.
        tie: largest gap of log-probabilities that counts as a tie.

    Raises:
        ShapeError: the runtime answered another number of prompts.
    """
    prompts, adapter, ends = asked.prompts, asked.adapter, asked.end_tokens
    if len(measured) != len(prompts):
        raise ShapeError(f"the runtime continued {len(measured)} of {len(prompts)} prompts; it drops requests.")
    equal = ties = flips = 0
    first = None
    for number, (prompt, wanted, got) in enumerate(zip(prompts, expected, measured, strict=True)):
        wanted, got = _before_end(wanted, ends), _before_end(got, ends)
        if wanted == got:
            equal += 1
            continue
        # Where one text goes on and the other has ended, the end is the other token.
        both = list(zip(wanted, got, strict=False))
        place = next((i for i, (a, b) in enumerate(both) if a != b), len(both))
        sides = [_tokens_at(ids, place, ends) for ids in (wanted, got)]
        gap = None
        if all(sides):
            sequences = [[*prompt, *wanted[:place], token] for side in sides for token in side]
            values = [float(each[-1]) for each in reference.prompt_logprobs(sequences, [adapter] * len(sequences))]
            gap = max(values[: len(sides[0])]) - max(values[len(sides[0]) :])
        if gap is not None and gap <= tie:
            ties += 1
            continue
        flips += 1
        shown = [ids[place] if place < len(ids) else None for ids in (wanted, got)]
        first = first or Flip(number, place, shown[0], shown[1], gap)
    agreement = equal / len(prompts) if prompts else None
    return GreedyTexts(adapter, len(prompts), asked.max_new_tokens, agreement, ties, flips, tie, first)


def _difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.to(torch.float64) - b.to(torch.float64)).abs()


def _histogram(differences: torch.Tensor) -> Histogram:
    edges = [10.0 ** (decade + step / _BINS_PER_DECADE) for decade in _DECADES for step in range(_BINS_PER_DECADE)]
    counts = torch.bucketize(differences, torch.tensor(edges, dtype=torch.float64), right=True).bincount(
        minlength=len(edges) + 1
    )
    return Histogram(tuple(edges), tuple(int(count) for count in counts))


def _before_end(ids: Sequence[int], end_tokens: frozenset[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in end_tokens), len(ids))
    return list(ids[:end])


def _tokens_at(ids: Sequence[int], place: int, end_tokens: frozenset[int]) -> list[int]:
    return [ids[place]] if place < len(ids) else sorted(end_tokens)
