"""The GPTQ layout, versions 1 and 2; see SPEC.md."""

from cloq_export.formats.gptq.codec import check_packable, check_symmetric, layout_name, pack_layer, unpack_layer
from cloq_export.formats.gptq.config import (
    is_head,
    quantization_config,
)
from cloq_export.formats.gptq.layout import (
    GPTQ_V1,
    GPTQ_V2,
    GptqLayout,
    parse_quantization_config,
    version_of_symmetric,
)

__all__ = [
    "GPTQ_V1",
    "GPTQ_V2",
    "GptqLayout",
    "check_packable",
    "check_symmetric",
    "is_head",
    "layout_name",
    "pack_layer",
    "parse_quantization_config",
    "quantization_config",
    "unpack_layer",
    "version_of_symmetric",
]
