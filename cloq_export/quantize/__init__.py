"""From a weight and its input statistics to codes, scales and zeros."""

from cloq_export.quantize.damping import DampedGram, damp_gram, effective_rank, spectral_norm
from cloq_export.quantize.layers import QuantizedGroup, QuantizeOptions, quantize_group
from cloq_export.quantize.target import error_aware_target

__all__ = [
    "DampedGram",
    "QuantizeOptions",
    "QuantizedGroup",
    "damp_gram",
    "effective_rank",
    "error_aware_target",
    "quantize_group",
    "spectral_norm",
]
