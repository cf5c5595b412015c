"""What an adapter learns from: plain text, prompts with their completions, and chats, read from text and JSON files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from cloq_export.errors import DataError
from cloq_export.files.spelled_paths import expand_user
from cloq_export.texts.reading import ALLOWED, holds_rows, read_rows, read_text

ROLES = ("system", "user", "assistant")
# Where chats are found, and who speaks in those that say "from" and "value" (ShareGPT's form).
_CHAT_FIELDS = ("messages", "conversations")
_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
}
# Fields that a chat template would write, or another trainer would obey: a chat without them is another chat.
_ROW_EXTRAS = (
    *("tools", "functions", "documents", "chat_template", "chat_template_kwargs", "system", "system_prompt", "history"),
    *("images", "image", "videos", "video", "audios", "audio"),
)
# Fields that stand between a question and its answer; beside a plain text they are notes about it.
_ASKED_WITH = ("context", "passage", "choices", "options")
# Of a message, each with the values that ask for nothing.
_MESSAGE_EXTRAS: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tool_calls", "tool_call_id", "function_call", "reasoning_content", "reasoning", "thinking"), ()),
    **dict.fromkeys(("refusal", "images", "audio", "training_detail", "train_detail"), ()),
    **dict.fromkeys(("weight", "train", "training", "loss"), (True,)),
    **dict.fromkeys(("mask", "masked", "prefix"), (False,)),
}
_NOTHING: tuple[Any, ...] = (None, "", "[]", "null", [], {})
# The forms that a row can have, each with all of its fields; where a row without a value is read, the first counts.
_FORMS = (
    *((field,) for field in _CHAT_FIELDS),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("question", "answer"),
    ("text",),
)
_NAMED_FORMS = (
    "'messages' or 'conversations'; 'prompt' and 'completion'; 'instruction' and 'output'; 'question' and 'answer'; or "
    "'text'"
)


@dataclasses.dataclass(frozen=True)
class Example:
    """One text to learn.

    Args:
        prompt: what stands before and is not learned; None makes the completion plain text, all of it learned.
        completion: what is learned. Nothing is put between the two: a blank that belongs there stands in one of them.
    """

    prompt: str | None
    completion: str


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a chat.

    Args:
        role: "system", "user" or "assistant".
        content: its text.
    """

    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class ChatExample:
    """A chat to learn the assistant's turns of; the model's own chat template makes a text of it.

    Args:
        messages: in order, the assistant's last; a system message can only be the first.
        where: which row it is, for error messages; it does not count when chats are compared.
    """

    messages: tuple[Message, ...]
    where: str = dataclasses.field(default="", compare=False)


AnyExample: TypeAlias = Example | ChatExample


@dataclasses.dataclass(frozen=True)
class ExampleSet:
    """Examples and where they came from.

    Args:
        examples: in the order of their source, at least one.
        origin: a file path, "hub:<id>", or "generated (<what>)", for reports.
        sha256: of the examples, hexadecimal: equal examples in equal order have equal hashes.
    """

    examples: tuple[AnyExample, ...]
    origin: str
    sha256: str

    @classmethod
    def of(cls, examples: Iterable[AnyExample], origin: str) -> ExampleSet:
        """Return the examples with their hash.

        Args:
            examples: at least one.
            origin: where they came from, for reports and messages.

        Raises:
            DataError: there is none.
        """
        kept = tuple(examples)
        if not kept:
            raise DataError(f"{origin} holds no example; {ALLOWED}.")
        digest = hashlib.sha256()
        for example in kept:
            content = dataclasses.asdict(example)
            content.pop("where", None)
            digest.update(json.dumps(content, sort_keys=True).encode("utf-8") + b"\n")
        return cls(kept, origin, digest.hexdigest())


def question_prompt(question: str) -> str:
    """Return the text before an answer, as lm-evaluation-harness writes it for GSM8K."""
    return f"Question: {question}\nAnswer:"


def instruction_prompt(instruction: str, given: str = "") -> str:
    """Return the text before a response, as Alpaca writes it, and LLM-Adapters for Math10K and Commonsense170K.

    Args:
        instruction: what is to be done.
        given: what it is to be done with; may be empty.
    """
    if given:
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. Write "
            f"a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n"
            f"{given}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    )


def read_examples(path: str | Path) -> ExampleSet:
    """Read a file of examples.

    A .jsonl or .json file holds rows, as `read_rows` reads them; any other is one plain text. A row has 'messages' or
    'conversations', with 'role' and 'content' or 'from' and 'value'; or 'prompt' and 'completion', taken as they are;
    or 'instruction', 'output' and perhaps 'input'; or 'question' and 'answer'; or 'text'. A row of two forms is
    refused, unless its 'text' is what the other form comes to.

    Args:
        path: the file.

    Raises:
        DataError: it is missing, empty or unreadable, or a line of it is too long or malformed: the message gives the
            line's number.
    """
    path = expand_user(path)
    if not holds_rows(path):
        return ExampleSet.of(_text_examples(read_text(path)), str(path))
    return ExampleSet.of((example_of(row, where) for where, row in read_rows(path)), str(path))


def example_of(row: Mapping[str, Any], where: str) -> AnyExample:
    """Return what one row of a file or a data set says.

    Args:
        row: its fields.
        where: which row it is, for messages.

    Raises:
        DataError: it has the fields of no known form or of two, or one of them is no text or empty; or it has one that
            would stand in the prompt and is not read.
    """
    form = next(iter(forms_of(row, where)), ())
    for extra in (*_ROW_EXTRAS, *(_ASKED_WITH if form != ("text",) else ())):
        if row.get(extra) not in _NOTHING:
            remedy = "Make it the first message" if extra.startswith("system") else "Write it into the prompt"
            raise DataError(
                f"{where} has {extra!r}, which cannot be learned with: it would stand before the answer. {remedy}, "
                "or take it out."
            )
    if form == ("prompt", "completion") and row.get("label") is False:
        raise DataError(
            f"{where} has 'label': false, which calls its completion a bad one; every completion is learned here. "
            "Delete the row."
        )
    if len(form) == 1 and form[0] in _CHAT_FIELDS:
        return _chat_of(row, form[0], where)
    if form == ("text",):
        return Example(None, text_of(row, "text", where))
    if form:
        return _answered(row, form, where)
    raise DataError(
        f"{where} has the fields {', '.join(str(name)[:40] for name in list(row)[:12]) or 'none'}; a row holds "
        f"{_NAMED_FORMS}. Rename its fields."
    )


def forms_of(row: Mapping[str, Any], where: str) -> list[tuple[str, ...]]:
    """Return the fields of the form that a row has: of two forms if the second is the 'text' of the first, of none.

    Args:
        row: its fields.
        where: which row it is, for messages.

    Raises:
        DataError: it has two forms that say different things.
    """
    filled = [form for form in _FORMS if all(row.get(field) not in _NOTHING for field in form)]
    if len(filled) > 1 and not _is_text_of(row, filled, where):
        first, second = (" and ".join(map(repr, form)) for form in filled[:2])
        raise DataError(
            f"{where} can be read in two ways, by {first} or by {second}, and they say different things; a row has one "
            "form. Take the fields of the other one out."
        )
    return filled or [form for form in _FORMS if all(field in row for field in form)][:1]


def text_of(row: Mapping[str, Any], field: str, where: str) -> str:
    """Return a field of a row that has to be text.

    Args:
        row: its fields.
        field: which of them.
        where: which row it is, for messages.

    Raises:
        DataError: it is no text, or empty.
    """
    text = row.get(field)
    if not isinstance(text, str) or not text.strip():
        fault = "empty" if isinstance(text, str) else "no text"
        hint = " A chat goes into 'messages'." if isinstance(text, list) else ""
        raise DataError(f"{where}: {field!r} is {fault}; mend the line, or delete it.{hint}")
    return text


def numbered_rows(rows: Iterable[Mapping[str, Any]], origin: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (which row it is, for messages; the row) of a data set on the hub, without the empty texts among them.

    In a file an empty text is a mistake that its owner can mend. Sets on the hub, such as WikiText, hold them on
    purpose.

    Args:
        rows: the rows.
        origin: the name of the set.
    """
    for number, row in enumerate(rows, start=1):
        text = row.get("text")
        empty = isinstance(text, str) and not text.strip()
        if not empty or forms_of(row, origin) != [("text",)]:
            yield f"row {number} of {origin}", row


def _is_text_of(row: Mapping[str, Any], forms: Sequence[tuple[str, ...]], where: str) -> bool:
    """Return whether the second of two forms is the text that the first comes to, as in Alpaca's own files."""
    if len(forms) != 2 or len(forms[0]) != 2 or forms[1] != ("text",):
        return False
    example = _answered(row, forms[0], where)
    return f"{example.prompt}{example.completion}".strip() == text_of(row, "text", where).strip()


def _answered(row: Mapping[str, Any], form: tuple[str, ...], where: str) -> Example:
    """Return the example that a row of a prompt and its completion is."""
    first, second = (text_of(row, field, where) for field in form)
    if form == ("instruction", "output"):
        given = row.get("input") or ""
        if not isinstance(given, str):
            raise DataError(f"{where}: 'input' is no text; mend the line.")
        return Example(instruction_prompt(first, given), second)
    if form == ("question", "answer"):
        return Example(question_prompt(first), f" {second}")
    return Example(first, second)


def _text_examples(text: str) -> Sequence[Example]:
    return [Example(None, text)] if text.strip() else []


def _chat_of(row: Mapping[str, Any], field: str, where: str) -> ChatExample:
    turns = row[field]
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"{where}: {field!r} is no list of messages; each has 'role' and 'content', or 'from' and 'value'. Mend "
            "the line."
        )
    messages = [_message_of(entry, f"{where}, message {number}") for number, entry in enumerate(turns, start=1)]
    for number, message in enumerate(messages, start=1):
        if message.role == "system" and number > 1:
            raise DataError(f"{where}, message {number} is a system message behind others; it can only be the first.")
    if messages[-1].role != "assistant":
        raise DataError(f"{where}: the last message is the {messages[-1].role}'s; a chat to learn ends with assistant.")
    return ChatExample(tuple(messages), where)


def _message_of(entry: Any, which: str) -> Message:
    twice = [
        pair for pair in (("role", "from"), ("content", "value")) if isinstance(entry, dict) and {*pair} <= {*entry}
    ]
    if twice:
        raise DataError(
            f"{which} has {twice[0][0]!r} and {twice[0][1]!r}, two words for one thing; leave 'role' and 'content', or "
            "'from' and 'value'."
        )
    if isinstance(entry, dict) and "from" in entry:
        speaker, content = entry["from"], "value"
        role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise DataError(f"{which} is from {str(speaker)[:40]!r}; allowed are {', '.join(_SPEAKERS)}.")
    else:
        role, content = entry.get("role") if isinstance(entry, dict) else None, "content"
        if role not in ROLES:
            raise DataError(f"{which} has the role {str(role)[:40]!r}; allowed are {', '.join(ROLES)}.")
    for extra, idle in _MESSAGE_EXTRAS.items():
        if entry.get(extra) not in (*_NOTHING, *idle):
            raise DataError(
                f"{which} has {extra!r}, which cannot be learned with; only its {content!r} is. Write what is to be "
                "learned there, or take it out."
            )
    if isinstance(entry.get(content), list):
        raise DataError(
            f"{which}: {content!r} is a list of parts; only plain text is read. Write what they say as one text."
        )
    return Message(role, text_of(entry, content, which))
