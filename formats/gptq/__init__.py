"""The GPTQ layout, versions 1 and 2; see SPEC.md."""

from cloq_export.formats.gptq.codec import (
    GptqConfig,
    check_packable,
    layout_name,
    pack_layer,
    parse_quantization_config,
    quantization_config,
    unpack_layer,
)

__all__ = [
    "GptqConfig",
    "check_packable",
    "layout_name",
    "pack_layer",
    "parse_quantization_config",
    "quantization_config",
    "unpack_layer",
]
