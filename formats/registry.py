"""The layouts that this package writes and reads, and which one a checkpoint has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloq_export.errors import FormatError
from cloq_export.formats import auto_round, compressed_tensors, gptq
from cloq_export.formats.layout import Headers, Layout, StoredGrids

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        gptq.GPTQ_V2,
        gptq.GPTQ_V1,
        compressed_tensors.COMPRESSED_TENSORS,
        compressed_tensors.COMPRESSED_TENSORS_PADDED,
        auto_round.AUTO_ROUND,
        auto_round.AUTO_ROUND_GPTQ,
    )
}


def read_quantization_config(
    config: Mapping[str, Any], headers: Headers, *, source: str = "quantization_config"
) -> StoredGrids:
    """Read the `quantization_config` of a checkpoint, ours or a plain one of a layout that we know.

    Args:
        config: the JSON object.
        headers: of all tensors of the checkpoint, where the config alone does not tell the layout.
        source: the file, for messages.

    Returns:
        Layout and grids.

    Raises:
        FormatError: it is of a method that is not read, or damaged.
    """
    method = config.get("quant_method")
    if method == gptq.GPTQ_V2.quant_method:
        return gptq.parse_quantization_config(config, headers, source=source)
    if method == auto_round.METHOD:
        return auto_round.parse_quantization_config(config, headers, source=source)
    if method == compressed_tensors.COMPRESSED_TENSORS.quant_method:
        return compressed_tensors.parse_quantization_config(config, headers, source=source)
    known = sorted({layout.quant_method for layout in LAYOUTS.values()})
    raise FormatError(
        f"{source}: quant_method is {method!r:.80}; this program reads {', '.join(known)}. "
        "`cloq inspect` says what can be done with it."
    )
