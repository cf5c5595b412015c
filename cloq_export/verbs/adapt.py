"""An adapter for codes that are there already, in a run or in a checkpoint that another tool made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.compress.initialisations import initialisation_of
from cloq_export.compress.job import CompressJob, KeptCodes, layers_report, make_layers
from cloq_export.compress.opening import open_planned, refuse_other_source, refuse_unfinished, started_run
from cloq_export.compress.session import Session
from cloq_export.errors import UsageError
from cloq_export.files.spelled_paths import command_line
from cloq_export.recipe import FIELDS, Recipe
from cloq_export.verbs.held_out import windows_report
from cloq_export.verbs.run_files import remove_finished, write_run_adapter
from cloq_export.verbs.run_texts import bind_text, calibration_text_of
from cloq_export.verbs.summary import RunSummary, summarize_run

# Options that may be chosen again, because they do not change the codes.
ADAPTER_OPTIONS = (
    "rank",
    "init",
    "split",
    "svd",
    "adapter_dtype",
    "adapter_name",
    "device",
    "precision",
    "refine",
    "refine_steps",
)


def adapt(run_path: Path, changes: Mapping[str, Any], *, console: Console | None = None) -> RunSummary:
    """Make an adapter for the codes that a run holds, on the same calibration tokens.

    Args:
        run_path: a run whose layers are all quantized.
        changes: recipe options that differ from the run's, e.g. rank or adapter_name.
        console: where progress goes; None is standard error.

    Returns:
        RunSummary: nothing is measured.

    Raises:
        UsageError: an option would change the codes, the rank is 0, or an adapter of that name exists.
        RunDirectoryError: the run is not finished, or an interrupted call used other options.
    """
    directory = RunDirectory.open(run_path)
    recipe = _recipe_of_adapter(directory, changes)
    session = Session(console or Console(stderr=True))
    work = directory.path / "work" / f"adapt-{recipe.adapter_name}"
    _refuse_taken_name(directory, recipe, work)
    with directory, started_run(work, recipe, directory.source_fingerprint) as parts:
        loaded, plan = open_planned(session, recipe)
        refuse_other_source(loaded, directory)
        refuse_unfinished(directory, plan)
        texts = calibration_text_of(directory, recipe)
        session.notes.extend(texts.notes)
        bind_text(directory, texts.calibration)
        codes = KeptCodes.of_run(directory)
        make_layers(session, CompressJob.of(loaded, plan, recipe, parts, texts.calibration, codes))
        write_run_adapter(session, directory, recipe, parts)
        certificates = parts.certificates()
        directory.write_report(f"adapter-{recipe.adapter_name}", layers_report(certificates))
        if windows_report() in parts.reports():
            directory.write_report(windows_report(recipe.adapter_name), parts.read_report(windows_report()))
    remove_finished(work)
    commands = (command_line("cloq", "export", run_path), command_line("cloq", "eval", run_path))
    return summarize_run(session, directory, recipe, certificates=certificates, next=commands)


def refuse_codes_of_alternations(recipe: Recipe) -> None:
    """Refuse an initialisation that makes codes of its own where codes are kept.

    Raises:
        UsageError: the recipe names one.
    """
    if initialisation_of(recipe).makes_codes:
        raise UsageError(
            f"init {recipe.init} makes codes of its own, and these are kept; choose init cloq or svd, or make another "
            f"run with `init={recipe.init}`: cloq run {recipe.model} --out OTHER"
        )


def _recipe_of_adapter(directory: RunDirectory, changes: Mapping[str, Any]) -> Recipe:
    """Return the run's recipe with what is asked of the new adapter."""
    base_recipe = directory.recipe
    asked = {"rank": FIELDS["rank"].default, **changes} if base_recipe.rank == 0 else dict(changes)
    frozen = sorted(set(asked) - set(ADAPTER_OPTIONS))
    if frozen:
        raise UsageError(
            f"{', '.join(frozen)} would change the codes, and adapt keeps them; allowed are "
            f"{', '.join(ADAPTER_OPTIONS)}. Make another run with: cloq run {base_recipe.model} --out OTHER"
        )
    # The codes stay as they are, however they were made.
    recipe = base_recipe.changed({**asked, "low_rank_rounds": 0})
    if recipe.rank == 0:
        raise UsageError("the rank is 0, which makes no adapter; choose one with `rank`.")
    refuse_codes_of_alternations(recipe)
    return recipe


def _refuse_taken_name(directory: RunDirectory, recipe: Recipe, work: Path) -> None:
    """Refuse a name that another adapter has, or that was begun with other options."""
    base_recipe = directory.recipe
    target = directory.adapter_path(recipe.adapter_name)
    if target.exists() and recipe.adapter_name == base_recipe.adapter_name and base_recipe.rank:
        raise UsageError(
            f"the adapter {recipe.adapter_name!r} was made together with the codes; give the new one another name with "
            "`adapter_name`."
        )
    if target.exists() and not work.exists():
        raise UsageError(
            f"{target} exists already; choose another name with `adapter_name`, or delete that folder first."
        )
    if RunDirectory.is_run(work):
        differing = RunDirectory.open(work).recipe.difference(recipe)
        if differing:
            raise UsageError(
                f"the adapter {recipe.adapter_name!r} was begun with other options and not finished "
                f"({'; '.join(differing)}); give the same ones to finish it, choose another `adapter_name`, or delete "
                f"{work}."
            )
