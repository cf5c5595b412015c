"""Which files of a folder that is not trusted may be read or copied."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cloq_export.errors import FormatError


def require_inside(folder: Path, path: Path, *, also: Iterable[Path] = ()) -> Path:
    """Return a file's path after checking that no link leads it out of its folder.

    A link in a folder from elsewhere may name any file of this machine, and what is read from it may be written into
    an export and published. The links of the hub's own cache, which lead to the blobs beside its snapshots, are fine.

    Args:
        folder: the folder that the file belongs to.
        path: the file.
        also: other folders that it may lie in.

    Returns:
        `path`, unchanged.

    Raises:
        FormatError: the file lies elsewhere.
    """
    try:
        home, place = folder.resolve(), path.resolve()
    except (OSError, RuntimeError):  # RuntimeError before Python 3.13
        raise FormatError(
            f"{path} is a link that points back to itself; put the file itself into the folder."
        ) from None
    allowed = [home, *also]
    # Also from a folder inside a snapshot, such as an adapter that lies beside its base.
    allowed += [(parent.parent / "blobs").resolve() for parent in home.parents if parent.name == "snapshots"]
    if not any(place.is_relative_to(root) for root in allowed):
        raise FormatError(
            f"{path} is a link that leads out of {folder}, to {place}; put the file itself into the folder."
        )
    return path
