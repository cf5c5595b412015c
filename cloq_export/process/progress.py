"""How far a long piece of work is: a bar at a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

INTERVAL_S = 30.0
"""Seconds between two lines of a log."""

Clock = Callable[[], float]


@contextlib.contextmanager
def show_progress(
    what: str,
    console: Console | None = None,
    *,
    unit: str = "",
    transient: bool = False,
    clock: Clock = time.monotonic,
) -> Iterator[Callable[[int, int], None]]:
    """Give a function that is told (done, in all), and show it on standard error.

    A terminal gets a bar with the time left. A pipe, a file or a terminal that cannot move its cursor gets a line at
    the start, then one about every `INTERVAL_S` seconds, and never an escape code.

    Args:
        what: the name of the work.
        console: where it is shown; None is standard error.
        unit: what is counted, in the plural.
        transient: clear the bar when the work is done.
        clock: seconds that only grow.
    """
    console = console or Console(stderr=True)
    if not _can_redraw(console):
        write = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
        lines = _Lines(what, unit, write, clock)
        lines.begin()
        yield lines.advance
        lines.end()
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn(f"{{task.completed}}/{{task.total}} {unit}".rstrip()),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=transient) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def show_waiting(
    what: str, console: Console | None = None, *, clock: Clock = time.monotonic
) -> Iterator[Callable[[], None]]:
    """Show that something is waited for, as `show_progress` does; the function given is to be called now and then.

    Args:
        what: what is waited for.
        console: where it is shown; None is standard error.
        clock: seconds that only grow.
    """
    console = console or Console(stderr=True)
    if _can_redraw(console):
        with console.status(escape(what)):
            yield lambda: None
        return
    with show_progress(what, console, clock=clock) as advance:
        yield lambda: advance(0, 0)


def _can_redraw(console: Console) -> bool:
    """Return whether lines can be drawn over; FORCE_COLOR makes rich take a pipe for a terminal."""
    try:
        return console.file.isatty() and console.is_terminal and not console.is_dumb_terminal
    except (AttributeError, ValueError):  # ValueError: it is closed
        return False


@dataclasses.dataclass
class _Lines:
    """The lines of one piece of work in a log."""

    what: str
    unit: str
    write: Callable[[str], None]
    clock: Clock
    _done: int = 0
    _total: int | None = None
    _told: int = 0

    def begin(self) -> None:
        self._start = self._rate_start = self._last = self.clock()
        self._rate_done = 0
        self.write(f"{self.what} ...")

    def advance(self, done: int, total: int) -> None:
        now = self.clock()
        if self._total is None and total and done > 1:
            # Work that an interrupted call had done says nothing about the speed of this one.
            self._rate_start, self._rate_done = now, done
        # 0 of 0 is a wait of unknown length.
        self._done, self._total = done, total or None
        if now - self._last >= INTERVAL_S and (done < total or not total):
            self._last = now
            self._tell(now)

    def end(self) -> None:
        # Work shorter than an interval gets its first line only.
        now = self.clock()
        if self._told or now - self._start >= INTERVAL_S:
            self._tell(now)

    def _tell(self, now: float) -> None:
        self._told += 1
        parts = [f"{self._done}/{self._total} {self.unit}".rstrip()] if self._total is not None else []
        parts.append(f"{_span(now - self._start)} elapsed")
        fresh = self._done - self._rate_done
        if self._total is not None and self._done < self._total and fresh > 0:
            parts.append(f"{_span((now - self._rate_start) * (self._total - self._done) / fresh)} left")
        self.write(f"{self.what}: {', '.join(parts)}")


def _span(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
