"""From examples to token sequences with labels: the loss is taken on what is to be learned, and on nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch

from cloq_export.errors import DataError
from cloq_export.train.examples import AnyExample, ChatExample, Example

# What the loss passes over, by torch's convention.
NOT_LEARNED = -100


@dataclasses.dataclass(frozen=True)
class SequenceCounts:
    """What became of the examples.

    Args:
        examples: how many there were.
        truncated: examples cut to the length of a sequence.
        dropped: examples left out, because they were too long or nothing to learn was left of them.
        turns_left_out: answers of a chat that are not learned, because the chat template writes them differently once
            more turns follow.
        tail: tokens of plain text that did not fill a sequence.
    """

    examples: int = 0
    truncated: int = 0
    dropped: int = 0
    turns_left_out: int = 0
    tail: int = 0


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Token sequences to train or evaluate on.

    Args:
        rows: one mapping for each: "input_ids" and "labels", (tokens,) int32, labels NOT_LEARNED where nothing is
            learned.
        counts: what became of the examples.
    """

    rows: Sequence[dict[str, torch.Tensor]]
    counts: SequenceCounts

    @property
    def tokens(self) -> int:
        """Return the number of tokens."""
        return sum(len(row["input_ids"]) for row in self.rows)

    @property
    def learned(self) -> int:
        """Return the number of tokens that the loss is taken on; the first of a sequence is never predicted."""
        return sum(int((row["labels"][1:] != NOT_LEARNED).sum()) for row in self.rows)


def make_sequences(
    examples: Iterable[AnyExample],
    tokenizer: Any,
    seqlen: int,
    *,
    too_long: Literal["truncate", "drop"] = "truncate",
    origin: str = "the data",
) -> Sequences:
    """Return the sequences of examples.

    Plain texts are joined, with the end-of-text token between two, and cut into sequences of exactly `seqlen` tokens.
    A prompt with its completion is one sequence, of which the completion and the end-of-text token behind it are
    learned. A chat is what the tokenizer's chat template makes of it, of which the assistant's turns are learned.

    Args:
        examples: what to learn.
        tokenizer: a transformers tokenizer.
        seqlen: the longest sequence, in tokens.
        too_long: cut longer examples at their end, or leave them out; either is counted.
        origin: where the examples are from, for messages.

    Returns:
        Sequences, in the order of the examples, those of plain text behind the others.

    Raises:
        DataError: no sequence came of them, or there are chats and the tokenizer has no chat template.
    """
    rows: list[dict[str, torch.Tensor]] = []
    plain: list[int] = []
    total = truncated = dropped = left_out = 0
    end = tokenizer.eos_token_id
    for example in examples:
        total += 1
        if isinstance(example, Example) and example.prompt is None:
            plain += ([end] if plain and end is not None else []) + _tokens(tokenizer, example.completion)
            continue
        if isinstance(example, ChatExample):
            pieces, missed = _chat_pieces(example, tokenizer)
            left_out += missed
        else:
            pieces = _prompt_pieces(example, tokenizer)
        ids = [token for tokens, _ in pieces for token in tokens]
        labels = [token if learned else NOT_LEARNED for tokens, learned in pieces for token in tokens]
        longer = len(ids) > seqlen
        ids, labels = ids[:seqlen], labels[:seqlen]
        # The first token is never predicted, so a label there is none.
        if (longer and too_long == "drop") or all(label == NOT_LEARNED for label in labels[1:]):
            dropped += 1
            continue
        truncated += longer
        rows.append(_row(ids, labels))
    whole = len(plain) // seqlen * seqlen
    for window in torch.tensor(plain[:whole], dtype=torch.int32).view(-1, seqlen):
        rows.append({"input_ids": window, "labels": window})
    counts = SequenceCounts(total, truncated, dropped, left_out, len(plain) - whole)
    if not rows:
        raise DataError(
            f"{origin} gives no sequence of {seqlen} tokens: {total} examples, {dropped} left out as too long, "
            f"{len(plain)} tokens of plain text. Choose another --seqlen, --too-long truncate, or more data."
        )
    return Sequences(rows, counts)


def pad_batch(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return a batch of sequences, padded on the right to the longest of them.

    What is put in is masked and not learned, so its number does not matter.

    Args:
        rows: of `Sequences`.

    Returns:
        dict: "input_ids", "labels" and "attention_mask", (rows, longest) int64.
    """
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [row["input_ids"].to(torch.int64) for row in rows]
    return {
        "input_ids": pad(ids, batch_first=True),
        "labels": pad([row["labels"].to(torch.int64) for row in rows], batch_first=True, padding_value=NOT_LEARNED),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
    }


Pieces = list[tuple[list[int], bool]]


def _tokens(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    # verbose=False: a text may be longer than the model's context; it is cut later.
    ids: list[int] = tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]
    return ids


def _prompt_pieces(example: Example, tokenizer: Any) -> Pieces:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompt = _tokens(tokenizer, example.prompt or "", special=True)
    return [(prompt, False), (_tokens(tokenizer, example.completion) + end, True)]


def _chat_pieces(example: ChatExample, tokenizer: Any) -> tuple[Pieces, int]:
    """Return the pieces of a chat and how many of its answers had to be left out."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the examples are chats and the model's tokenizer has no chat template; give rows with 'prompt' and "
            "'completion', or a model that was made for chats."
        )
    messages = [dataclasses.asdict(message) for message in example.messages]
    whole = _render(tokenizer, messages)
    spans: list[tuple[int, int]] = []
    left_out = 0
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:turn], add_generation_prompt=True)
        after = _render(tokenizer, messages[: turn + 1])
        if whole.startswith(before) and whole.startswith(after) and len(before) < len(after):
            spans.append((len(before), len(after)))
        elif turn + 1 < len(messages):
            left_out += 1
        else:
            raise DataError(
                "the model's chat template does not begin an answer as it asks for one, so what is to be learned "
                "cannot be told; give rows with 'prompt' and 'completion'."
            )
    return [(_tokens(tokenizer, text), learned) for text, learned in _cut(whole, spans)], left_out


def _render(tokenizer: Any, messages: Sequence[dict[str, str]], **options: Any) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return text


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[str, bool]]:
    at = 0
    for start, end in spans:
        if start > at:
            yield text[at:start], False
        yield text[start:end], True
        at = end
    if at < len(text):
        yield text[at:], False


def _row(ids: list[int], labels: list[int]) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor(ids, dtype=torch.int32),
        "labels": torch.tensor(labels, dtype=torch.int32),
    }
