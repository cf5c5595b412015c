"""An adapter for a quantized checkpoint that another tool made."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from cloq_export.recipe import Recipe
from cloq_export.verbs.run import run
from cloq_export.verbs.summary import RunSummary


def adapt_checkpoint(checkpoint: Path, recipe: Recipe, out: Path, *, console: Console | None = None) -> RunSummary:
    """Make a CLoQ adapter for a quantized checkpoint that another tool made, and measure what it mends.

    The result is a run like any other: its codes are the checkpoint's, bit for bit.

    Args:
        checkpoint: a folder in any layout that is read.
        recipe: model is the float original; options of the codes are ignored.
        out: the run directory.
        console: where progress goes; None is standard error.

    Returns:
        RunSummary: as from `run`.

    Raises:
        CloqError: anything a user can mend.
    """
    return run(recipe.changed({"codes_from": str(checkpoint)}), out, console=console)
