"""Adapters over a model whose head has codes.

vLLM wraps what turns hidden states into logits for adapters, and asks the head's weight for its dtype and device; a
head of codes has none (vllm/lora/utils.py: from_layer_logits_processor, in 0.32).
"""

from __future__ import annotations

from typing import Any

from vllm.config.lora import LoRAConfig
from vllm.lora import model_manager
from vllm.lora.layers import LogitsProcessorWithLoRA

_OF_VLLM = model_manager.from_layer_logits_processor


def register() -> None:
    """Let heads of codes be wrapped too."""
    model_manager.from_layer_logits_processor = _wrap


def _wrap(
    layer: Any, lm_head: Any, max_loras: int, lora_config: LoRAConfig, model_config: Any = None
) -> LogitsProcessorWithLoRA:
    if hasattr(lm_head, "weight"):
        return _OF_VLLM(layer, lm_head, max_loras, lora_config, model_config)
    wrapped = LogitsProcessorWithLoRA(
        layer,
        lm_head.embedding_dim,
        lora_config.lora_dtype,
        next(lm_head.parameters()).device,
        lm_head.get_sharded_to_full_mapping(),
    )
    wrapped.create_lora_weights(max_loras, lora_config, model_config)
    return wrapped
