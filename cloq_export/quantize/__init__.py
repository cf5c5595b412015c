"""From a weight and its input statistics to codes, scales and zeros."""

from cloq_export.quantize.damping import DampedGram, damp_gram, effective_rank, spectral_norm
from cloq_export.quantize.layers import QuantizedGroup, QuantizeOptions, quantize_group
from cloq_export.quantize.reach import LOST_SHARE, exceeds_float16, lost_energy, lost_groups, reach_fault
from cloq_export.quantize.target import error_aware_target

__all__ = [
    "LOST_SHARE",
    "DampedGram",
    "QuantizeOptions",
    "QuantizedGroup",
    "damp_gram",
    "effective_rank",
    "error_aware_target",
    "exceeds_float16",
    "lost_energy",
    "lost_groups",
    "quantize_group",
    "reach_fault",
    "spectral_norm",
]
