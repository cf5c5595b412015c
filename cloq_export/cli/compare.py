"""`cloq compare`: which start point trains best."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from cloq_export.cli.options import PATH, json_option


@click.command(name="compare")
@click.argument("recipe", metavar="NAME|FILE")
@click.option("--out", type=PATH, required=True, metavar="FOLDER", help="Where all of it goes.")
@click.option("--start", "starts", multiple=True, metavar="NAME", help="Only this start; can be repeated.")
@click.option("--bits", type=int, multiple=True, help="Only this width; can be repeated. 16 is the float model.")
@click.option("--task", "tasks", multiple=True, metavar="NAME", help="Only this task; can be repeated.")
@click.option("--model", default="", metavar="MODEL", help="Taken instead of the recipe's.")
@click.option("--full", is_flag=True, help="The paper's size, for a GPU, as the recipe's section `full` says.")
@json_option()
def command(recipe: str, out: Path, model: str, full: bool, as_json: bool, **only: tuple[Any, ...]) -> None:
    """Train from several start points on the same data and steps.

    NAME is a recipe of the package, small, refined or low-rank; FILE is one of your own in YAML. Rows that are measured
    already stay; an interrupted call continues.
    """
    from rich.console import Console

    from cloq_export.cli.output import emit, progress_console
    from cloq_export.lab.comparing import compare
    from cloq_export.lab.comparison import ComparisonRecipe
    from cloq_export.lab.comparison_report import comparison_table

    comparison = ComparisonRecipe.read(recipe, model=model, full=full)
    with progress_console(as_json=as_json) as console:
        measured = compare(comparison, out, **only, console=console)

    def render(result: Mapping[str, Any], target: Console) -> None:
        target.print(comparison_table(result), highlight=False, markup=False, soft_wrap=True)

    emit(measured, render, as_json=as_json)
