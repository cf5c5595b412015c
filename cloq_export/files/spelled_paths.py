"""Paths as people type them: a tilde, signs that also join lists, another spelling of the same place."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from cloq_export.errors import UsageError


def expand_user(path: str | os.PathLike[str]) -> Path:
    """Return a path with a leading tilde made into a home folder; it stays as it is where that folder is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no HOME, and no user of this number or name
        return Path(path)


def require_text(path: str | os.PathLike[str]) -> None:
    """Refuse a path that is no text before anything is done with it.

    Raises:
        UsageError: its bytes are not UTF-8, and safetensors opens no such path.
    """
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(
            f"the name {os.fspath(path)} is not UTF-8, and safetensors opens no such file; rename it, or take another."
        ) from None


def split_list(text: str, separator: str, *, label: str = "") -> list[str]:
    """Return the entries of a list, in which the name of a file that is there may hold the separator.

    Args:
        text: the entries with separators between them.
        separator: one sign.
        label: what ends the label of an entry, which stands before its file; none unless given.
    """
    pieces = text.split(separator)
    entries, start = [], 0
    while start < len(pieces):
        # The longest first, so that a part of a name is not taken for a file of its own.
        ends = range(len(pieces), start + 1, -1)
        stop = next((end for end in ends if _is_file(pieces[start:end], separator, label)), start + 1)
        entries.append(separator.join(pieces[start:stop]).strip())
        start = stop
    return entries


def _is_file(pieces: list[str], separator: str, label: str) -> bool:
    name = separator.join(pieces).strip()
    if label:
        if label not in pieces[0]:
            return False  # the label of another entry
        name = name.partition(label)[2]
    try:
        return bool(name) and expand_user(name).is_file()
    except (OSError, ValueError):  # longer than a name can be, or with a zero byte
        return False


def is_same_place(one: object, other: object) -> bool:
    """Return whether two texts are spellings of one file or folder that is there."""
    if not isinstance(one, str) or not isinstance(other, str):
        return False
    try:
        return expand_user(one).samefile(expand_user(other))
    except (OSError, ValueError):
        return False


def command_line(*words: object) -> str:
    """Return a command as it can be pasted into a shell."""
    return " ".join(shlex.quote(str(word)) for word in words)
