"""The layout `pack-quantized` of compressed-tensors, 3-bit codes dense or padded; see SPEC.md."""

from cloq_export.formats.compressed_tensors.codec import pack_layer, unpack_layer
from cloq_export.formats.compressed_tensors.config import quantization_config
from cloq_export.formats.compressed_tensors.layout import (
    COMPRESSED_TENSORS,
    COMPRESSED_TENSORS_PADDED,
    CompressedTensorsLayout,
    parse_quantization_config,
)

__all__ = [
    "COMPRESSED_TENSORS",
    "COMPRESSED_TENSORS_PADDED",
    "CompressedTensorsLayout",
    "pack_layer",
    "parse_quantization_config",
    "quantization_config",
    "unpack_layer",
]
