"""`cloq convert`: a quantized checkpoint in another layout, losslessly or not at all."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import click

from cloq_export.cli.options import PATH, export_options, json_option


@click.command(name="convert")
@click.argument("checkpoint", type=PATH)
@export_options("it must be given")
@click.option(
    "--read-as",
    metavar="LAYOUT",
    help="Read CHECKPOINT in this layout, where its own label is wrong; `cloq inspect` tells.",
)
@json_option()
def command(checkpoint: Path, read_as: str | None, as_json: bool, **named: Any) -> None:
    """Turn CHECKPOINT, ours or another tool's, into another layout."""
    from cloq_export.cli.output import emit, progress_console, to_plain
    from cloq_export.cli.render import render_export

    with progress_console(as_json=as_json) as console:
        pipeline = importlib.import_module("cloq_export.verbs")
        options = pipeline.ExportOptions(**named)
        summary = to_plain(pipeline.convert(checkpoint, options, read_as=read_as, console=console))
    emit(summary, render_export, as_json=as_json)
