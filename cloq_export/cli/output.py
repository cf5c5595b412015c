"""Where the command line writes: results on standard output, progress and messages on standard error."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click
from rich.console import Console

from cloq_export.cli.flags import notes_with_flags, with_flags
from cloq_export.cli.streams import drop_closed_streams, refused_output, write_line


class _ProgressConsole(Console):
    """A console on standard error that shows options as they are typed in the verb that was called."""

    def print(self, *objects: Any, **options: Any) -> None:
        context = click.get_current_context(silent=True)
        if context is not None:
            objects = tuple(with_flags(each, context.command) if isinstance(each, str) else each for each in objects)
        super().print(*objects, **options)


@contextlib.contextmanager
def progress_console(*, as_json: bool) -> Iterator[Console]:
    """Give the console for progress, on standard error; with --json Python's standard output goes there too."""
    console = _ProgressConsole(stderr=True)
    with contextlib.ExitStack() as stack:
        if as_json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield console


def emit(result: Mapping[str, Any], render: Callable[[Mapping[str, Any], Console], None], *, as_json: bool) -> None:
    """Print what a verb has to say on standard output: one JSON object, or what `render` makes of it for people."""
    context = click.get_current_context(silent=True)
    if context is not None:
        result = notes_with_flags(result, context.command)
    try:
        if as_json:
            write_line(json.dumps(_jsonable(result), indent=2, allow_nan=False, default=str))
        else:
            with refused_output():
                render(result, Console(highlight=False))
    except BrokenPipeError:
        # The reader has closed the pipe; the result of the verb and its exit code stay as they are.
        if not drop_closed_streams():
            raise


def print_line(console: Console, text: str) -> None:
    """Print text as it is: unwrapped and without markup, so that paths and commands can be copied."""
    console.print(text, soft_wrap=True, markup=False)


def _jsonable(value: Any) -> Any:
    """Return the value with NaN and Inf as null, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
