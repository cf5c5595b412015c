"""What `verify` compares an ONNX export with: the integers of its graph, in the float model that they are of."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from cloq_export.artifact.adapters import ADAPTERS_NAME, read_bound_adapter
from cloq_export.artifact.checkpoint_writer import FloatPart, LayerSource, WriteSettings, export_checkpoint
from cloq_export.files.fingerprint import base_fingerprint
from cloq_export.formats.onnx.adapter import require_fit
from cloq_export.formats.onnx.reading import OnnxExport
from cloq_export.formats.peft import Adapter, write_adapter
from cloq_export.models.source import LoadedModel


def read_fitting_adapter(folder: Path, export: OnnxExport, *, force: bool) -> Adapter:
    """Return the adapter of a folder, refusing one that the graph cannot serve as meant.

    Args:
        folder: an ONNX adapter or a PEFT one.
        export: the graph that it is to be served on.
        force: take it even if it is bound to another base.

    Raises:
        BindingError: it is bound to another base, or to none, or the graph has no inputs for it.
        FormatError: a file is missing or damaged.
    """
    read = read_bound_adapter(folder, export, force=force)
    require_fit(read.pairs, export.shapes, str(folder))
    return read


def write_stand_in(
    place: Path, export: OnnxExport, loaded: LoadedModel, adapters: Mapping[str, Adapter]
) -> tuple[Path, dict[str, Path]]:
    """Write an ordinary quantized checkpoint with the integers of a graph and the float part of a model.

    Only the integers of the graph go in, so that anything else that is wrong with it shows.

    Args:
        place: an existing folder to write into.
        export: the export.
        loaded: the float model that it was made from.
        adapters: name -> adapter.

    Returns:
        (checkpoint folder, name -> PEFT adapter folder).

    Raises:
        FormatError: the graph's modules are not those of the model.
    """
    layers = LayerSource(export.specs, export.shapes, export.read_layer, export.needs_adapter)
    floats = FloatPart.of_model(loaded.model, layers, dtype=loaded.source.dtype)
    # Of the integers as they are: where they were changed, it is for the certificate to say so.
    fingerprint = base_fingerprint(export.read_layers())
    base = place / "base"
    export_checkpoint(base, layers, floats, settings=WriteSettings(base_fingerprint=fingerprint))
    settings = export.folder / "generation_config.json"
    if settings.is_file():
        shutil.copyfile(settings, base / settings.name)
    folders = {}
    for name, adapter in adapters.items():
        folders[name] = place / ADAPTERS_NAME / name
        os.makedirs(folders[name].parent, exist_ok=True)
        write_adapter(folders[name], adapter.pairs, base_model="", base_fingerprint=fingerprint)
    return base, folders
