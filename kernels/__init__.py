"""Compute kernels: `reference` defines the results that every other one is tested against.

A kernel receives plain tensors in the GPTQ order and knows nothing of the rest of the package. The operators below
are registered with torch, so that a faster implementation for one device is added with
`packed_linear_op.register_kernel(device)` without any caller changing; `operators` does so for GPUs.
"""

from __future__ import annotations

from cloq_export.kernels.operators import dequantize
from cloq_export.kernels.reference.linear import (
    check_packed,
    packed_linear,
    packed_linear_input_grad_op,
    packed_linear_op,
    unpack_codes,
    unpack_zeros,
)
from cloq_export.kernels.reference.lora import Adapters, packed_lora_linear, packed_lora_linear_op

__all__ = [
    "Adapters",
    "check_packed",
    "dequantize",
    "packed_linear",
    "packed_linear_input_grad_op",
    "packed_linear_op",
    "packed_lora_linear",
    "packed_lora_linear_op",
    "unpack_codes",
    "unpack_zeros",
]
