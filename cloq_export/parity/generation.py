"""Texts that an engine writes, judged token by token: how far each lies below the reference's best one.

One forward pass of the reference over prompt and text tells it for every token, also behind a near-tie, so that the
engine's decode steps and its cache are judged by the reference's prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cloq_export.engines.protocol import ServedModel
from cloq_export.engines.transformers.reference import ReferenceModel
from cloq_export.errors import ShapeError

# Where engines change what they do: the blocks of a paged cache hold 16 or 128 tokens.
_BLOCK = 128


def judge_texts(
    reference: ReferenceModel,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    adapter: str | None,
    *,
    kind: str,
    max_new_tokens: int,
    end_tokens: frozenset[int],
) -> dict[str, Any]:
    """Return how far the tokens that were served lie below the reference's best ones.

    A text that ended before `max_new_tokens` is judged for its end too, whether the engine gives the end token or not.

    Args:
        reference: the yardstick.
        prompts: token ids.
        texts: what was served behind each prompt.
        adapter: of all prompts.
        kind: "greedy", "longest" or "mixed", to be noted.
        max_new_tokens: that were asked for.
        end_tokens: with which a text ends.

    Returns:
        dict: "adapter", "kind", "prompts", "longest_prompt", "tokens", "gap_max", "gap_mean" (both None where a gap is
        NaN or nothing was served) and "worst" ({"prompt", "position", "served", "gap"}, or None).

    Raises:
        ShapeError: the runtime answered another number of prompts, or wrote more tokens than were asked for, or
            stopped before with no end token known.
    """
    if len(texts) != len(prompts):
        raise ShapeError(f"the runtime continued {len(texts)} of {len(prompts)} prompts; it drops requests.")
    written, ends = [], []
    for number, text in enumerate(texts):
        if len(text) > max_new_tokens:
            raise ShapeError(
                f"the runtime wrote {len(text)} tokens behind prompt {number}, where {max_new_tokens} were asked for."
            )
        place = next((i for i, token in enumerate(text) if token in end_tokens), len(text))
        if place == len(text) < max_new_tokens and not end_tokens:
            raise ShapeError(
                f"the runtime stopped behind {len(text)} of {max_new_tokens} tokens of prompt {number}, and the model "
                "has no token that ends a text."
            )
        if len(text) > place + 1:
            raise ShapeError(
                f"the runtime wrote {len(text) - place - 1} tokens behind the end of the text of prompt {number}."
            )
        written.append(list(text[:place]))
        ends.append(end_tokens if place < max_new_tokens and end_tokens else None)
    gaps = reference.token_gaps(prompts, written, [adapter] * len(prompts), ends)
    flat = torch.cat([torch.empty(0), *gaps]).to(torch.float64)
    row: dict[str, Any] = {
        "adapter": adapter,
        "kind": kind,
        "prompts": len(prompts),
        "longest_prompt": max(map(len, prompts), default=0),
        "tokens": flat.numel(),
        "gap_max": None,
        "gap_mean": None,
        "worst": None,
    }
    if not flat.numel() or not bool(torch.isfinite(flat).all()):
        return row
    number = max(range(len(gaps)), key=lambda each: float(gaps[each].max()) if gaps[each].numel() else -1.0)
    position = int(gaps[number].argmax())
    text = written[number]
    worst = {
        "prompt": number,
        "position": position,
        "served": text[position] if position < len(text) else None,
        "gap": float(gaps[number][position]),
    }
    return row | {"gap_max": float(flat.max()), "gap_mean": float(flat.mean()), "worst": worst if flat.max() else None}


def missing_row(adapter: str | None, kind: str) -> dict[str, Any]:
    """Return the row of texts that could not be had."""
    empty = {"prompts": 0, "longest_prompt": 0, "tokens": 0, "gap_max": None, "gap_mean": None, "worst": None}
    return {"adapter": adapter, "kind": kind, **empty}


def long_prompts(tokens: Sequence[int], max_new_tokens: int, places: Sequence[int]) -> list[list[int]]:
    """Return prompts whose continuations cross the places where engines change what they do, and one to the end.

    Args:
        tokens: a text as long as the longest that is served.
        max_new_tokens: tokens of a continuation.
        places: lengths at which the model changes what it does, such as a sliding window.
    """
    length = len(tokens)
    starts = {place - max_new_tokens // 2 for place in (_BLOCK, *places)} | {length - max_new_tokens}
    return [list(tokens[:start]) for start in sorted(starts) if 1 <= start <= length - max_new_tokens]


def mixed_texts(
    served: ServedModel, prompts: Sequence[Sequence[int]], names: Sequence[str | None], max_new_tokens: int
) -> dict[str | None, tuple[list[Sequence[int]], list[list[int]]]]:
    """Return what the base and all adapters write behind the same prompts in one batch, in two orders.

    Args:
        served: the runtime.
        prompts: token ids.
        names: None for the base, and the adapters.
        max_new_tokens: at most.

    Returns:
        dict: name -> (prompts, texts), those of both orders one behind the other.

    Raises:
        ShapeError: the runtime answered another number of requests.
    """
    requests = [(prompt, name) for prompt in prompts for name in names]
    found: dict[str | None, tuple[list[Sequence[int]], list[list[int]]]] = {name: ([], []) for name in names}
    for order in (requests, requests[::-1]):
        texts = served.generate([prompt for prompt, _ in order], [name for _, name in order], max_new_tokens)
        if len(texts) != len(order):
            raise ShapeError(f"the runtime continued {len(texts)} of {len(order)} prompts; it drops requests.")
        for (prompt, name), text in zip(order, texts, strict=True):
            found[name][0].append(prompt)
            found[name][1].append(text)
    return found
