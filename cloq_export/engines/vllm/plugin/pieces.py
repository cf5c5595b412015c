"""What the plugin builds on in vLLM, looked for before anything is changed.

A version whose number is known can still be another build of it; then the piece that is missing is named, and not met
as an error somewhere within a request.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

PIECES: Mapping[str, tuple[str, ...]] = {
    "vllm.lora.layers.base:BaseLayerWithLoRA": (),
    "vllm.lora.lora_model:parse_fine_tuned_lora_name": ("name", "weights_mapper"),
    "vllm.lora.lora_weights:PackedLoRALayerWeights.pack_moe": ("loras", "module_name", "is_non_gated_moe"),
    "vllm.lora.model_manager:LoRAModelManager": (),
    "vllm.lora.model_manager:from_layer": ("layer", "max_loras", "lora_config"),
    "vllm.lora.model_manager:from_layer_logits_processor": ("layer", "lm_head", "max_loras", "lora_config"),
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU.add_lora_logits": (),
    "vllm.lora.worker_manager:WorkerLoRAManager._load_adapter": ("lora_request",),
    "vllm.model_executor.layers.fused_moe:MoERunner": (),
    "vllm.model_executor.layers.fused_moe:RoutedExperts": (),
    "vllm.model_executor.layers.fused_moe.fused_moe_method_base:FusedMoEMethodBase.apply": (
        "layer",
        "x",
        "topk_weights",
        "topk_ids",
        "shared_experts",
        "shared_experts_input",
    ),
    "vllm.model_executor.layers.fused_moe.fused_moe_method_base:FusedMoEMethodBase.create_weights": (
        "layer",
        "num_experts",
        "hidden_size",
        "intermediate_size_per_partition",
        "params_dtype",
    ),
    "vllm.model_executor.layers.linear:LinearMethodBase": (),
    "vllm.model_executor.layers.quantization:register_quantization_config": (),
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors"
    ":CompressedTensorsConfig.get_quant_method": ("layer", "prefix"),
}
"""`module:attribute` -> the parameters that it must have."""


def missing_piece(pieces: Mapping[str, tuple[str, ...]] = PIECES) -> str | None:
    """Return the first piece that this vLLM lacks or has in another form; None if all are there."""
    for piece, parameters in pieces.items():
        module, _, path = piece.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for name in path.split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError):
            return f"{module}.{path}"
        lacking = set(parameters) - set(inspect.signature(found).parameters) if parameters else set()
        if lacking:
            return f"{module}.{path} with the parameter {sorted(lacking)[0]}"
    return None
