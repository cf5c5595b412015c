"""Files that are either whole or absent: temporary file in the same folder, fsync, rename, fsync of the folder.

A process that is killed at any moment leaves at most a hidden `.NAME.TOKEN.partial`, which no reader looks at and
`remove_partials` clears. The same content always gives the same bytes: JSON keys and tensors are sorted, and nothing
that depends on time or machine is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cloq_export.errors import RunDirectoryError

PARTIAL_NAME = re.compile(r"\..+\.[0-9a-f]{8}\.partial")

# One write call moves at most 2 GiB on Linux; smaller pieces also keep an interrupt responsive.
_CHUNK = 64 * 1024 * 1024

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all.

    Args:
        path: the file; its folder exists.
        data: the content.

    Raises:
        RunDirectoryError: the disk is full, or the folder cannot be written; nothing is left behind.
    """
    _write_pieces(Path(path), (data,))


def write_json(path: str | os.PathLike[str], obj: Any, *, sort_keys: bool = True) -> None:
    """Write a JSON file whole or not at all, with strict JSON numbers.

    Args:
        path: the file; its folder exists.
        obj: mappings, sequences, dataclasses, paths, strings, numbers; NaN and Inf, which JSON has not, become null.
        sort_keys: False keeps the order of the keys, for mappings in which the first match wins.

    Raises:
        RunDirectoryError: the disk is full, or the folder cannot be written; nothing is left behind.
    """
    text = json.dumps(_json_value(obj), indent=2, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False)
    # A file name that is no text holds half surrogates, which JSON writes as escapes.
    write_bytes(path, (text + "\n").encode("utf-8", "backslashreplace"))


@contextlib.contextmanager
def write_folder(path: str | os.PathLike[str], *, owned: Callable[[Path], bool]) -> Iterator[Path]:
    """Give an empty folder to fill, which takes the place of `path` when the block ends well.

    A folder that already stands there is replaced only if it is empty or `owned` says that it is one of ours: a user
    who names a folder of other files must not lose them.

    Args:
        path: the folder to make; its parents are made too.
        owned: tells whether an existing, non-empty folder may be replaced.

    Returns:
        A context whose value is the folder to write into.

    Raises:
        RunDirectoryError: something else stands at `path`, the disk is full, or the place cannot be written.
    """
    target = Path(path)
    with translate_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise RunDirectoryError(f"{target} is not a folder; choose another folder to write to.")
        if target.is_dir() and any(target.iterdir()) and not owned(target):
            raise RunDirectoryError(
                f"{target} holds files that were not written by this command; choose an empty or new folder."
            )
        filling = partial_path(target)
        filling.mkdir()
    try:
        try:
            yield filling
        except OSError as error:
            # Only what a full disk raises: another OSError of the block may be about a file that it reads.
            if error.errno in _DISK_FULL:
                raise _write_error(target, error) from error
            raise
        with translate_os_errors(target):
            for folder, _, names in os.walk(filling):
                for name in names:
                    with open(os.path.join(folder, name), "rb") as file:
                        os.fsync(file.fileno())
                sync_folder(Path(folder))
            replaced = None
            if target.is_dir():
                # A non-empty folder cannot be replaced by one rename: a kill between the two leaves none at `path`,
                # and the command makes it again.
                replaced = partial_path(target)
                os.rename(target, replaced)
            os.rename(filling, target)
            sync_folder(target.parent)
            if replaced is not None:
                shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(filling, ignore_errors=True)
        raise


def remove_partials(folder: str | os.PathLike[str]) -> None:
    """Remove what killed writers left in one folder; only call it while holding the lock of that folder."""
    with contextlib.suppress(FileNotFoundError):
        for entry in Path(folder).iterdir():
            if not is_partial(entry.name):
                continue
            with contextlib.suppress(OSError):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink()


def is_partial(name: str) -> bool:
    """Return whether a file name is one that this module gives to unfinished files."""
    return PARTIAL_NAME.fullmatch(name) is not None


def make_folder(path: Path) -> None:
    """Make the folder that results will go to, so that it is known to take them before they are made.

    Args:
        path: of the folder; what lies in it stays.

    Raises:
        RunDirectoryError: it is a file, or cannot be made or written.
    """
    if path.exists() and not path.is_dir():
        raise RunDirectoryError(f"{path} is not a folder; choose another one with `out`.")
    with translate_os_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
        raise _write_error(path, PermissionError(errno.EACCES, ""))


@contextlib.contextmanager
def translate_os_errors(path: Path) -> Iterator[None]:
    """Turn an operating system error of the block into one line that names the path and the remedy.

    Args:
        path: what was being written.

    Raises:
        RunDirectoryError: the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise _write_error(path, error) from error


def _write_error(path: Path, error: OSError) -> RunDirectoryError:
    if error.errno in _DISK_FULL:
        return RunDirectoryError(
            f"the disk is full while writing {path}; free some space and run the same command again: "
            "what was finished before is kept."
        )
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return RunDirectoryError(
            f"{path} cannot be written: {reason}; choose another folder, or change its permissions."
        )
    return RunDirectoryError(f"{path} cannot be written: {reason}; choose another folder.")


def _write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    with translate_os_errors(path):
        partial = partial_path(path)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            try:
                for piece in pieces:
                    write_all(descriptor, memoryview(piece))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise
        sync_folder(path.parent)


def write_all(descriptor: int, view: memoryview) -> None:
    """Write all bytes to an open file, from where it stands."""
    done = 0
    while done < len(view):
        done += os.write(descriptor, view[done : done + _CHUNK])


def partial_path(path: Path) -> Path:
    """Return a new name for the unfinished file or folder that is to become `path`, beside it."""
    # A long module name must not push the temporary name past the 255 bytes that file systems allow.
    return path.with_name(f".{path.name[-200:]}.{secrets.token_hex(4)}.partial")


def sync_folder(folder: Path) -> None:
    """Have the system put the names in a folder on the disk."""
    if os.name == "nt":  # Windows cannot open a folder; its rename is durable by itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json_value(obj: Any) -> Any:
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: _json_value(getattr(obj, field.name)) for field in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        return {str(key): _json_value(value) for key, value in obj.items()}
    if isinstance(obj, (set, frozenset)):
        return sorted(_json_value(value) for value in obj)
    if isinstance(obj, (list, tuple)):
        return [_json_value(value) for value in obj]
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    return obj
