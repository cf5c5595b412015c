"""The files that a certificate covers: what lies in the folder of an export, and what may lie there beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from cloq_export.errors import FormatError
from cloq_export.files.safe_paths import require_inside

# Of a file in an export; every file system allows as much.
LONGEST_NAME = 255
# What the hub and its client put beside the files of a model; no engine reads any of it.
_HUB_ATTRIBUTES = ".gitattributes"
_HUB_ATTRIBUTE_LINE = re.compile(r"(#.*|\S+( (filter|diff|merge)=lfs| -text)+)?")
_HUB_CACHE = re.compile(r"\.cache/huggingface/(\.gitignore|CACHEDIR\.TAG|download/.+\.(metadata|lock))")
_HUB_CACHE_BYTES = 4096
_BUFFER = 4 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """What identifies a file: its size and the SHA-256 of its bytes."""

    bytes: int | None
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """Return the entry of a file.

        Raises:
            FormatError: it cannot be read.
        """
        digest, size = hashlib.sha256(), 0
        try:
            with open(path, "rb", buffering=0) as file:
                while piece := file.read(_BUFFER):
                    digest.update(piece)
                    size += len(piece)
        except OSError as error:
            raise FormatError(f"{path} cannot be read: {error.strerror or error}; check the path.") from error
        return cls(size, digest.hexdigest())


def covered_files(folder: Path, not_covered: Collection[str]) -> Iterator[tuple[str, Path]]:
    """Yield (name, path) of all files of a folder that a certificate of it has to cover.

    Args:
        folder: the export.
        not_covered: names that are left out.

    Raises:
        FormatError: what lies there is no file of the folder.
    """
    for name in entries_of(folder):
        if name not in not_covered:
            _refuse_no_file(folder, folder / name)
            yield name, folder / name


def entries_of(folder: Path) -> list[str]:
    """Return the names of all that lies in a folder but folders themselves, hidden files and links included, sorted.

    A link to a folder is an entry and is not entered: what it leads to lies elsewhere.

    Raises:
        FormatError: a folder in it cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise FormatError(f"{error.filename} cannot be read: {error.strerror or error}; check the path.") from error

    names: list[str] = []
    for place, folders, files in os.walk(folder, onerror=refuse):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        names += [Path(place, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(names)


def refuse_extras(
    folder: Path, names: Iterable[str], certified: Collection[str], not_covered: Collection[str]
) -> list[str]:
    """Refuse files that a certificate does not name.

    Args:
        folder: the export.
        names: what lies in it.
        certified: what the certificate names.
        not_covered: names that it leaves out.

    Returns:
        What may lie there nevertheless: files of the hub and its client.

    Raises:
        FormatError: something else lies there.
    """
    allowed = []
    for name in names:
        if name in certified:
            continue
        path = folder / name
        if name in not_covered or _is_of_the_hub(name, path):
            _refuse_no_file(folder, path)
            allowed += [name] if name not in not_covered else []
            continue
        kind = _kind_of(path)
        twin = next((other for other in sorted(certified) if _folded(other) == _folded(name)), None)
        like = f", which names {twin!a:.80}, another file," if twin is not None else ""
        # An odd name is shown with its characters escaped, since it may look like one that belongs here.
        shown = path if name.isascii() and name.isprintable() else f"{folder}: {name!a:.120}"
        raise FormatError(
            f"{shown} is {kind} in the export and not in its certificate{like or ','} and engines may read it; remove "
            "it, or write the export again."
        )
    return allowed


def refuse_changed_files(folder: Path, names: Collection[str], certified: Mapping[str, FileEntry]) -> None:
    """Refuse a folder that lacks a certified file, or holds another in its place.

    Args:
        folder: the export.
        names: what lies in it.
        certified: name -> what was certified.

    Raises:
        FormatError: a file is missing, is none, or differs.
    """
    for name, noted in sorted(certified.items()):
        path = folder / name
        if name not in names:
            twins = sorted(other for other in names if _folded(other) == _folded(name))
            seen = f" (there is {twins[0]!a:.80}, which is another name)" if twins else ""
            raise FormatError(
                f"{folder} lacks {name!r:.80}, which its certificate names{seen}; fetch or write the export again."
            )
        _refuse_no_file(folder, path)
        measured = FileEntry.of(path)
        if measured != noted:
            raise FormatError(
                f"{path} is not the file that was certified (sha256 {measured.sha256[:12]}…, {measured.bytes} bytes; "
                f"certified {noted.sha256!r:.12}…, {noted.bytes!r:.20} bytes); fetch or write the export again."
            )


def _refuse_no_file(folder: Path, path: Path) -> None:
    """Refuse what is no file of the folder itself; the hub's own snapshots hold links into the blobs beside them."""
    kind = _kind_of(path)
    if kind == "a file":
        return
    if kind == "a link to a file":
        require_inside(folder, path)
        blobs = [parent.parent / "blobs" for parent in folder.resolve().parents if parent.name == "snapshots"]
        if any(path.resolve().parent == blob for blob in blobs):
            return
    raise FormatError(f"{path} is {kind}, and what it leads to may change; put the file itself into the folder.")


def _kind_of(path: Path) -> str:
    try:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            mode = path.stat().st_mode
            return "a link to a folder" if stat.S_ISDIR(mode) else "a link to a file"
    except (OSError, RuntimeError):
        return "a link that leads nowhere" if path.is_symlink() else "unreadable"
    return "a file" if stat.S_ISREG(mode) else "a device, pipe or socket"


def _is_of_the_hub(name: str, path: Path) -> bool:
    """Return whether a file is one of those that the hub or its client writes, by its name and what it holds."""
    try:
        if name != _HUB_ATTRIBUTES and not _HUB_CACHE.fullmatch(name):
            return False
        if not path.is_file() or path.stat().st_size > _HUB_CACHE_BYTES:
            return False
        lines = path.read_text("utf-8").splitlines() if name == _HUB_ATTRIBUTES else []
    except (OSError, UnicodeDecodeError):
        return False
    return all(_HUB_ATTRIBUTE_LINE.fullmatch(line.strip()) for line in lines)


def _folded(name: str) -> str:
    """Return a name as file systems that tell neither case nor normal forms apart see it."""
    return unicodedata.normalize("NFKC", name).casefold()
