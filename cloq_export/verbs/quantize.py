"""Codes, scales and zeros for every layer, without adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from cloq_export.compress.budgeting import budgeted_recipe, with_choices_of
from cloq_export.compress.job import compress_model
from cloq_export.compress.session import Session
from cloq_export.compress.strategies import check_low_rank_first, check_shared_a
from cloq_export.files.spelled_paths import command_line
from cloq_export.recipe import FIELDS, Recipe
from cloq_export.verbs.export_card import public_name
from cloq_export.verbs.recording import record_base
from cloq_export.verbs.run_files import note_source, open_run, write_run_checkpoint
from cloq_export.verbs.run_texts import bind_text, run_texts
from cloq_export.verbs.summary import RunSummary, summarize_run


def quantize(recipe: Recipe, out: Path, *, demo: bool = False, console: Console | None = None) -> RunSummary:
    """Make codes, scales and zeros for every layer, without adapters.

    Args:
        recipe: every option; its rank is named in what to type next.
        out: the run directory.
        demo: as in `run`.
        console: where progress goes; None is standard error.

    Returns:
        RunSummary: nothing is measured.

    Raises:
        CloqError: anything a user can mend.
    """
    asked_rank = recipe.rank or FIELDS["rank"].default
    recipe = with_choices_of(out, recipe.changed({"rank": 0, "overrides": _without_ranks(recipe)}))
    check_low_rank_first(recipe)
    check_shared_a(recipe)
    session = Session(console or Console(stderr=True))
    texts = run_texts(recipe, demo=demo, measures=False)
    session.notes.extend(texts.notes)
    with open_run(session, out, recipe) as directory:
        bind_text(directory, texts.calibration)
        recipe = budgeted_recipe(session, directory, recipe, texts.calibration)
        model = compress_model(session, directory, recipe, texts.calibration)
        note_source(directory, model)
        write_run_checkpoint(session, directory, model, recipe)
        record_base(session, directory, model.tokenizer, model_name=public_name(recipe.model))
        directory.set_state("quantized")
        commands = (command_line("cloq", "adapt", out, "--rank", asked_rank), command_line("cloq", "export", out))
        return summarize_run(session, directory, recipe, next=commands)


def _without_ranks(recipe: Recipe) -> dict[str, dict[str, Any]]:
    kept = {
        pattern: {key: value for key, value in settings.items() if key != "rank"}
        for pattern, settings in recipe.overrides.items()
    }
    return {pattern: settings for pattern, settings in kept.items() if settings}
