"""Reading JSON files that nobody vouches for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cloq_export.errors import FormatError

# No JSON file of ours comes near this; a larger one is a mistake or an attack on memory.
MAX_JSON_BYTES = 64 * 1024 * 1024


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
            # A pipe would be waited for without end.
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


def parse_json(data: bytes | str, source: str) -> dict[str, Any]:
    """Parse JSON text that must hold one object.

    Args:
        data: the text.
        source: what the text is, for the message.

    Returns:
        The object.

    Raises:
        FormatError: the text is not JSON, names a key twice, or holds something else than an object.
    """
    try:
        value = json.loads(data, object_pairs_hook=distinct_keys)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise FormatError(f"{source} is not valid JSON ({reason}); it is damaged or of another kind.") from None
    if not isinstance(value, dict):
        raise FormatError(f"{source} holds a JSON {type(value).__name__}; expected an object.")
    return value


def distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object, refusing a key that stands there twice: readers differ in which of the two they take.

    Args:
        pairs: of keys and values, as `json.loads` gives them to its `object_pairs_hook`.

    Raises:
        ValueError: a key stands there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} stands there twice")
    return found
