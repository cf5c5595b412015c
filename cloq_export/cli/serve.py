"""`cloq serve`: an OpenAI-compatible server over an export or a run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from cloq_export.cli.options import PATH, json_option
from cloq_export.cli.streams import write_line
from cloq_export.errors import EngineError


@click.command(name="serve", epilog="What follows -- goes to vLLM, e.g.: cloq serve EXPORT -- --max-num-seqs 16")
@click.argument("export", type=PATH)
@click.argument("engine_options", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM OPTIONS]")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=FOLDER",
    help="An adapter to serve beside those of EXPORT; can be repeated.",
)
@click.option(
    "--default", metavar="NAME", help="The adapter that answers to the model's own name and to plain requests."
)
@click.option("--name", help="The model's own name; unless given, the folder's.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0 takes a free one."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of the activations; unless given, float32 on a CPU and float16 on a GPU.",
)
@click.option("--max-model-len", type=click.IntRange(min=1), help="Longest prompt with its answer, in tokens.")
@click.option("--max-lora-rank", type=click.INT, help="Rank that adapters may have, also those that are loaded later.")
@click.option("--max-loras", type=click.IntRange(min=1), help="Adapters in one batch.")
@click.option("--kv-cache-gib", type=click.IntRange(min=1), help="Memory for keys and values on a CPU.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads on a CPU.")
@click.option(
    "--python",
    type=PATH,
    help="Interpreter of the environment that has vLLM; unless given, this one.",
)
@click.option("--force", is_flag=True, help="Serve adapters that are bound to another base.")
@click.option(
    "--timeout", type=click.FloatRange(min=1), default=1800, show_default=True, help="Seconds to wait for the start."
)
@click.option("--verbose", is_flag=True, help="Show vLLM's lines from the start; unless given, once it answers.")
@json_option()
def command(export: Path, as_json: bool, **named: Any) -> None:
    """Serve EXPORT, an export or a run, with its adapters until Ctrl-C."""
    from cloq_export.cli.output import emit, progress_console

    serving = importlib.import_module("cloq_export.verbs.serving")

    def announce(served: Mapping[str, Any]) -> None:
        emit(served, render_server, as_json=as_json)

    with progress_console(as_json=False) as console:
        try:
            serving.serve(export, serving.ServeOptions(**named), announce=announce, console=console)
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
