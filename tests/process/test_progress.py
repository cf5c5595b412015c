"""Progress in a log, with a clock that the tests turn."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cloq_export.process.progress import show_progress, show_waiting


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def log() -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    return Console(file=written, width=20), written


def test_a_log_gets_a_line_at_the_start_and_one_every_half_minute(clock: Clock) -> None:
    console, written = log()
    with show_progress("quantize [x]", console, unit="blocks", clock=clock) as advance:
        assert written.getvalue() == "quantize [x] ...\n"
        advance(0, 20)
        for done in range(1, 21):
            clock.now += 10
            advance(done, 20)
    assert written.getvalue().splitlines() == [
        "quantize [x] ...",
        "quantize [x]: 3/20 blocks, 0:00:30 elapsed, 0:02:50 left",
        "quantize [x]: 6/20 blocks, 0:01:00 elapsed, 0:02:20 left",
        "quantize [x]: 9/20 blocks, 0:01:30 elapsed, 0:01:50 left",
        "quantize [x]: 12/20 blocks, 0:02:00 elapsed, 0:01:20 left",
        "quantize [x]: 15/20 blocks, 0:02:30 elapsed, 0:00:50 left",
        "quantize [x]: 18/20 blocks, 0:03:00 elapsed, 0:00:20 left",
        "quantize [x]: 20/20 blocks, 0:03:20 elapsed",
    ]


def test_short_work_is_one_line(clock: Clock) -> None:
    console, written = log()
    with show_progress("perplexity", console, transient=True, clock=clock) as advance:
        for done in range(1, 4):
            clock.now += 5
            advance(done, 3)
    assert written.getvalue() == "perplexity ...\n"


def test_what_an_interrupted_call_had_done_says_nothing_about_the_time_left(clock: Clock) -> None:
    console, written = log()
    with show_progress("fine-tune", console, clock=clock) as advance:
        advance(500, 1000)
        clock.now += 50
        advance(510, 1000)
    assert written.getvalue().splitlines()[1] == "fine-tune: 510/1000, 0:00:50 elapsed, 0:40:50 left"


def test_work_that_fails_says_nothing_of_its_end(clock: Clock) -> None:
    console, written = log()

    def work() -> None:
        with show_progress("merge", console, clock=clock) as advance:
            clock.now += 60
            advance(0, 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert written.getvalue().splitlines() == ["merge ...", "merge: 0/2, 0:01:00 elapsed"]


def test_a_wait_without_an_end_in_sight(clock: Clock) -> None:
    console, written = log()
    with show_waiting("starting", console, clock=clock) as waiting:
        for _ in range(7):
            clock.now += 10
            waiting()
    assert written.getvalue().splitlines() == [
        "starting ...",
        "starting: 0:00:30 elapsed",
        "starting: 0:01:00 elapsed",
        "starting: 0:01:10 elapsed",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variables", "terminal", "bar"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, True),
        ({"TERM": "dumb"}, True, False),
        ({"TERM": "xterm"}, False, False),
        ({"TERM": "xterm", "FORCE_COLOR": "1"}, False, False),
        ({"TERM": "xterm", "TTY_COMPATIBLE": "1"}, False, False),
    ],
)
def test_only_a_terminal_that_can_redraw_gets_a_bar(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], terminal: bool, bar: bool
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    written = Terminal() if terminal else io.StringIO()
    console = Console(file=written, width=80)
    with show_progress("export", console) as advance:
        advance(1, 1)
    with show_waiting("wait", console):
        pass
    assert ("\x1b" in written.getvalue()) is bar
    assert "export" in written.getvalue()
