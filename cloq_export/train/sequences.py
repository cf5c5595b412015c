"""From examples to token sequences with labels: the loss is taken on what is to be learned, and on nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch

from cloq_export.errors import DataError
from cloq_export.texts.examples import AnyExample, ChatExample, Example
from cloq_export.texts.tokens import TextTokens

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
            more turns follow, or does not ask for them.
        tail: tokens of plain text that did not fill a sequence.
        straddled: examples in which a token of the whole text would straddle the border between what is asked and what
            is learned, so that the two are tokenized apart.
    """

    examples: int = 0
    truncated: int = 0
    dropped: int = 0
    turns_left_out: int = 0
    tail: int = 0
    straddled: int = 0


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
    bos: str = "auto",
    origin: str = "the data",
) -> Sequences:
    """Return the sequences of examples.

    Plain texts are joined, with the end-of-text token between two, and cut into sequences of exactly `seqlen` tokens.
    A prompt with its completion is one sequence, of which the completion and the end-of-text token after it are
    learned. A chat is what the tokenizer's chat template makes of it, of which the assistant's turns are learned. What
    is asked has the ids that it is asked with; see `TextTokens`.

    Args:
        examples: what to learn.
        tokenizer: a transformers tokenizer.
        seqlen: the longest sequence, in tokens.
        too_long: cut longer examples at their end, or leave them out; either is counted.
        bos: what a sequence of plain text begins with, as in `TextTokens.window_begin`.
        origin: where the examples are from, for messages.

    Returns:
        Sequences, in the order of the examples, those of plain text after the others.

    Raises:
        DataError: no sequence came of them, or there are chats and the tokenizer has no chat template, or one that
            refuses a chat: the message gives its row and the template's words.
        UsageError: as `TextTokens.window_begin`.
    """
    tokens = TextTokens(tokenizer)
    begin = tokens.window_begin(bos)
    rows: list[dict[str, torch.Tensor]] = []
    plain: list[int] = []
    refused: list[str] = []
    total = truncated = dropped = left_out = apart = 0
    end = tokenizer.eos_token_id
    for example in examples:
        total += 1
        if isinstance(example, Example) and example.prompt is None:
            plain += ([end] if plain and end is not None else []) + tokens.text_ids(example.completion)
            continue
        if isinstance(example, ChatExample):
            where = example.where or f"example {total} of {origin}"
            try:
                pieces, missed, straddled = _chat_pieces(example, tokens, where)
            except _RefusedError as error:
                refused.append(f"{where}: the model's chat template refuses it ({error}). Mend the chat, or delete it.")
                continue
            left_out += missed
        else:
            prompt, completion, straddled = tokens.completion_ids(example.prompt or "", example.completion)
            pieces = [(prompt, False), (completion, True)]
        apart += straddled
        ids = [token for piece, _ in pieces for token in piece]
        labels = [token if learned else NOT_LEARNED for piece, learned in pieces for token in piece]
        longer = len(ids) > seqlen
        ids, labels = ids[:seqlen], labels[:seqlen]
        # The first token is never predicted, so a label there is none.
        if (longer and too_long == "drop") or all(label == NOT_LEARNED for label in labels[1:]):
            dropped += 1
            continue
        truncated += longer
        rows.append(_row(ids, labels))
    if refused:
        more = f" {len(refused) - 1} more of {total} examples are refused." if len(refused) > 1 else ""
        raise DataError(refused[0] + more)
    windows, tail = _windows(plain, begin, seqlen)
    rows += windows
    counts = SequenceCounts(total, truncated, dropped, left_out, tail, apart)
    if not rows:
        raise DataError(
            f"{origin} gives no sequence of {seqlen} tokens: {total} examples, {dropped} left out as too long, "
            f"{len(plain)} tokens of plain text. Choose another `seqlen`, `too_long=truncate`, or more data."
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


class _RefusedError(Exception):
    """A chat template refuses a chat; the message is the template's own."""


def _windows(plain: list[int], begin: Sequence[int], seqlen: int) -> tuple[list[dict[str, torch.Tensor]], int]:
    """Return the sequences of a text's tokens, (seqlen,) each with the begin tokens, and the tokens left over."""
    room = seqlen - len(begin)
    if room < 1:
        return [], len(plain)
    whole = len(plain) // room * room
    first = torch.tensor(list(begin), dtype=torch.int32)
    rows = []
    for window in torch.tensor(plain[:whole], dtype=torch.int32).view(-1, room):
        labels = window if not begin else torch.cat([torch.full_like(first, NOT_LEARNED), window])
        rows.append({"input_ids": window if not begin else torch.cat([first, window]), "labels": labels})
    return rows, len(plain) - whole


def _chat_pieces(example: ChatExample, tokens: TextTokens, where: str) -> tuple[Pieces, int, bool]:
    """Return the pieces of a chat, how many of its answers had to be left out, and whether a token would straddle."""
    tokenizer = tokens.tokenizer
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
        span = _answer_span(tokenizer, messages, turn, whole, spans[-1][1] if spans else 0)
        if span is not None:
            spans.append(span)
        elif turn + 1 < len(messages):
            left_out += 1
        else:
            raise DataError(
                f"{where}: the model's chat template does not begin an answer as it asks for one, so what is to be "
                "learned cannot be told; give rows with 'prompt' and 'completion'."
            )
    pieces = list(_cut(whole, spans))
    ids, straddled = tokens.joined_ids([text for text, _ in pieces], begin=False)
    return [(piece, learned) for piece, (_, learned) in zip(ids, pieces, strict=True)], left_out, bool(straddled)


def _answer_span(
    tokenizer: Any, messages: Sequence[dict[str, str]], turn: int, whole: str, start: int
) -> tuple[int, int] | None:
    """Return where an answer stands in the text of a chat: from the end of what asks for it to its own end.

    Args:
        tokenizer: with the chat template.
        messages: of the chat.
        turn: number of the answer's message.
        whole: the text of the chat.
        start: where the answer before ends.

    Returns:
        (start, end), or None if the template writes the turn differently in the whole chat, or does not ask for it.
    """
    after = _rendered_or_none(tokenizer, messages[: turn + 1])
    if after is None or not whole.startswith(after):
        return None
    # A template may refuse to ask for an answer to no message, or before a user's first. The answer is then searched
    # for after the words with which the template asks elsewhere.
    before = _rendered_or_none(tokenizer, messages[:turn], add_generation_prompt=True) if turn else None
    if before is not None:
        return (len(before), len(after)) if whole.startswith(before) and len(before) < len(after) else None
    asking = _asking_text(tokenizer, messages, turn)
    content = messages[turn]["content"].strip()
    place = after.find(asking, start) if asking else -1
    while place >= 0:
        begins = place + len(asking)
        if after[begins:].lstrip().startswith(content):
            return begins, len(after)
        place = after.find(asking, place + 1)
    return None


def _asking_text(tokenizer: Any, messages: Sequence[dict[str, str]], turn: int) -> str:
    """Return what the template writes to ask for an answer, later in the chat or after a user's turn."""
    later = [messages[:place] for place in range(turn + 1, len(messages)) if messages[place]["role"] == "assistant"]
    for asked in (*later, [{"role": "user", "content": "a"}]):
        without = _rendered_or_none(tokenizer, asked)
        with_it = _rendered_or_none(tokenizer, asked, add_generation_prompt=True)
        if without is not None and with_it is not None and with_it.startswith(without):
            return with_it[len(without) :]
    return ""


def _render(tokenizer: Any, messages: Sequence[dict[str, str]], **options: Any) -> str:
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    # A template is a program of the model's author, which may raise any exception.
    except Exception as error:
        words = str(error).strip().splitlines()
        raise _RefusedError(words[0][:200] if words else type(error).__name__) from None
    return text


def _rendered_or_none(tokenizer: Any, messages: Sequence[dict[str, str]], **options: Any) -> str | None:
    try:
        return _render(tokenizer, messages, **options)
    except _RefusedError:
        return None


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
