"""What the plugin builds on in vLLM, looked for before anything is changed.

A version whose number is known can still be another build of it; then the piece that is missing is named, and not met
as an error somewhere within a request.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from cloq_export.engines.vllm.plugin import SUPPORTED_VERSIONS
from cloq_export.errors import EngineError

Pieces = Mapping[str, tuple[str, ...]]
"""`module:attribute` -> the parameters that it must have."""

_LINEAR = "vllm.model_executor.layers.linear"
_EXPERTS = "vllm.model_executor.layers.fused_moe"
_METHOD = f"{_EXPERTS}.fused_moe_method_base:FusedMoEMethodBase"
_QUANTIZATION = "vllm.model_executor.layers.quantization"
_COMPRESSED = f"{_QUANTIZATION}.compressed_tensors"
_LAYERS = "vllm.lora.layers"
_PUNICA = "vllm.lora.punica_wrapper.punica_cpu"
_SEQUENCES = ("output_tensor", "b_seq_start_loc", "seq_len_tensor", "lora_indices_tensor", "batches", "token_nums")

PIECES: Pieces = {
    "vllm.config.lora:LoRAConfig": (),
    "vllm.exceptions:VLLMValidationError": (),
    f"{_LAYERS}:ColumnParallelLinearWithLoRA": (),
    f"{_LAYERS}:LogitsProcessorWithLoRA": (),
    f"{_LAYERS}:MergedColumnParallelLinearVariableSliceWithLoRA": (),
    f"{_LAYERS}:MergedColumnParallelLinearWithLoRA": (),
    f"{_LAYERS}:MergedQKVParallelLinearWithLoRA": (),
    f"{_LAYERS}:QKVParallelLinearWithLoRA": (),
    f"{_LAYERS}:ReplicatedLinearWithLoRA": (),
    f"{_LAYERS}:RowParallelLinearWithLoRA": (),
    f"{_LAYERS}.base:BaseLayerWithLoRA": (),
    "vllm.lora.lora_model:parse_fine_tuned_lora_name": ("name", "weights_mapper"),
    "vllm.lora.lora_weights:LoRALayerWeights.optimize": (),
    "vllm.lora.lora_weights:PackedLoRALayerWeights.pack_moe": ("loras", "module_name", "is_non_gated_moe"),
    "vllm.lora.model_manager:LoRAModelManager": (),
    "vllm.lora.model_manager:from_layer": ("layer", "max_loras", "lora_config"),
    "vllm.lora.model_manager:from_layer_logits_processor": ("layer", "lm_head", "max_loras", "lora_config"),
    f"{_PUNICA}:PunicaWrapperCPU.add_lora_logits": ("y", "x", "lora_a_stacked", "lora_b_stacked", "scale"),
    f"{_PUNICA}:PunicaWrapperCPU.update_metadata": ("mapping", "lora_index_to_id", "max_loras", "vocab_size"),
    f"{_PUNICA}:bgmv_expand": ("inputs", "lora_b_weights", "output_tensor", "lora_indices_tensor", "add_inputs"),
    f"{_PUNICA}:bgmv_expand_slice": ("inputs", "lora_b_weights", "output_tensor", "slice_offset", "slice_size"),
    f"{_PUNICA}:bgmv_shrink": ("inputs", "lora_b_weights", "output_tensor", "lora_indices_tensor", "scaling"),
    f"{_PUNICA}:sgmv_expand": ("inputs", "lora_b_weights", *_SEQUENCES, "add_inputs"),
    f"{_PUNICA}:sgmv_expand_slice": ("inputs", "lora_b_weights", *_SEQUENCES, "slice_offset", "slice_size"),
    f"{_PUNICA}:sgmv_shrink": ("inputs", "lora_a_weights", *_SEQUENCES, "scaling"),
    "vllm.lora.request:LoRARequest": ("lora_name", "lora_int_id", "lora_path", "load_inplace"),
    "vllm.lora.worker_manager:WorkerLoRAManager._load_adapter": ("lora_request",),
    "vllm.model_executor.kernels.linear:CPUWNA16LinearKernel": (),
    "vllm.model_executor.kernels.linear:MPLinearKernel": (),
    "vllm.model_executor.kernels.linear:MPLinearLayerConfig": (),
    "vllm.model_executor.kernels.linear:_POSSIBLE_KERNELS": (),
    "vllm.model_executor.kernels.linear:choose_mp_linear_kernel": ("config",),
    f"{_EXPERTS}:MoERunner": (),
    f"{_EXPERTS}:RoutedExperts": (),
    f"{_EXPERTS}.config:FusedMoEConfig": (),
    f"{_EXPERTS}.config:FusedMoEQuantConfig": (),
    f"{_METHOD}.apply": ("layer", "x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input"),
    f"{_METHOD}.create_weights": (
        "layer",
        "num_experts",
        "hidden_size",
        "intermediate_size_per_partition",
        "params_dtype",
    ),
    f"{_LINEAR}:ColumnParallelLinear": (),
    f"{_LINEAR}:LinearBase": (),
    f"{_LINEAR}:LinearMethodBase.apply": ("layer", "x", "bias"),
    f"{_LINEAR}:LinearMethodBase.create_weights": ("layer", "input_size_per_partition", "output_partition_sizes"),
    f"{_LINEAR}:MergedColumnParallelLinear": (),
    f"{_LINEAR}:QKVParallelLinear": (),
    f"{_LINEAR}:ReplicatedLinear": (),
    f"{_LINEAR}:RowParallelLinear": (),
    f"{_LINEAR}:UnquantizedLinearMethod": (),
    f"{_QUANTIZATION}:register_quantization_config": ("quantization",),
    f"{_QUANTIZATION}.base_config:QuantizationConfig.get_quant_method": ("layer", "prefix"),
    f"{_QUANTIZATION}.base_config:QuantizationConfig.override_quantization_method": ("hf_quant_cfg", "user_quant"),
    f"{_QUANTIZATION}.base_config:QuantizeMethodBase": (),
    f"{_COMPRESSED}.compressed_tensors:CompressedTensorsConfig.apply_vllm_mapper": ("hf_to_vllm_mapper",),
    f"{_COMPRESSED}.compressed_tensors:CompressedTensorsConfig.get_quant_method": ("layer", "prefix"),
    f"{_COMPRESSED}.compressed_tensors:CompressedTensorsConfig.maybe_update_config": ("model_name",),
    f"{_COMPRESSED}.schemes.compressed_tensors_wNa16:CompressedTensorsWNA16.create_weights": ("layer",),
    "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm": ("layer", "remove_weight"),
    "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead": (),
    "vllm.model_executor.models.utils:WeightsMapper": (),
    "vllm.model_executor.parameter:GroupQuantScaleParameter": (),
    "vllm.model_executor.parameter:PackedvLLMParameter": (),
    "vllm.scalar_type:ScalarType": (),
    "vllm.scalar_type:scalar_types": (),
    "vllm.transformers_utils.config:get_safetensors_params_metadata": ("model", "revision"),
    "vllm.v1.core.kv_cache_utils:_gen_lora_extra_hash_keys": ("request",),
    "vllm.v1.engine.core:EngineCore.add_lora": ("lora_request",),
    "vllm.v1.engine.core:EngineCore.list_loras": (),
    "vllm.v1.engine.input_processor:InputProcessor._validate_lora": ("lora_request",),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_prompt_logprobs_dict": (
        "hidden_states",
        "num_scheduled_tokens",
    ),
    "vllm.v1.worker.worker_base:WorkerBase": (),
}

_MODELS = "vllm.entrypoints.openai.models.serving:OpenAIServingModels"

SERVER_PIECES: Pieces = {
    "vllm:SamplingParams": ("temperature", "max_tokens", "prompt_logprobs", "detokenize"),
    "vllm.entrypoints.openai.models.api_router:models": ("request",),
    f"{_MODELS}._check_load_lora_adapter_request": ("request",),
    f"{_MODELS}._check_unload_lora_adapter_request": ("request",),
    f"{_MODELS}.init_static_loras": (),
    f"{_MODELS}.load_lora_adapter": ("request", "base_model_name"),
    f"{_MODELS}.show_available_models": (),
    "vllm.entrypoints.serve:create_error_response": ("message", "err_type", "status_code"),
    "vllm.entrypoints.serve.engine.serving:BaseServing._maybe_get_adapters": ("request",),
    "vllm.entrypoints.serve.lora.api_router:attach_router": ("app",),
    "vllm.entrypoints.serve.middleware.authenticate:AuthenticationMiddleware.verify_token": ("headers",),
    "vllm.exceptions:VLLMClientError": (),
    "vllm.inputs:tokens_input": ("prompt_token_ids",),
    "vllm.v1.engine.async_llm:AsyncLLM.generate": ("prompt", "sampling_params", "request_id", "lora_request"),
}
"""What programs that answer requests need besides; importing it takes a while."""


def require_pieces(pieces: Pieces) -> None:
    """Refuse a vLLM that lacks what the plugin builds on.

    Raises:
        EngineError: names the version and the first piece that it lacks or has in another form.
    """
    missing = missing_piece(pieces)
    if missing is not None:
        from vllm.version import __version__ as version

        raise EngineError(
            f"vLLM {version} has no {missing}, which the plugin of cloq-export builds on; install the published "
            f"version {' or '.join(SUPPORTED_VERSIONS)}, or update cloq-export."
        )


def missing_piece(pieces: Pieces) -> str | None:
    """Return the first piece that this vLLM lacks or has in another form; None if all are there."""
    for piece, parameters in pieces.items():
        module, _, path = piece.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for name in path.split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError):
            return f"{module}.{path}"
        if str(getattr(found, "__module__", "")).startswith("cloq_export."):
            continue  # put there before, by this plugin
        lacking = set(parameters) - set(inspect.signature(found).parameters) if parameters else set()
        if lacking:
            return f"{module}.{path} with the parameter {sorted(lacking)[0]}"
    return None
