"""`cloq adapt`: an adapter for codes that are there already, in a run or in another tool's checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cloq_export.cli.options import PATH, json_option, read_changes, recipe_option, set_option
from cloq_export.errors import UsageError
from cloq_export.recipe import Recipe

# What only a foreign checkpoint needs: a run knows its model and its text.
_FOR_CHECKPOINTS = ("calibration", "samples", "seqlen", "seed", "error_aware")


@click.command(name="adapt")
@click.argument("path", metavar="RUN|CHECKPOINT", type=PATH)
@recipe_option("rank")
@recipe_option("split")
@recipe_option("svd")
@recipe_option("adapter_dtype")
@recipe_option("refine")
@recipe_option("adapter_name")
@recipe_option("device")
@click.option("--original", metavar="MODEL", help="The float model of CHECKPOINT: a folder, a hub id or a GGUF file.")
@click.option("--out", type=PATH, metavar="RUN", help="The run directory to make of CHECKPOINT.")
@recipe_option("calibration")
@recipe_option("samples")
@recipe_option("seqlen")
@recipe_option("seed")
@recipe_option("error_aware")
@set_option()
@json_option()
def command(
    path: Path, original: str | None, out: Path | None, settings: tuple[str, ...], as_json: bool, **named: Any
) -> None:
    """Make a CLoQ adapter for the codes of RUN, or for a CHECKPOINT that another tool quantized.

    What is not given is as in the recipe of RUN. A CHECKPOINT needs its float original, and becomes a run of its own:
    its codes are kept bit for bit.
    """
    changes = read_changes(named, settings)
    recipe: Recipe | None = None
    if original is None:
        given = [name for name in _FOR_CHECKPOINTS if named.get(name) is not None]
        if out is not None or given:
            flag = "--out" if out is not None else "--" + given[0].replace("_", "-")
            raise UsageError(f"{flag} belongs to a checkpoint of another tool; name its float model with --original.")
    elif out is None:
        raise UsageError("no run directory was given; say where the run is written with --out RUN.")
    else:
        recipe = Recipe.from_mapping({**changes, "model": original})

    from cloq_export.cli.output import emit, progress_console
    from cloq_export.cli.render import render_summary
    from cloq_export.verbs.adapt import adapt
    from cloq_export.verbs.adapt_checkpoint import adapt_checkpoint

    with progress_console(as_json=as_json) as console:
        if recipe is None or out is None:
            summary = adapt(path, changes, console=console)
        else:
            summary = adapt_checkpoint(path, recipe, out, console=console)
    emit(summary.to_json(), render_summary, as_json=as_json)
