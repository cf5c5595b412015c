"""`cloq inspect`: what an artefact is, without loading its model."""

from __future__ import annotations

import importlib
from pathlib import Path

import click

from cloq_export.cli.options import json_option


@click.command(name="inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read every tensor and compute the fingerprint again.")
@json_option()
def command(path: Path, verify: bool, as_json: bool) -> None:
    """Explain PATH: a run, a checkpoint or an adapter."""
    from cloq_export.cli.output import emit, progress_console, to_plain
    from cloq_export.cli.render import render_inspection

    with progress_console(as_json=as_json):
        pipeline = importlib.import_module("cloq_export.pipeline")
        result = to_plain(pipeline.inspect(path, verify))
    emit(result, render_inspection, as_json=as_json)
