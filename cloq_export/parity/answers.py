"""Asking a served model: greedy texts behind prompts, log-likelihoods of continuations, and what was right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cloq_export.engines.decoding import Ended
from cloq_export.engines.protocol import ServedModel
from cloq_export.engines.transformers.served import TransformersModel
from cloq_export.errors import FormatError, RunDirectoryError
from cloq_export.files.atomic import write_json
from cloq_export.files.safe_json import read_json
from cloq_export.texts.tokens import TextTokens

# What an answer is read as where none can be read.
INVALID = "[invalid]"

# Questions that are asked together, and behind which what was answered is kept; an engine batches by itself. Many
# prompts at a time cost a transformers model little more than few.
_CHUNK = 128
_CHUNK_OF_ENGINES = 256

Advance = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Answers:
    """What one model answered.

    Args:
        texts: what it wrote, cut where the answer ends; for choices the number of the choice that it takes.
        extracted: what each text is read as.
        correct: whether that is right.
        other: whether the answer is right by the task's other rule.
    """

    texts: tuple[str, ...]
    extracted: tuple[str, ...]
    correct: tuple[bool, ...]
    other: tuple[bool, ...]

    @property
    def accuracy(self) -> float:
        """Return the share of right answers."""
        return sum(self.correct) / len(self.correct)

    @property
    def other_accuracy(self) -> float:
        """Return the share of right answers by the task's other rule."""
        return sum(self.other) / len(self.other)


@dataclasses.dataclass(frozen=True)
class Respondent:
    """Who is asked.

    Args:
        model: the runtime.
        tokenizer: of the model.
        adapter: name of the adapter, or None.
    """

    model: ServedModel
    tokenizer: Any
    adapter: str | None = None


class AnswerStore:
    """A file that holds what was answered so far, so that a killed call goes on where it stopped.

    Args:
        path: the file; it is written after every few questions, whole or not at all.
        key: all that the answers depend on.

    Raises:
        RunDirectoryError: the file holds answers of another model or to other questions.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self.path, self.key = path, dict(key)
        self.answers: dict[int, Any] = {}
        if not path.exists():
            return
        try:
            held = read_json(path)
            self.answers = {int(number): answer for number, answer in held["answers"].items()}
        except (FormatError, KeyError, ValueError, AttributeError):
            raise RunDirectoryError(
                f"{path} holds no answers of `cloq eval`; delete it, or choose another `out`."
            ) from None
        differing = sorted(name for name in self.key if held.get("key", {}).get(name) != self.key[name])
        if differing:
            raise RunDirectoryError(
                f"{path} holds answers that were given under another {' and '.join(differing)}; choose another `out`, "
                "or delete it."
            )

    def add(self, answers: Mapping[int, Any]) -> None:
        """Keep more answers: number of the question -> answer."""
        self.answers |= answers
        content = {str(number): self.answers[number] for number in sorted(self.answers)}
        write_json(self.path, {"key": self.key, "answers": content}, sort_keys=False)


def continue_prompts(
    asked: Respondent,
    prompts: Sequence[str],
    *,
    cut: Callable[[str], str],
    max_new_tokens: int,
    store: AnswerStore | None = None,
    advance: Advance | None = None,
) -> list[str]:
    """Let a model continue texts, greedily; it is asked with the ids that were trained on (see `TextTokens`).

    Args:
        asked: who is asked.
        prompts: the texts.
        cut: from what a model wrote to what stands before the end of its answer.
        max_new_tokens: where an answer is cut that has not ended by itself.
        store: what was answered before, and where answers are kept; None keeps none.
        advance: told (answered, in all).

    Returns:
        list: what it wrote behind each prompt, cut, without special tokens.
    """
    model, tokenizer, adapter = asked.model, asked.tokenizer, asked.adapter
    tokens = TextTokens(tokenizer)
    ids = [tokens.prompt_ids(text) for text in prompts]
    options: dict[str, Any] = {}
    if isinstance(model, TransformersModel):
        # The answer is the same without: what comes behind its end is cut off below.
        options["ended"] = _ended(tokenizer, cut)

    def work(rows: Sequence[int]) -> list[Any]:
        new = model.generate([ids[row] for row in rows], [adapter] * len(rows), max_new_tokens, **options)
        return [_text_of(tokenizer, cut, tokens) for tokens in new]

    return _in_chunks(work, _chunk_of(model), [len(each) for each in ids], store, advance)


def score_continuations(
    asked: Respondent,
    pairs: Sequence[Sequence[tuple[str, str]]],
    *,
    store: AnswerStore | None = None,
    advance: Advance | None = None,
) -> list[list[float]]:
    """Return log p(continuation | context) in nats for every pair of every question.

    The two are tokenized together and parted as lm-evaluation-harness does; see `TextTokens.scored_ids`.

    Args:
        asked: who is asked.
        pairs: for each question (context, continuation) of each of its choices.
        store: as in `continue_prompts`.
        advance: as in `continue_prompts`.
    """
    model, adapter = asked.model, asked.adapter
    tokens = TextTokens(asked.tokenizer)
    encoded = [[tokens.scored_ids(*pair) for pair in question] for question in pairs]

    def work(rows: Sequence[int]) -> list[Any]:
        flat = [pair for row in rows for pair in encoded[row]]
        measured = model.prompt_logprobs([ids for ids, _ in flat], [adapter] * len(flat))
        scores = iter(
            float(values[len(values) - count :].double().sum())
            for values, (_, count) in zip(measured, flat, strict=True)
        )
        return [[next(scores) for _ in encoded[row]] for row in rows]

    longest = [max(len(ids) for ids, _ in question) for question in encoded]
    return _in_chunks(work, _chunk_of(model), longest, store, advance)


def agreement(first: Answers, second: Answers, normal_form: Callable[[str], str]) -> float:
    """Return the share of questions that two models answer alike, right or wrong.

    Args:
        first: of one model.
        second: of the other.
        normal_form: the form in which answers are compared.
    """
    pairs = list(zip(first.extracted, second.extracted, strict=True))
    return sum(normal_form(a) == normal_form(b) for a, b in pairs) / len(pairs)


def _in_chunks(
    work: Callable[[Sequence[int]], list[Any]],
    chunk: int,
    lengths: Sequence[int],
    store: AnswerStore | None,
    advance: Advance | None,
) -> list[Any]:
    """Return the result of every question, asked in chunks of like length; the chunks never depend on the store."""
    answers: dict[int, Any] = dict(store.answers) if store is not None else {}
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    for start in range(0, len(order), chunk):
        rows = order[start : start + chunk]
        if not all(row in answers for row in rows):
            new = dict(zip(rows, work(rows), strict=True))
            answers |= new
            if store is not None:
                store.add(new)
        if advance is not None:
            advance(start + len(rows), len(order))
    return [answers[row] for row in range(len(lengths))]


def _chunk_of(model: ServedModel) -> int:
    return _CHUNK if isinstance(model, TransformersModel) else _CHUNK_OF_ENGINES


def _text_of(tokenizer: Any, cut: Callable[[str], str], new: Sequence[int]) -> str:
    """Return what a model wrote, without special tokens; one of them may be what ends the answer."""
    text = cut(tokenizer.decode(list(new), skip_special_tokens=False))
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, "")
    return text


def _ended(tokenizer: Any, cut: Callable[[str], str]) -> Ended:
    # The longest end has two dozen letters, so the last tokens are enough; they are searched every few tokens.
    def ended(new: Sequence[int]) -> bool:
        text = tokenizer.decode(list(new)[-24:], skip_special_tokens=False)
        return len(cut(text)) < len(text)

    return ended
