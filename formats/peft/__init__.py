"""LoRA adapters in PEFT's layout, bound to their quantized base; see SPEC.md."""

from cloq_export.formats.peft.codec import WEIGHTS_NAME, Adapter, is_adapter, read_adapter, tensor_name, write_adapter
from cloq_export.formats.peft.pairs import (
    VLLM_MAX_LORA_RANKS,
    UniformPairs,
    allowed_rank,
    balanced,
    padded,
    product_difference,
    uniform,
)

__all__ = [
    "VLLM_MAX_LORA_RANKS",
    "WEIGHTS_NAME",
    "Adapter",
    "UniformPairs",
    "allowed_rank",
    "balanced",
    "is_adapter",
    "padded",
    "product_difference",
    "read_adapter",
    "tensor_name",
    "uniform",
    "write_adapter",
]
