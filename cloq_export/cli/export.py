"""`cloq export`: the codes of a run as a folder that an engine reads."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import click

from cloq_export.cli.options import PATH, export_options, json_option


@click.command(name="export")
@click.argument("run", type=PATH)
@export_options("it lies in RUN/exports")
@json_option()
def command(run: Path, as_json: bool, **named: Any) -> None:
    """Write a deployable folder from RUN: checkpoint, adapters, certificate and model card."""
    from cloq_export.cli.output import emit, progress_console, to_plain
    from cloq_export.cli.render import render_export

    with progress_console(as_json=as_json) as console:
        pipeline = importlib.import_module("cloq_export.verbs")
        summary = to_plain(pipeline.export(run, pipeline.ExportOptions(**named), console=console))
    emit(summary, render_export, as_json=as_json)
