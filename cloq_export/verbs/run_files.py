"""What a run writes apart from its layers: where it comes from, its adapter, its checkpoint."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from cloq_export.artifact.certificate import certify_checkpoint
from cloq_export.artifact.checkpoint_writer import FloatPart, LayerSource, WriteSettings, export_checkpoint
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.artifact.run_layers import natural_order
from cloq_export.compress.opening import source_fingerprint, started_run
from cloq_export.compress.session import Session
from cloq_export.formats.peft import write_adapter
from cloq_export.formats.registry import LAYOUTS
from cloq_export.models.saving import save_source_files
from cloq_export.models.source import LoadedModel, find_source
from cloq_export.recipe import Recipe
from cloq_export.types import LoraPair
from cloq_export.verbs.export_card import SOURCE_REPORT, license_of
from cloq_export.verbs.recording import note_adapter


def open_run(session: Session, out: Path, recipe: Recipe) -> contextlib.AbstractContextManager[RunDirectory]:
    """Begin a run in a folder or continue the one that is there, bound to all that it is made from.

    Raises:
        RunDirectoryError: the folder holds another run.
        SourceError: the model cannot be found.
    """
    source = session.timed("read model", lambda: find_source(recipe.model))
    fingerprint = session.timed("read model", lambda: source_fingerprint(recipe, source.fingerprint))
    return started_run(out, recipe, fingerprint)


def note_source(directory: RunDirectory, loaded: LoadedModel) -> None:
    """Note in the run what its exports must say of the float model."""
    stated = license_of(loaded.source)
    directory.write_report(SOURCE_REPORT, {"name": loaded.source.name, "license": stated.to_json() if stated else {}})


def write_run_adapter(
    session: Session, directory: RunDirectory, recipe: Recipe, parts: RunDirectory | None = None
) -> None:
    """Write the adapter of a recipe, bound to the run's base; nothing if there are no pairs.

    Args:
        session: of the call.
        directory: the run, all layers finished.
        recipe: model and adapter_name.
        parts: where the pairs stand; None is the run itself.
    """
    source = parts or directory
    pairs: dict[str, LoraPair] = {}
    for module in sorted(source.completed_modules(), key=natural_order):
        pair = source.read_pair(module)
        if pair is not None:
            pairs[module] = pair
    if not pairs:
        return
    fingerprint = directory.base_fingerprint()
    session.timed(
        "write",
        lambda: write_adapter(
            directory.adapter_path(recipe.adapter_name),
            pairs,
            base_model=recipe.model,
            base_fingerprint=fingerprint,
            extra=note_adapter(recipe.adapter_name, pairs, base_fingerprint=fingerprint),
        ),
    )


def write_run_checkpoint(session: Session, directory: RunDirectory, loaded: LoadedModel, recipe: Recipe) -> None:
    """Write RUN/checkpoint, read it back, and certify it.

    Args:
        session: of the call.
        directory: the run, all layers finished.
        loaded: its float model.
        recipe: format and max_shard_size.

    Raises:
        CloqError: a layer does not fit the layout, the disk is full, or what was read back differs.
    """
    layers = LayerSource.of_run(directory)
    floats = FloatPart.of_model(
        loaded.model, layers, dtype=loaded.source.dtype, save_files=lambda folder: save_source_files(loaded, folder)
    )

    def certify(folder: Path, fingerprint: str) -> None:
        certify_checkpoint(folder, layers, floats, base_fingerprint=fingerprint)

    session.timed(
        "write",
        lambda: export_checkpoint(
            directory.checkpoint_path,
            layers,
            floats,
            layout=LAYOUTS[recipe.format],
            settings=WriteSettings(recipe.max_shard_bytes, finish=certify),
        ),
    )


def remove_finished(work: Path) -> None:
    """Remove a work folder whose work is done.

    It is renamed first: a kill halfway through the removal must not leave what looks like an interrupted call.
    """
    finished = work.with_name(f".{work.name}.finished")
    shutil.rmtree(finished, ignore_errors=True)
    work.rename(finished)
    shutil.rmtree(finished, ignore_errors=True)
    with contextlib.suppress(OSError):  # another adapter may be under construction there
        work.parent.rmdir()
