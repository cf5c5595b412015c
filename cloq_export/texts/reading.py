"""Files of plain text and of JSON rows, read in the same way for every purpose."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cloq_export.errors import DataError
from cloq_export.files.safe_json import describe_json_error, distinct_keys

# Longer than any book; a line or a file beyond is a mistake or an attack on memory.
MAX_LINE_BYTES = 16 * 1024 * 1024
MAX_FILE_BYTES = 2 * 1024 * 1024 * 1024

TEXT_SUFFIXES = (".txt", ".md", ".text")
ROW_SUFFIXES = (".jsonl", ".json", ".ndjson")
_PACKED_SUFFIXES = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar")
_TABLE_SUFFIXES = (".parquet", ".arrow", ".feather", ".csv", ".tsv", ".xls", ".xlsx")
# What a name can end with that is certainly meant to be a file.
FILE_SUFFIXES = (*TEXT_SUFFIXES, *ROW_SUFFIXES, *_PACKED_SUFFIXES, *_TABLE_SUFFIXES)

ALLOWED = "give plain text (.txt), or JSON lines or a JSON list (.jsonl, .json), in UTF-8"

_MARK = b"\xef\xbb\xbf"
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"\xfd7zXZ\x00": "xz",
    b"BZh91AY&": "bzip2",
    b"7z\xbc\xaf\x27\x1c": "7z",
}
# Files of other kinds that begin with letters.
_NO_TEXT = {b"PAR1": "Parquet", b"ARROW1\0\0": "Arrow", b"SQLite f": "SQLite", b"%PDF-": "PDF"}
_LIKE_ROWS = re.compile(rb"\s*(?:\{\s*\"|\[\s*\{\s*\")")
_HALF_PAIR = re.compile("[\ud800-\udfff]")
# What JSON names a half with, and the two halves of a pair.
_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def holds_rows(path: Path) -> bool:
    """Return whether a file holds JSON rows, False for one plain text; its name says it.

    Args:
        path: the file.

    Raises:
        DataError: it is of a kind that is not read, or its name says nothing and it begins as JSON rows do.
    """
    suffix = path.suffix.lower()
    if suffix in ROW_SUFFIXES:
        return True
    if suffix in _PACKED_SUFFIXES:
        raise DataError(f"{path} is a {suffix} file, which is packed; unpack it first, then {ALLOWED}.")
    if suffix in _TABLE_SUFFIXES:
        raise DataError(f"{path} is a {suffix} file; {ALLOWED}. Convert it first.")
    if suffix not in TEXT_SUFFIXES:
        with _opened(path) as file:
            if _LIKE_ROWS.match(file.read(256).removeprefix(_MARK)):
                raise DataError(
                    f"{path} begins as JSON does, and its name does not say so; name it .jsonl to have its rows read, "
                    "or .txt to have it taken as plain text."
                )
    return False


def read_text(path: Path) -> str:
    """Return a file of plain text: without the byte order mark before it, every line ended by a line feed.

    Args:
        path: the file.

    Raises:
        DataError: it is missing, unreadable, too large, packed, or not UTF-8: the message gives the line.
    """
    with _opened(path) as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise DataError(f"{path} is larger than {MAX_FILE_BYTES} bytes; give a part of it.")
    data = _without_mark(data)
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"line {line} of {path} is not UTF-8 text; mend the line, or convert the file.") from None


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (which line or item it is, for messages; the object) of a file of JSON rows.

    What the file holds decides, not its name: an object on each line, one list of objects, or one object. Lines end
    with a line feed, a carriage return, or both, and with nothing else: U+2028, U+2029 and U+0085 may stand in a
    string. Byte order marks before a line and empty lines at the end are passed over.

    Args:
        path: the file.

    Raises:
        DataError: the file is missing, unreadable or packed, or a line or item is empty, too long, not UTF-8, no JSON
            object, names a key twice, or holds half of a surrogate pair, which no text has.
    """
    first, empty = True, 0
    for number, line in _lines(path):
        where = f"line {number} of {path}"
        if not line.strip():
            empty = empty or number
            continue
        if empty:
            raise DataError(f"line {empty} of {path} is empty; each line holds one JSON object. Delete the line.")
        if first:
            begins = line.strip()
            if begins.startswith(b"["):
                yield from _listed_rows(path)
                return
            if begins.startswith(b"{") and not _is_json(line):
                whole = _one_object(path, laid_out=begins == b"{")
                if whole is not None:
                    yield where, whole
                    return
        first = False
        yield where, _object(line, where)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) of a file; a byte order mark before a line is taken off."""
    with _opened(path) as file:
        # Each byte is one sign in Latin-1, so that lines are cut where Python cuts those of text files.
        signs = io.TextIOWrapper(file, encoding="latin-1", newline=None)
        number = total = 0
        while line := signs.readline(MAX_LINE_BYTES + 1):
            number += 1
            total += len(line)
            if len(line) > MAX_LINE_BYTES:
                raise DataError(
                    f"line {number} of {path} is longer than {MAX_LINE_BYTES} bytes; that is no example. Split it."
                )
            if total > MAX_FILE_BYTES:
                raise DataError(f"{path} is larger than {MAX_FILE_BYTES} bytes; give a part of it.")
            yield number, _without_mark(line.encode("latin-1"))


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        text = line.decode("utf-8")
        row = _parse(text)
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text (byte {error.start + 1} of the line); mend the line.") from None
    except (ValueError, RecursionError) as error:
        raise _no_object(where, _reason(error)) from None
    if not isinstance(row, dict):
        raise _no_object(where, f"it is a JSON {type(row).__name__}")
    return _checked(row, where) if _ESCAPED_HALF.search(text) else row


def _listed_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text = read_text(path)
    try:
        rows = _parse(text)
    except (ValueError, RecursionError) as error:
        raise _no_json(path, error) from None
    suspect = _ESCAPED_HALF.search(text) is not None
    for number, row in enumerate(rows, start=1):
        where = f"item {number} of {path}"
        if not isinstance(row, dict):
            raise _no_object(where, f"it is a JSON {type(row).__name__}")
        yield where, _checked(row, where) if suspect else row


def _one_object(path: Path, *, laid_out: bool) -> dict[str, Any] | None:
    """Return the object that a file is, over several lines; None if it is none, an error if it can be nothing else."""
    with _opened(path) as file:
        data = file.read(MAX_LINE_BYTES + 1)
    try:
        row = _parse(_without_mark(data).decode("utf-8")) if len(data) <= MAX_LINE_BYTES else None
    except (ValueError, RecursionError) as error:
        if laid_out and isinstance(error, json.JSONDecodeError) and error.lineno > 1:
            raise _no_json(path, error) from None
        return None
    return _checked(row, str(path)) if isinstance(row, dict) else None


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=distinct_keys)


def _is_json(line: bytes) -> bool:
    try:
        _parse(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return False
    return True


def _checked(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a row, refusing halves of surrogate pairs: JSON can name them, and neither UTF-8 nor a tokenizer can."""
    for field, content in row.items():
        waiting = [field, content]
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict):
                waiting += [*value, *value.values()]
            elif isinstance(value, list):
                waiting += value
            elif isinstance(value, str) and _HALF_PAIR.search(value):
                raise DataError(
                    f"{where}: {field!r} holds half of a surrogate pair, which is no text; mend the line, or delete it."
                )
    return row


def _no_object(where: str, reason: str) -> DataError:
    return DataError(
        f"{where} is not a JSON object ({reason}); a row is one object with its fields. Mend the line, or fetch the "
        "file again."
    )


def _no_json(path: Path, error: Exception) -> DataError:
    where = f"line {error.lineno} of {path}" if isinstance(error, json.JSONDecodeError) else str(path)
    return DataError(
        f"{where} is not valid JSON ({_reason(error)}); a file of rows holds one object on each line, or one list of "
        "objects. Mend it, or fetch it again."
    )


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return describe_json_error(error)


def _without_mark(data: bytes) -> bytes:
    while data.startswith(_MARK):
        data = data.removeprefix(_MARK)
    return data


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file of text, refusing what certainly is none; errors of reading it become a `DataError`."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            # Opening a pipe could wait forever.
            raise DataError(f"{path} is no ordinary file; {ALLOWED}.")
        with open(path, "rb") as file:
            _check_beginning(file.read(8), path)
            file.seek(0)
            yield file
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; check the path.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); check the path.") from None


def _check_beginning(head: bytes, path: Path) -> None:
    for sign, name in _PACKED.items():
        if head.startswith(sign):
            raise DataError(f"{path} holds {name} data; unpack it first, then {ALLOWED}.")
    for sign, name in _NO_TEXT.items():
        if head.startswith(sign):
            raise DataError(f"{path} holds {name} data; {ALLOWED}. Convert it first.")
    wide = None
    # UTF-16 and UTF-32 without a mark: common characters leave every second byte empty.
    if head.startswith((b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")) or re.match(rb"\0\0\0[^\0]|[^\0]\0\0\0", head):
        wide = "UTF-32"
    elif head.startswith((b"\xff\xfe", b"\xfe\xff")) or re.match(rb"(\0[^\0]){2}|([^\0]\0){2}", head):
        wide = "UTF-16"
    if wide is not None:
        raise DataError(
            f"line 1 of {path} is not UTF-8 text: the file is {wide}. Convert it, for example with "
            f"iconv -f {wide} -t UTF-8."
        )
