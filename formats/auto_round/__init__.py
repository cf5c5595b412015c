"""AutoRound's own layout, which has GPTQ's words without an index; see SPEC.md."""

from cloq_export.formats.auto_round.config import DEFAULT_PACKING, METHOD, PACKINGS, quantization_config
from cloq_export.formats.auto_round.layout import (
    AUTO_ROUND,
    AUTO_ROUND_GPTQ,
    AutoRoundLayout,
    parse_quantization_config,
)

__all__ = [
    "AUTO_ROUND",
    "AUTO_ROUND_GPTQ",
    "DEFAULT_PACKING",
    "METHOD",
    "PACKINGS",
    "AutoRoundLayout",
    "parse_quantization_config",
    "quantization_config",
]
