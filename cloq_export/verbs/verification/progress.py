"""Where the time goes, and what could not be measured."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from cloq_export.compress.session import Session
from cloq_export.parity.report import Missing


class Progress:
    """What `verify` notes of itself while it measures.

    Args:
        session: of the call; it says what goes on, and keeps notes and seconds.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.missing: list[Missing] = []
        self._phases: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Book the time of a block under a name, and not under that of the block around it."""
        self._book()
        self._phases.append(name)
        try:
            yield
        finally:
            self._book()
            self._phases.pop()

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Note what could not be measured, and go on: its figures stay missing, and the gates on them miss."""
        try:
            yield
        except Exception as error:  # an engine may raise anything; what it did not answer is missing
            reason = " ".join(str(error).split()) or type(error).__name__
            self.missing.append(Missing(what, reason))
            self.session.say(f"{what} could not be measured: {reason}")

    def _book(self) -> None:
        now = time.perf_counter()
        if self._phases:
            name = self._phases[-1]
            self.session.seconds[name] = self.session.seconds.get(name, 0.0) + now - self._since
        self._since = now
