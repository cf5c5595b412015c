"""What an adapter learns from: plain text, prompts with their completions, and chats, read from text and JSON files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from cloq_export.errors import DataError, FormatError
from cloq_export.run.safe_json import parse_json
from cloq_export.run.spelled_paths import expand_user

# Longer than any book; a line or a file beyond is a mistake or an attack on memory.
MAX_LINE_BYTES = 16 * 1024 * 1024
MAX_FILE_BYTES = 2 * 1024 * 1024 * 1024

ROLES = ("system", "user", "assistant")
_TEXT_SUFFIXES = (".txt", ".md")
_JSON_SUFFIXES = (".jsonl", ".json")
_ROW_FORMS = "'messages'; 'prompt' and 'completion'; 'instruction' and 'output'; 'question' and 'answer'; or 'text'"


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
    """

    messages: tuple[Message, ...]


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
        found = tuple(examples)
        if not found:
            raise DataError(f"{origin} holds no example; {_allowed()}")
        digest = hashlib.sha256()
        for example in found:
            digest.update(json.dumps(dataclasses.asdict(example), sort_keys=True).encode("utf-8") + b"\n")
        return cls(found, origin, digest.hexdigest())


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

    A .txt or .md file is one plain text. A .jsonl file holds one object a line, a .json file a list of such objects.
    A row has 'messages'; or 'prompt' and 'completion', taken as they are; or 'instruction', 'output' and perhaps
    'input'; or 'question' and 'answer'; or 'text'; the first form that fits counts.

    Args:
        path: the file.

    Raises:
        DataError: it is missing, empty or unreadable, or a line of it is empty, too long or malformed: the message
            gives the line's number.
    """
    path = expand_user(path)
    suffix = path.suffix.lower()
    if suffix not in (*_TEXT_SUFFIXES, *_JSON_SUFFIXES):
        raise DataError(f"{path} is a {suffix or 'nameless kind of'} file; {_allowed()}")
    if suffix in _TEXT_SUFFIXES:
        return ExampleSet.of(_text_examples(_read_text(path)), str(path))
    if suffix == ".jsonl":
        return ExampleSet.of((example_of(row, where) for where, row in read_rows(path)), str(path))
    return ExampleSet.of((example_of(row, where) for where, row in read_list(path)), str(path))


def example_of(row: Mapping[str, Any], where: str) -> AnyExample:
    """Return what one row of a file or a data set says.

    Args:
        row: its fields.
        where: which row it is, for messages.

    Raises:
        DataError: it has the fields of no known form, or one of them is no text or empty.
    """
    if "messages" in row:
        return ChatExample(_messages_of(row["messages"], where))
    if "prompt" in row and "completion" in row:
        return Example(_text_of(row, "prompt", where), _text_of(row, "completion", where))
    if "instruction" in row and "output" in row:
        given = row.get("input") or ""
        if not isinstance(given, str):
            raise DataError(f"{where}: 'input' is no text; mend the line.")
        prompt = instruction_prompt(_text_of(row, "instruction", where), _encodable(given, "input", where))
        return Example(prompt, _text_of(row, "output", where))
    if "question" in row and "answer" in row:
        question, answer = _text_of(row, "question", where), _text_of(row, "answer", where)
        return Example(question_prompt(question), f" {answer}")
    if "text" in row:
        return Example(None, _text_of(row, "text", where))
    raise DataError(
        f"{where} has the fields {', '.join(str(name)[:40] for name in list(row)[:12]) or 'none'}; a row holds "
        f"{_ROW_FORMS}. Rename its fields."
    )


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (which line it is, for messages; the object) of a JSON-lines file.

    Raises:
        DataError: the file is missing or unreadable, or a line is empty, too long, not UTF-8 or no JSON object; empty
            lines at the end are left out.
    """
    empty = 0
    for number, line in enumerate(_read_lines(path), start=1):
        where = f"line {number} of {path}"
        if not line.strip():
            empty = empty or number
            continue
        if empty:
            raise DataError(f"line {empty} of {path} is empty; each line holds one JSON object. Delete the line.")
        try:
            yield where, parse_json(line.decode("utf-8"), where)
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is not UTF-8 text (byte {error.start + 1} of the line); mend the line.") from None
        except FormatError:
            raise DataError(
                f"{where} is not a JSON object; each line holds one with {_ROW_FORMS}. Mend the line, or fetch the "
                "file again."
            ) from None


def read_list(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (which item it is, for messages; the object) of a file that holds one JSON list.

    Raises:
        DataError: the file is missing or unreadable, or is no list of objects.
    """
    try:
        rows = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not valid JSON ({str(error).splitlines()[0][:120]}); a .json file holds one list of objects. "
            "Where each line is an object of its own, name the file .jsonl."
        ) from None
    if not isinstance(rows, list):
        raise DataError(f"{path} holds no JSON list; a .json file holds one list of objects.")
    for number, row in enumerate(rows, start=1):
        where = f"item {number} of {path}"
        if not isinstance(row, dict):
            raise DataError(f"{where} is not a JSON object; a row holds {_ROW_FORMS}. Mend the file.")
        yield where, row


def _allowed() -> str:
    return "give plain text (.txt), JSON lines (.jsonl) or a JSON list (.json) in UTF-8."


def _text_examples(text: str) -> Sequence[Example]:
    return [Example(None, text)] if text.strip() else []


def _messages_of(found: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(found, list) or not found:
        raise DataError(f"{where}: 'messages' is no list of messages; each has 'role' and 'content'. Mend the line.")
    messages = []
    for number, entry in enumerate(found, start=1):
        which = f"{where}, message {number}"
        role = entry.get("role") if isinstance(entry, dict) else None
        if role not in ROLES:
            raise DataError(f"{which} has the role {str(role)[:40]!r}; allowed are {', '.join(ROLES)}.")
        if role == "system" and number > 1:
            raise DataError(f"{which} is a system message behind others; it can only be the first.")
        messages.append(Message(role, _text_of(entry, "content", which)))
    if messages[-1].role != "assistant":
        raise DataError(f"{where}: the last message is the {messages[-1].role}'s; a chat to learn ends with assistant.")
    return tuple(messages)


def _text_of(row: Mapping[str, Any], field: str, where: str) -> str:
    text = row.get(field)
    if not isinstance(text, str) or not text.strip():
        found = "empty" if isinstance(text, str) else "no text"
        raise DataError(f"{where}: {field!r} is {found}; mend the line, or delete it.")
    return _encodable(text, field, where)


def _encodable(text: str, field: str, where: str) -> str:
    # JSON can name halves of a sign that no text has, and tokenizers fail on them.
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DataError(f"{where}: {field!r} holds half of a surrogate pair, which is no text; mend the line.")
    return text


def _read_text(path: Path) -> str:
    data = b"".join(_read_lines(path, longest=MAX_FILE_BYTES))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"line {line} of {path} is not UTF-8 text; mend the line, or convert the file.") from None


def _read_lines(path: Path, *, longest: int | None = None) -> Iterator[bytes]:
    longest = MAX_LINE_BYTES if longest is None else longest
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            # A pipe would be waited for without end.
            raise DataError(f"{path} is no ordinary file; {_allowed()}")
        with open(path, "rb") as file:
            total, number = 0, 0
            while line := file.readline(longest + 1):
                number += 1
                total += len(line)
                if len(line) > longest:
                    raise DataError(
                        f"line {number} of {path} is longer than {longest} bytes; that is no example. Split it."
                    )
                if total > MAX_FILE_BYTES:
                    raise DataError(f"{path} is larger than {MAX_FILE_BYTES} bytes; give a part of it.")
                yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; check the path.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); check the path.") from None
