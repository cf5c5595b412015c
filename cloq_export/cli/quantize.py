"""`cloq quantize`: the first half of `cloq run`, up to codes, scales and zeros."""

from __future__ import annotations

from typing import Any

import click

from cloq_export.cli.options import build_recipe, json_option, recipe_options


@click.command(name="quantize")
@recipe_options
@json_option()
def command(as_json: bool, **options: Any) -> None:
    """Calibrate on MODEL and make codes, scales and zeros for every linear layer, layer by layer on disk."""
    recipe, out = build_recipe(options)

    from cloq_export.cli.output import emit, progress_console
    from cloq_export.cli.render import render_summary
    from cloq_export.verbs.quantize import quantize

    with progress_console(as_json=as_json) as console:
        summary = quantize(recipe, out, demo=options["demo"], console=console)
    emit(summary.to_json(), render_summary, as_json=as_json)
