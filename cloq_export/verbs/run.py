"""From a model to a measured checkpoint with its adapter."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.probe_record import ProbeRecord
from cloq_export.artifact.provenance import QualityRecord
from cloq_export.compress.budgeting import budgeted_recipe, with_choices_of
from cloq_export.compress.job import compress_model
from cloq_export.compress.session import Session
from cloq_export.compress.strategies import check_low_rank_first, check_shared_a
from cloq_export.models.devices import chosen_device, limited
from cloq_export.models.source import LoadedModel
from cloq_export.parity.perplexity import PerplexityTable, TextWindows, check_windows
from cloq_export.recipe import Recipe, bytes_of_size
from cloq_export.verbs.adapt import refuse_codes_of_alternations
from cloq_export.verbs.export_card import public_name
from cloq_export.verbs.held_out import notes_on_evaluation
from cloq_export.verbs.recording import CODES_ALONE, record_base
from cloq_export.verbs.run_files import note_source, open_run, write_run_adapter, write_run_checkpoint
from cloq_export.verbs.run_texts import bind_text, run_texts
from cloq_export.verbs.stored_model import StoredModel, choose_adapter, measure_perplexity, probe_stored
from cloq_export.verbs.summary import RunSummary, summarize_run


def run(
    recipe: Recipe,
    out: Path,
    *,
    demo: bool = False,
    console: Console | None = None,
    check: Callable[[LoadedModel], None] | None = None,
) -> RunSummary:
    """Go from a model to a checkpoint with its adapter, and measure it, continuing what an earlier call has done.

    Args:
        recipe: every option.
        out: the run directory.
        demo: without WikiText-2 at hand, calibrate and measure on the text that Python itself carries.
        console: where progress goes; None is standard error.
        check: called with the model before any work; refuses what a later step could not do.

    Returns:
        RunSummary: what was measured, where the files are, what to type next.

    Raises:
        CloqError: anything a user can mend, in one line.
    """
    if recipe.codes_from:
        refuse_codes_of_alternations(recipe)
    check_low_rank_first(recipe)
    check_shared_a(recipe)
    recipe = with_choices_of(out, _with_grid_of_codes(recipe))
    session = Session(console or Console(stderr=True))
    texts = run_texts(recipe, demo=demo, measures=recipe.measure)
    session.notes.extend(texts.notes)
    windows = None
    if recipe.measure and texts.evaluation is not None:
        session.notes.extend(notes_on_evaluation(texts.calibration, texts.evaluation))
        windows = TextWindows(texts.evaluation, recipe.eval_window, recipe.eval_windows, recipe.bos)

    def check_all(loaded: LoadedModel) -> None:
        if windows is not None:
            ids = windows.tokens(loaded.tokenizer)
            check_windows(loaded.model, ids, window=windows.window, windows=windows.windows)
        if check is not None:
            check(loaded)

    with open_run(session, out, recipe) as directory:
        bind_text(directory, texts.calibration)
        recipe = budgeted_recipe(session, directory, recipe, texts.calibration, check_all)
        model = compress_model(session, directory, recipe, texts.calibration, check_all)
        note_source(directory, model)
        write_run_adapter(session, directory, recipe)
        write_run_checkpoint(session, directory, model, recipe)
        adapter = choose_adapter(session, out, recipe.adapter_name)
        device = chosen_device(recipe.device)
        stored = StoredModel(out, adapter, device=device)
        session.notes.extend(stored.notes)
        probes: dict[str, ProbeRecord] = {}
        perplexity = None
        with limited(device, bytes_of_size(recipe.device_memory)):
            if windows is not None:
                measured = (session, stored, windows, model, probes)
                perplexity = session.timed("measure", lambda: measure_perplexity(*measured))
                directory.write_report("evaluation", perplexity.to_json())
            else:
                session.timed("measure", lambda: probe_stored(session, stored, model.tokenizer, probes))
        record_base(
            session,
            directory,
            model.tokenizer,
            model_name=public_name(recipe.model),
            probes=probes,
            quality=None if perplexity is None else _quality(recipe, perplexity),
        )
        directory.set_state("done")
        return summarize_run(session, directory, recipe, perplexity=perplexity)


def _with_grid_of_codes(recipe: Recipe) -> Recipe:
    """Return the recipe with the grid that most layers of the checkpoint have whose codes it keeps."""
    if not recipe.codes_from:
        return recipe
    grids = collections.Counter(Checkpoint.open(recipe.codes_from).specs.values())
    spec = grids.most_common(1)[0][0]
    return recipe.changed({"bits": spec.bits, "group_size": spec.group_size, "symmetric": spec.symmetric})


def _quality(recipe: Recipe, perplexity: PerplexityTable) -> QualityRecord:
    """Return what `verify` holds a served model's perplexity against."""
    names = {"quantized": CODES_ALONE, "adapter": recipe.adapter_name}
    ratios = {label: measured.ratio_to_float for label, measured in perplexity.models.items()}
    return QualityRecord(
        text=public_name(recipe.eval_text),
        text_sha256=perplexity.text_sha256,
        window=recipe.eval_window,
        windows=recipe.eval_windows,
        bos=recipe.bos,
        ratio={names[label]: ratio for label, ratio in ratios.items() if ratio is not None},
    )
