"""Read JSON files that are not trusted."""

from __future__ import annotations

import codecs
import json
import os
import sys
from pathlib import Path
from typing import Any

from cloq_export.errors import FormatError

# No JSON file of ours comes near this; a larger one is a mistake or an attack on memory.
MAX_JSON_BYTES = 64 * 1024 * 1024

# The longer marks first: the one of UTF-32 begins with the one of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON file that must hold one object.

    Args:
        path: the file.

    Returns:
        The object.

    Raises:
        FormatError: the file is missing, unreadable, too large, not JSON, or holds something else than an object.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            # Opening a pipe could wait forever.
            raise FormatError(f"{path} is no ordinary file; expected a JSON file.")
        with open(path, "rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist; check the path.") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}; check the path.") from error
    if len(data) > MAX_JSON_BYTES:
        raise FormatError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB; that is no file of this kind.")
    return parse_json(data, str(path))


def refuse_byte_order_mark(data: bytes, source: str) -> None:
    """Refuse text with a byte order mark before it, which transformers and the engines cannot read as JSON.

    Args:
        data: the text, or its first four bytes.
        source: what the text is, for the message.

    Raises:
        FormatError: the mark is there; the message names the encoding that it stands for.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    if encoding is not None:
        raise FormatError(
            f"{source} begins with a byte order mark of {encoding}; files of models are UTF-8 without a mark, and "
            "other programs refuse one. Save the file as UTF-8 without a byte order mark."
        )


def parse_json(data: bytes | str, source: str) -> dict[str, Any]:
    """Parse JSON text that must hold one object.

    Args:
        data: the text.
        source: what the text is, for the message.

    Returns:
        The object.

    Raises:
        FormatError: the text is not JSON in UTF-8 without a byte order mark, names a key twice, or holds something
            else than an object.
    """
    if isinstance(data, bytes):
        refuse_byte_order_mark(data, source)
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        value = json.loads(text, object_pairs_hook=distinct_keys)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{source} is not valid JSON ({describe_json_error(error)}); it is damaged or of another kind."
        ) from None
    if not isinstance(value, dict):
        raise FormatError(f"{source} holds a JSON {type(value).__name__}; expected an object.")
    return value


def describe_json_error(error: Exception) -> str:
    """Return in a few words why a text is not JSON.

    Args:
        error: what `json.loads` raised.
    """
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start + 1} is not UTF-8"
    if not isinstance(error, json.JSONDecodeError) and "integer string conversion" in str(error):
        return f"a number in it has more than {sys.get_int_max_str_digits()} digits"
    return str(error).splitlines()[0][:120]


def distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object, refusing a key that occurs twice: readers differ in which of the two they take.

    Args:
        pairs: of keys and values, as `json.loads` gives them to its `object_pairs_hook`.

    Raises:
        ValueError: a key occurs twice.
    """
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} occurs twice")
    return mapping
