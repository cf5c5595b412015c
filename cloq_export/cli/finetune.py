"""`cloq finetune`: train an adapter of a run over its packed codes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from cloq_export.cli.options import PATH, finetune_options, json_option
from cloq_export.recipe import FineTuneRecipe


@click.command(
    name="finetune",
    epilog="Several GPUs: accelerate launch -m cloq_export finetune RUN ... with --batch-size for each of them.",
)
@click.argument("run", type=PATH)
@finetune_options
@json_option()
def command(run: Path, as_json: bool, **named: Any) -> None:
    """Train an adapter of RUN on examples; its codes stay as they are.

    The adapter with the least loss on held-out examples becomes RUN/adapters/NAME. The same command continues a
    training that was interrupted.
    """
    recipe = FineTuneRecipe.from_mapping({name: value for name, value in named.items() if value is not None})

    from cloq_export.cli.output import emit, progress_console
    from cloq_export.verbs.finetune import finetune

    with progress_console(as_json=as_json) as console:
        result = finetune(run, recipe, console=console)
    emit(result.to_json(), render_training, as_json=as_json)


def render_training(summary: Mapping[str, Any], console: Console) -> None:
    """Print the summary of a training."""
    from cloq_export.cli.render import render_facts, render_next, render_notes

    render_notes(summary, console)
    perplexity = summary["held_out_perplexity"]
    facts: dict[str, Any] = {
        "adapter": f"{summary['adapter']}, from {summary['start']}",
        "data": f"{summary['data']}, {summary['sequences']} sequences",
        "steps": f"{summary['steps']}, {summary['seconds_per_step']:.2f} s each, {summary['precision']}",
        "loss": f"{summary['loss']['first']:.4f} at first, {summary['loss']['last']:.4f} in the end",
    }
    if perplexity["kept"] is not None:
        facts["held-out perplexity"] = f"{perplexity['before']:.3f} before, {perplexity['kept']:.3f} kept"
        facts["kept"] = f"the adapter of step {summary['kept_step']}"
    if summary["peak_memory_bytes"] is not None:
        facts["peak_memory_bytes"] = summary["peak_memory_bytes"]
    render_facts(facts, console)
    render_next(summary, console)
