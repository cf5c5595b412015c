"""Differences of log-probabilities between two runtimes that read the same tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cloq_export.engines.protocol import ServedModel
from cloq_export.errors import ShapeError

QUANTILES = (0.5, 0.9, 0.99, 0.999)
# Decades of the histogram: 1e-9 up to 10, and what lies beyond at both ends.
_DECADES = range(-9, 2)
_BINS_PER_DECADE = 2


def measure_logprobs(
    model: ServedModel, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None]
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


def compare_logprobs(measured: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Return what the absolute differences `|log p - log p_ref|` per token amount to.

    Args:
        measured: of the runtime in question, one (n,) tensor per sequence.
        expected: of the runtime that it is compared with, same shapes.

    Returns:
        dict: "tokens", "max", "mean", "quantiles" ("0.5", "0.9", "0.99", "0.999") and "histogram" ({"edges": powers
        of ten, "counts"}; the first and last bin are open). Each figure is None if a difference is NaN or Inf.

    Raises:
        ShapeError: the two differ in shape.
    """
    if [tuple(a.shape) for a in measured] != [tuple(b.shape) for b in expected]:
        raise ShapeError("log-probabilities of different sequences were compared; measure both on the same tokens.")
    differences = torch.cat([torch.empty(0, dtype=torch.float64), *map(_difference, measured, expected)])
    tokens = differences.numel()
    if not tokens or not bool(torch.isfinite(differences).all()):
        empty = {str(share): None for share in QUANTILES}
        return {"tokens": tokens, "max": None, "mean": None, "quantiles": empty, "histogram": None}
    ordered = differences.sort().values
    # The smallest value that a share of the tokens does not exceed: a value that was measured, not one between two.
    quantiles = {str(share): float(ordered[math.ceil(share * tokens) - 1]) for share in QUANTILES}
    return {
        "tokens": tokens,
        "max": float(ordered[-1]),
        "mean": float(differences.mean()),
        "quantiles": quantiles,
        "histogram": _histogram(differences),
    }


def largest_difference(measured: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float | None:
    """Return the largest absolute difference, None if one is NaN or Inf, or if there is nothing to compare."""
    value: float | None = compare_logprobs(measured, expected)["max"]
    return value


def compare_greedy(
    served: ServedModel,
    reference: ServedModel,
    prompts: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    adapter: str | None,
    *,
    max_new_tokens: int,
    end_tokens: frozenset[int],
    tie: float,
    measured: Sequence[Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Compare greedy continuations with those of the reference, and tell near-ties from wrong tokens.

    Where two texts part, the reference is asked how far apart the two tokens are: a gap that the allowed difference
    of log-probabilities can turn around is a tie, a larger one is a flip.

    Args:
        served: the runtime in question.
        reference: the yardstick.
        prompts: token ids.
        expected: the reference's continuations.
        adapter: the adapter of all prompts.
        max_new_tokens: at most.
        end_tokens: with which a text ends; they are not compared themselves, because runtimes differ in giving them.
        tie: largest gap of log-probabilities that counts as a tie.
        measured: the runtime's continuations, if they are known already.

    Returns:
        dict: "prompts", "new_tokens", "agreement" (share of equal texts), "ties", "flips", "tie_gap", and
        "first_flip" ({"prompt", "position", "expected", "served", "gap"}, or None).
    """
    if measured is None:
        measured = served.generate(prompts, [adapter] * len(prompts), max_new_tokens)
    if len(measured) != len(prompts):
        raise ShapeError(f"the runtime continued {len(measured)} of {len(prompts)} prompts; it drops requests.")
    equal = ties = flips = 0
    first = None
    for number, (prompt, wanted, got) in enumerate(zip(prompts, expected, measured, strict=True)):
        wanted, got = _before_end(wanted, end_tokens), _before_end(got, end_tokens)
        if wanted == got:
            equal += 1
            continue
        # Where one text goes on and the other has ended, the end is the other token.
        both = list(zip(wanted, got, strict=False))
        place = next((i for i, (a, b) in enumerate(both) if a != b), len(both))
        sides = [_tokens_at(ids, place, end_tokens) for ids in (wanted, got)]
        gap = None
        if all(sides):
            sequences = [[*prompt, *wanted[:place], token] for side in sides for token in side]
            asked = [float(values[-1]) for values in reference.prompt_logprobs(sequences, [adapter] * len(sequences))]
            gap = max(asked[: len(sides[0])]) - max(asked[len(sides[0]) :])
        if gap is not None and gap <= tie:
            ties += 1
            continue
        flips += 1
        shown = [ids[place] if place < len(ids) else None for ids in (wanted, got)]
        first = first or {"prompt": number, "position": place, "expected": shown[0], "served": shown[1], "gap": gap}
    return {
        "prompts": len(prompts),
        "new_tokens": max_new_tokens,
        "agreement": equal / len(prompts) if prompts else None,
        "ties": ties,
        "flips": flips,
        "tie_gap": tie,
        "first_flip": first,
    }


def by_position(logprobs: Sequence[torch.Tensor], bins: int = 16) -> Mapping[str, list[float]]:
    """Return perplexity over the place in the window, windows taken together.

    Args:
        logprobs: one (n,) tensor per window, all equally long.
        bins: pieces that a window is cut into, at most.

    Returns:
        dict: "position" (of the last token of each piece, counted from 1) and "perplexity".
    """
    table = -torch.stack([values.to(torch.float64) for values in logprobs])
    pieces = table.tensor_split(min(bins, table.shape[1]), dim=1)
    ends = torch.tensor([piece.shape[1] for piece in pieces]).cumsum(0) + 1
    return {
        "position": [int(end) for end in ends],
        "perplexity": [math.exp(min(float(piece.mean()), 700.0)) for piece in pieces],
    }


def _difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.to(torch.float64) - b.to(torch.float64)).abs()


def _histogram(differences: torch.Tensor) -> dict[str, list[float]]:
    edges = [10.0 ** (decade + step / _BINS_PER_DECADE) for decade in _DECADES for step in range(_BINS_PER_DECADE)]
    counts = torch.bucketize(differences, torch.tensor(edges, dtype=torch.float64), right=True).bincount(
        minlength=len(edges) + 1
    )
    return {"edges": edges, "counts": [int(count) for count in counts]}


def _before_end(ids: Sequence[int], end_tokens: frozenset[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in end_tokens), len(ids))
    return list(ids[:end])


def _tokens_at(ids: Sequence[int], place: int, end_tokens: frozenset[int]) -> list[int]:
    return [ids[place]] if place < len(ids) else sorted(end_tokens)
