"""`cloq frontier`: perplexity for every stored bit, by method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from cloq_export.cli.options import PATH, json_option


@click.command(name="frontier")
@click.argument("model", required=False, default="")
@click.option("--recipe", default="small", show_default=True, metavar="NAME|FILE", help="What is measured.")
@click.option("--out", type=PATH, required=True, metavar="FOLDER", help="Where all of it goes.")
@click.option("--method", "methods", multiple=True, metavar="NAME", help="Only this method or peer; can be repeated.")
@click.option("--bits", type=int, multiple=True, help="Only this width; can be repeated.")
@click.option("--rank", "ranks", type=int, multiple=True, help="Only this rank; can be repeated.")
@click.option("--full", is_flag=True, help="The larger size, for a GPU, as the recipe's section `full` says.")
@json_option()
def command(model: str, recipe: str, out: Path, full: bool, as_json: bool, **only: tuple[Any, ...]) -> None:
    """Measure what every method, and other packages, make of MODEL: perplexity against stored bits and time.

    MODEL is taken instead of the recipe's. Rows that are measured already stay; an interrupted call continues.
    """
    from rich.console import Console

    from cloq_export.cli.output import emit, progress_console
    from cloq_export.lab.frontier import measure_frontier
    from cloq_export.lab.frontier_recipe import Frontier
    from cloq_export.lab.frontier_report import frontier_table

    frontier = Frontier.read(recipe, model=model, full=full)
    with progress_console(as_json=as_json) as console:
        measured = measure_frontier(frontier, out, **only, console=console)

    def render(result: Mapping[str, Any], target: Console) -> None:
        target.print(frontier_table(result), highlight=False, markup=False, soft_wrap=True)

    emit(measured, render, as_json=as_json)
