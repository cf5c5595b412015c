"""Host memory: keep the allocator from handing it back between two forward passes, and measure what is used."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import platform
import sys
from pathlib import Path

import psutil

if sys.platform != "win32":
    import resource

# The parameters of glibc's mallopt that say how much free memory is kept, and from which size on it is mapped.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Let glibc reuse freed blocks up to 1 GiB; return whether the allocator took it.

    The activations of a batch are tens of megabytes. By default glibc maps each one and unmaps it when it is freed,
    and the page faults slow a forward pass on a CPU. Elsewhere (macOS, Windows, musl) nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Host memory of one piece of work.

    Args:
        peak: highest resident memory of the process up to the end of the work, bytes.
        beyond_start: highest resident memory during the work less what was resident before it, bytes; None where the
            system cannot tell (anything but Linux).
    """

    peak: int
    beyond_start: int | None


class MemoryWatch:
    """Measures the host memory of the work between its creation and `stop`.

    What earlier work has freed is handed back first: this work could otherwise reuse it uncounted.
    """

    def __init__(self) -> None:
        gc.collect()
        _release_freed_memory()
        self._peak_before = _peak_bytes()
        self._start: int | None = psutil.Process().memory_info().rss
        try:
            # This resets the peak on Linux, so that earlier work does not count.
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            self._start = None

    def stop(self) -> MemoryUse:
        """Return what was used since the creation."""
        peak = _peak_bytes()
        return MemoryUse(max(peak, self._peak_before), None if self._start is None else max(0, peak - self._start))


def free_bytes() -> int:
    """Return how much more memory this process may take, as far as the system and a container's limit tell."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        # "max" where there is no limit.
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        free = min(free, limit - int((group / "memory.current").read_text(encoding="ascii")))
    return max(0, free)


def _release_freed_memory() -> None:
    if platform.libc_ver()[0] == "glibc":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _peak_bytes() -> int:
    # psutil knows the peak on Windows alone, and getrusage has one on Linux that cannot be reset.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    # ru_maxrss counts bytes on macOS and kibibytes elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
