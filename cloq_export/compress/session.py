"""What one call of a verb notes on its way: lines for people, times, memory."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import TypeVar

from rich.console import Console

from cloq_export.process.host_memory import MemoryUse
from cloq_export.process.progress import show_progress

Result = TypeVar("Result")


@dataclasses.dataclass
class Session:
    """What one call of a verb notes on its way.

    Args:
        console: where lines and progress go.
        notes: what did not go the ordinary way.
        seconds: stage -> time that it took.
        memory: what the work took, once it is known.
    """

    console: Console
    notes: list[str] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    memory: MemoryUse | None = None

    def timed(self, stage: str, work: Callable[[], Result]) -> Result:
        """Run a piece of work and book its time."""
        started = time.perf_counter()
        result = work()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started
        return result

    def say(self, line: str) -> None:
        """Print a line for people."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def progress(self, what: str) -> contextlib.AbstractContextManager[Callable[[int, int], None]]:
        """Give a function that shows (done, in all), as `show_progress` does."""
        return show_progress(what, self.console)
