"""The peak memory of this process from some moment on, where the kernel tells it."""

from __future__ import annotations

from pathlib import Path


class PeakMemory:
    """Measures from its creation on: loading a model takes more memory than the model, and does not count."""

    def __init__(self) -> None:
        self._before: int | None = None
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self._before = _resident_bytes("VmRSS")
        except OSError:
            # Not Linux, or a Linux where a process cannot reset its peak.
            pass

    def beyond(self) -> int | None:
        """Return the bytes that were needed at the peak beyond those of the beginning, None where nothing tells."""
        return None if self._before is None else max(0, _resident_bytes("VmHWM") - self._before)


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
