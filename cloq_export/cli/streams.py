"""Standard output and standard error as they are on a user's machine: any encoding, a closed pipe, no terminal."""

from __future__ import annotations

import codecs
import contextlib
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from cloq_export.errors import OutputError

_ERRORS = "cloq_export_replace"
# Characters of our tables and messages that have an equivalent in ASCII.
_PLAIN = {
    "…": "...",
    "±": "+-",
    "−": "-",
    "–": "-",
    "—": "-",
    "≤": "<=",
    "≥": ">=",
    "×": "x",
    "“": '"',
    "”": '"',
    "’": "'",
}
# Libraries ask these before they draw a progress bar; a bar that is redrawn a thousand times makes a log unreadable.
_NO_BARS = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def write_line(text: str, stream: TextIO | None = None) -> None:
    """Write a line to a stream, standard output unless given, in the encoding that the stream has.

    click's own echo writes UTF-8 where ASCII is asked for.
    """
    if stream is not None:
        stream.write(text + "\n")
        stream.flush()
        return
    with refused_output():
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


@contextlib.contextmanager
def refused_output() -> Iterator[None]:
    """Say in one line that what the block writes to standard output is not taken; a closed pipe is left to others."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        _send_nowhere(sys.stdout)  # what is left in the buffer would fail once more when Python ends
        raise OutputError(
            f"standard output cannot be written: {error.strerror or error}. What the command wrote to files is kept; "
            "send its output to a place that takes it."
        ) from None


@contextlib.contextmanager
def prepared_streams() -> Iterator[None]:
    """Let output never fail for its encoding, and switch off the progress bars of libraries where there is no terminal.

    Characters that the encoding of a stream lacks are replaced; bytes of a file name that are no text stay as they are.
    """
    codecs.register_error(_ERRORS, _replace)
    before = [(stream, stream.errors) for stream in (sys.stdout, sys.stderr) if hasattr(stream, "reconfigure")]
    for stream, _ in before:
        stream.reconfigure(errors=_ERRORS)
    added: list[str] = []
    if sys.stderr is None or not sys.stderr.isatty():
        added = [name for name in _NO_BARS if name not in os.environ]
        os.environ.update({name: _NO_BARS[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
        for stream, errors in before:
            with contextlib.suppress(OSError, ValueError):  # it may be closed by now
                stream.reconfigure(errors=errors)


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return what is written for characters that an encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    replacement = bytearray()
    for sign in error.object[error.start : error.end]:
        code = ord(sign)
        if 0xDC80 <= code <= 0xDCFF:
            replacement.append(code - 0xDC00)  # how Python holds a byte of a file name that is no text
        else:
            replacement += _PLAIN.get(sign, "?").encode("ascii")
    return bytes(replacement), error.end


def is_closed(stream: Any) -> bool:
    """Return whether the reader of a stream has closed it, as `head` does when it has its lines."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):
        return False


def drop_closed_streams() -> bool:
    """Redirect streams that their reader has closed, so that nothing fails on them; return whether there is one."""
    closed = [stream for stream in (sys.stdout, sys.stderr) if is_closed(stream)]
    for stream in closed:
        _send_nowhere(stream)
    return bool(closed)


def _send_nowhere(stream: TextIO) -> None:
    with contextlib.suppress(AttributeError, OSError, ValueError):  # it may have no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
