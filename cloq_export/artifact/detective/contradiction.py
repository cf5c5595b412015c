"""Whether the content of GPTQ's layers speaks against the version that their label names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cloq_export.artifact.detective import statistics
from cloq_export.artifact.detective.case import Case, mean_text
from cloq_export.artifact.detective.gptq_sample import grid_of_shapes, sample_layers
from cloq_export.files.safe_tensors import TensorFile
from cloq_export.types import SUPPORTED_BITS

# Few, because a checkpoint is opened often: the bias of a model, and not the number of its layers, limits what is seen.
_LAYERS = 4
_LAYER_BYTES = 1 << 19
# Odds of a million to one, in natural logarithms: beyond what a report calls likely, because reading is refused.
_REFUSING_ODDS = 13.8


def contradicted_version(
    folder: Path, files: Mapping[str, TensorFile], modules: Sequence[str], version: int
) -> str | None:
    """Return what speaks against the version of GPTQ that asymmetric layers are labelled with, or None.

    No single tensor proves how zeros are stored, so what counts is where codes lie beside them
    (`statistics.zero_offset`).

    Args:
        folder: of the checkpoint.
        files: stored name -> the file that holds it.
        modules: asymmetric ones, as the files call them, in order.
        version: that the label names.

    Returns:
        The figures in words where the other version explains them a million times better, else None.
    """
    case = Case(folder, {}, files, {name: file.headers[name] for name, file in files.items()})
    offsets = []
    for module in statistics.spread_evenly(modules, _LAYERS):
        grid = grid_of_shapes(case, module)
        if grid is None or grid[0] not in SUPPORTED_BITS:
            continue
        _, samples, _, _ = sample_layers(case, {module: grid}, grid[0], layer_bytes=_LAYER_BYTES)
        offsets += [sample.offsets["dense"] for sample in samples]
    offset = statistics.zero_offset(offsets)
    if offset is None or offset.shift is None or abs(offset.log_odds) < _REFUSING_ODDS:
        return None
    return None if offset.shift == (1 if version == 1 else 0) else mean_text(offset)
