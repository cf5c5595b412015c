"""Turn a quantized checkpoint into another layout, losslessly or not at all."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from cloq_export.artifact.adapters import AdapterShelf
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.checkpoint_writer import LayerSource
from cloq_export.artifact.model_card import MadeFrom
from cloq_export.artifact.provenance import read_base_record
from cloq_export.compress.session import Session
from cloq_export.errors import UsageError
from cloq_export.recipe import Recipe
from cloq_export.verbs.export_adapters import asked_adapters
from cloq_export.verbs.export_card import public_name
from cloq_export.verbs.export_job import ExportResult, ExportSource, noted_record, write_export
from cloq_export.verbs.options import ExportOptions


def convert(
    path: Path, options: ExportOptions, *, read_as: str | None = None, console: Console | None = None
) -> ExportResult:
    """Turn a quantized checkpoint in any layout that is read into another, losslessly or not at all.

    Args:
        path: a checkpoint folder, of ours or of another tool, or an export.
        options: what is asked; `out` is needed.
        read_as: layout to read it as, where its label is wrong.
        console: where progress goes; None is standard error.

    Returns:
        ExportResult: as from `export`.

    Raises:
        UsageError: no folder to write to, or a target that cannot read this.
        FormatError: the checkpoint cannot be read, or the layout cannot hold it.
    """
    recipe = Recipe()
    session = Session(console or Console(stderr=True))
    if options.out is None:
        raise UsageError("no folder was given; say where the checkpoint is written with `out=FOLDER`.")
    if options.out.resolve() == path.resolve():
        raise UsageError(f"{path} cannot be converted in place; choose another folder with `out`.")
    checkpoint = Checkpoint.open(path, read_as=read_as)
    if read_as is not None:
        session.notes.append(f"read as {read_as}, although its config may say otherwise")
    session.notes.extend(checkpoint.notes)
    source = ExportSource(
        path=path,
        checkpoint=checkpoint,
        layers=LayerSource.of_checkpoint(checkpoint),
        adapters=asked_adapters(session, AdapterShelf.of(path), options),
        made_from=MadeFrom(_base_model(checkpoint), "codes of another checkpoint, unchanged"),
        record=noted_record(session, lambda: read_base_record(checkpoint.folder)),
        max_shard_bytes=recipe.max_shard_bytes,
    )
    return write_export(session, source, options)


def _base_model(checkpoint: Checkpoint) -> str:
    name = checkpoint.config.get("_name_or_path")
    return public_name(name) if isinstance(name, str) and name else checkpoint.folder.resolve().name
