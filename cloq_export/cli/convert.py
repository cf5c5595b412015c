"""`cloq convert`: a quantized checkpoint in another layout, losslessly or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cloq_export.cli.options import PATH, json_option, options_of
from cloq_export.verbs.options import ExportOptions


@click.command(name="convert")
@click.argument("checkpoint", type=PATH)
@options_of(ExportOptions, out="Folder to write; it must be given.")
@click.option(
    "--read-as",
    metavar="LAYOUT",
    help="Read CHECKPOINT in this layout, where its own label is wrong; `cloq inspect` tells.",
)
@json_option()
def command(checkpoint: Path, read_as: str | None, as_json: bool, **named: Any) -> None:
    """Turn CHECKPOINT, ours or another tool's, into another layout."""
    from cloq_export.cli.output import emit, progress_console
    from cloq_export.cli.render import render_export
    from cloq_export.verbs.convert import convert

    with progress_console(as_json=as_json) as console:
        result = convert(checkpoint, ExportOptions(**named), read_as=read_as, console=console)
    emit(result.to_json(), render_export, as_json=as_json)
