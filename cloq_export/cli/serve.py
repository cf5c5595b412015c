"""`cloq serve`: an OpenAI-compatible server over an export or a run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from cloq_export.cli.options import PATH, json_option, options_of
from cloq_export.cli.streams import write_line
from cloq_export.errors import EngineError
from cloq_export.verbs.options import ServeOptions


@click.command(name="serve", epilog="What follows -- goes to vLLM, e.g.: cloq serve EXPORT -- --max-num-seqs 16")
@click.argument("export", type=PATH)
@click.argument("engine_options", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM OPTIONS]")
@options_of(ServeOptions)
@json_option()
def command(export: Path, as_json: bool, **named: Any) -> None:
    """Serve EXPORT, an export or a run, with its adapters until Ctrl-C."""
    from cloq_export.cli.output import emit, progress_console
    from cloq_export.verbs.serve import Serving, serve

    def announce(served: Serving) -> None:
        emit(served.to_json(), render_server, as_json=as_json)

    with progress_console(as_json=False) as console:
        try:
            serve(export, ServeOptions(**named), announce=announce, console=console)
        except EngineError as error:
            # The engine's lines stay lines; the error itself is one.
            first, _, lines = str(error).partition("\n")
            if lines:
                write_line(lines, sys.stderr)
            raise EngineError(first.replace("; its last lines:", "; its last lines stand above.")) from None


def render_server(served: Mapping[str, Any], console: Any) -> None:
    """Print what is served, and a line to try it."""
    for note in served["notes"]:
        console.print(f"note: {note}", markup=False)
    console.print(f"serving at {served['url']}/v1", markup=False, soft_wrap=True)
    for model in served["models"]:
        meaning = ""
        if model == served["base_name"]:
            meaning = "  (the quantized base without an adapter)"
        elif model == served["name"]:
            meaning = f"  (the default: adapter {served['default']})"
        console.print(f"  {model}{meaning}", markup=False, soft_wrap=True)
    console.print(served["curl"], markup=False, soft_wrap=True, highlight=False)
