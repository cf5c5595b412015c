"""Texts that an engine writes, judged token by token: how far each lies below the reference's best one.

One forward pass of the reference over prompt and text gives it for every token, also after a near-tie, so that the
engine's decode steps and its cache are judged by the reference's prefill.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from cloq_export.engines.protocol import ServedModel
from cloq_export.engines.transformers.reference import ReferenceModel
from cloq_export.errors import ShapeError
from cloq_export.parity.plain import Result

# Where engines change what they do: the blocks of a paged cache hold 16 or 128 tokens.
_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class AskedTexts:
    """What a runtime is asked to write.

    Args:
        prompts: token ids.
        adapter: of all prompts; None is the base alone.
        max_new_tokens: at most, behind each prompt.
        end_tokens: with which a text ends.
    """

    prompts: Sequence[Sequence[int]]
    adapter: str | None
    max_new_tokens: int
    end_tokens: frozenset[int]


@dataclasses.dataclass(frozen=True)
class WorstToken(Result):
    """The token that lies furthest below the reference's best one.

    Args:
        prompt: its number.
        position: of the token in the text.
        served: the token; None is the end of the text.
        gap: how far, in nats.
    """

    prompt: int
    position: int
    served: int | None
    gap: float


@dataclasses.dataclass(frozen=True)
class WrittenTexts(Result):
    """How far the tokens that were served lie below the reference's best ones.

    Args:
        adapter: that wrote; None is the base alone.
        kind: "greedy", "longest" or "mixed".
        prompts: how many.
        longest_prompt: its tokens.
        tokens: that were judged.
        gap_max: the largest gap; None where a gap is NaN, or nothing was served.
        gap_mean: of all.
        worst: the token with the largest gap, None if there is no gap.
    """

    adapter: str | None
    kind: str
    prompts: int = 0
    longest_prompt: int = 0
    tokens: int = 0
    gap_max: float | None = None
    gap_mean: float | None = None
    worst: WorstToken | None = None


def judge_texts(
    reference: ReferenceModel, asked: AskedTexts, texts: Sequence[Sequence[int]], *, kind: str
) -> WrittenTexts:
    """Return how far the tokens that were served lie below the reference's best ones.

    A text that ended before its last token is judged for its end too, whether the engine gives the end token or not.

    Args:
        reference: the yardstick.
        asked: for which texts.
        texts: what was served behind each prompt.
        kind: "greedy", "longest" or "mixed", to be noted.

    Raises:
        ShapeError: the runtime answered another number of prompts, or wrote more tokens than were asked for, or
            stopped before with no end token known.
    """
    prompts, adapter = asked.prompts, asked.adapter
    written, ends = _cut_texts(asked, texts)
    gaps = reference.token_gaps(prompts, written, [adapter] * len(prompts), ends)
    flat = torch.cat([torch.empty(0), *gaps]).to(torch.float64)
    row = WrittenTexts(adapter, kind, len(prompts), max(map(len, prompts), default=0), flat.numel())
    if not flat.numel() or not bool(torch.isfinite(flat).all()):
        return row
    number = max(range(len(gaps)), key=lambda each: float(gaps[each].max()) if gaps[each].numel() else -1.0)
    position = int(gaps[number].argmax())
    text = written[number]
    served = text[position] if position < len(text) else None
    worst = WorstToken(number, position, served, float(gaps[number][position])) if flat.max() else None
    return dataclasses.replace(row, gap_max=float(flat.max()), gap_mean=float(flat.mean()), worst=worst)


def _cut_texts(
    asked: AskedTexts, texts: Sequence[Sequence[int]]
) -> tuple[list[list[int]], list[frozenset[int] | None]]:
    """Return what stands before the end of each text, and the tokens that may end it, None where it was cut."""
    if len(texts) != len(asked.prompts):
        raise ShapeError(f"the runtime continued {len(texts)} of {len(asked.prompts)} prompts; it drops requests.")
    most, end_tokens = asked.max_new_tokens, asked.end_tokens
    written: list[list[int]] = []
    ends: list[frozenset[int] | None] = []
    for number, text in enumerate(texts):
        if len(text) > most:
            raise ShapeError(
                f"the runtime wrote {len(text)} tokens behind prompt {number}, where {most} were asked for."
            )
        place = next((i for i, token in enumerate(text) if token in end_tokens), len(text))
        if place == len(text) < most and not end_tokens:
            raise ShapeError(
                f"the runtime stopped behind {len(text)} of {most} tokens of prompt {number}, and the model "
                "has no token that ends a text."
            )
        if len(text) > place + 1:
            raise ShapeError(
                f"the runtime wrote {len(text) - place - 1} tokens behind the end of the text of prompt {number}."
            )
        written.append(list(text[:place]))
        ends.append(end_tokens if place < most and end_tokens else None)
    return written, ends


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
    written: dict[str | None, tuple[list[Sequence[int]], list[list[int]]]] = {name: ([], []) for name in names}
    for order in (requests, requests[::-1]):
        texts = served.generate([prompt for prompt, _ in order], [name for _, name in order], max_new_tokens)
        if len(texts) != len(order):
            raise ShapeError(f"the runtime continued {len(texts)} of {len(order)} prompts; it drops requests.")
        for (prompt, name), text in zip(order, texts, strict=True):
            written[name][0].append(prompt)
            written[name][1].append(text)
    return written
