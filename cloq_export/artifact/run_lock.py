"""The lock of a run directory: one process writes, and the operating system frees the lock when it dies."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import IO

from cloq_export.errors import RunDirectoryError
from cloq_export.files.atomic import translate_os_errors

if sys.platform != "win32":
    import fcntl

LOCK_NAME = ".lock"


class RunLock:
    """The lock of one run directory, not taken yet. On Windows it locks nothing.

    Args:
        folder: the run directory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[str] | None = None

    def take(self) -> bool:
        """Take the lock, and return whether it was not held by this object before.

        Raises:
            RunDirectoryError: another process works in the run, or it cannot be written.
        """
        if self._file is not None:
            return False
        with translate_os_errors(self._folder):
            # Opened for appending, so that a process that does not get the lock leaves the owner's number in place.
            file = open(self._folder / LOCK_NAME, "a+", encoding="ascii")  # noqa: SIM115
            try:
                if sys.platform != "win32":
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read(32).strip() or "unknown"
                file.close()
                raise RunDirectoryError(
                    f"{self._folder} is in use by process {owner}; wait until it ends, or choose another folder with "
                    "`out`."
                ) from None
            except BaseException:
                file.close()
                raise
            self._file = file
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        return True

    def give_back(self) -> None:
        """Give the lock back, if it is held."""
        if self._file is not None:
            # An empty lock file leaves the folder byte for byte the same, no matter which process worked in it.
            with contextlib.suppress(OSError):
                self._file.truncate(0)
            self._file.close()
            self._file = None
