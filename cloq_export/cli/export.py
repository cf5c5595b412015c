"""`cloq export`: the codes of a run as a checkpoint that an engine reads."""

from __future__ import annotations

import importlib
from pathlib import Path

import click

from cloq_export.cli.options import json_option
from cloq_export.recipe import CHOICES, FIELDS


@click.command(name="export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "format_name",
    type=click.Choice(CHOICES["format"]),
    default=FIELDS["format"].default,
    show_default=True,
    help=FIELDS["format"].metadata["help"],
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Folder to write; unless given it lies in the run.",
)
@json_option()
def command(run: Path, format_name: str, out: Path | None, as_json: bool) -> None:
    """Write the checkpoint of RUN in a layout."""
    from cloq_export.cli.output import emit, progress_console, to_plain
    from cloq_export.cli.render import render_summary

    with progress_console(as_json=as_json) as console:
        pipeline = importlib.import_module("cloq_export.pipeline")
        summary = to_plain(pipeline.export(run, format_name, out, console=console))
    emit(summary, render_summary, as_json=as_json)
