"""`cloq export`: the codes of a run as a folder that an engine reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cloq_export.cli.options import PATH, json_option, options_of
from cloq_export.verbs.options import ExportOptions


@click.command(name="export")
@click.argument("run", type=PATH)
@options_of(ExportOptions)
@json_option()
def command(run: Path, as_json: bool, **named: Any) -> None:
    """Write a deployable folder from RUN: checkpoint, adapters, certificate and model card."""
    from cloq_export.cli.output import emit, progress_console
    from cloq_export.cli.render import render_export
    from cloq_export.verbs.export import export

    with progress_console(as_json=as_json) as console:
        result = export(run, ExportOptions(**named), console=console)
    emit(result.to_json(), render_export, as_json=as_json)
