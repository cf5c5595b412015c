"""`cloq adapt`: another adapter for the codes that a run already holds."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import click

from cloq_export.cli.options import json_option, read_changes, recipe_option, set_option


@click.command(name="adapt")
@click.argument("run", type=click.Path(path_type=Path))
@recipe_option("rank")
@recipe_option("split")
@recipe_option("svd")
@recipe_option("adapter_dtype")
@recipe_option("adapter_name")
@recipe_option("device")
@set_option()
@json_option()
def command(run: Path, settings: tuple[str, ...], as_json: bool, **named: Any) -> None:
    """Make an adapter for the codes of RUN; what is not given is as in its recipe."""
    changes = read_changes(named, settings)

    from cloq_export.cli.output import emit, progress_console, to_plain
    from cloq_export.cli.render import render_summary

    with progress_console(as_json=as_json) as console:
        pipeline = importlib.import_module("cloq_export.pipeline")
        summary = to_plain(pipeline.adapt(run, changes, console=console))
    emit(summary, render_summary, as_json=as_json)
