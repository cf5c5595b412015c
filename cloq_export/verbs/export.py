"""Write a deployable folder from a run: a checkpoint with its adapters, merged weights, an ONNX graph, or adapters."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.checkpoint_writer import LayerSource
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.compress.opening import open_planned, refuse_other_source, refuse_unfinished
from cloq_export.compress.session import Session
from cloq_export.errors import RunDirectoryError
from cloq_export.recipe import Recipe
from cloq_export.verbs.export_adapters import asked_adapters
from cloq_export.verbs.export_card import facts_of_run
from cloq_export.verbs.export_job import MERGED, ExportResult, ExportSource, noted_record, write_export
from cloq_export.verbs.options import ExportOptions
from cloq_export.verbs.recording import run_record
from cloq_export.verbs.run_files import write_run_checkpoint


def export(run_path: Path, options: ExportOptions, *, console: Console | None = None) -> ExportResult:
    """Write a deployable folder from a run: a checkpoint with its adapters, merged weights, or adapters alone.

    The float original is not needed: what is not quantized is taken from the run's own checkpoint, one tensor in
    memory at a time. The folder is complete or absent, is read back and compared before it gets its name, and carries
    a certificate and a model card.

    Args:
        run_path: a run whose layers are all quantized.
        options: what is asked; without adapters, all that the run has ("merged": the recipe's own).
        console: where progress goes; None is standard error.

    Returns:
        ExportResult: where it lies and what is in it.

    Raises:
        UsageError: options that contradict each other, or a target that cannot read this, with what works.
        BindingError: an adapter belongs to another base.
        CloqError: anything else that a user can mend.
    """
    directory = RunDirectory.open(run_path)
    recipe = directory.recipe
    session = Session(console or Console(stderr=True))
    with directory:
        checkpoint = _own_checkpoint(session, directory, recipe)
        names = asked_adapters(session, directory.adapters, options)
        if options.format == MERGED and not options.adapters and recipe.adapter_name in names:
            names = [recipe.adapter_name]
        source = ExportSource(
            path=run_path,
            checkpoint=checkpoint,
            layers=LayerSource.of_run(directory),
            adapters=names,
            made_from=facts_of_run(directory, recipe),
            record=noted_record(session, lambda: run_record(directory)),
            max_shard_bytes=recipe.max_shard_bytes,
        )
        return write_export(session, source, options)


def _own_checkpoint(session: Session, directory: RunDirectory, recipe: Recipe) -> Checkpoint:
    """Return the run's own checkpoint, written again from the float original if it is missing or of other layers."""
    if not directory.completed_modules():
        raise RunDirectoryError(
            f"{directory.path} has no finished layer; finish it with: cloq run {recipe.model} --out {directory.path}"
        )
    if directory.checkpoint_path.is_dir():
        checkpoint = Checkpoint.open(directory.checkpoint_path)
        computed = directory.base_fingerprint()
        if checkpoint.grids.base_fingerprint == computed:
            return checkpoint
        session.notes.append("the run's own checkpoint was of other layers, so it was written again")
    loaded, plan = open_planned(session, recipe)
    refuse_other_source(loaded, directory)
    refuse_unfinished(directory, plan)
    write_run_checkpoint(session, directory, loaded, recipe)
    return Checkpoint.open(directory.checkpoint_path)
