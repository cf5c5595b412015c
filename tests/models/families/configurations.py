"""One tiny configuration of every causal family in the installed transformers, made from its own config class.

A size is set by the name that configs use for it; what a family needs beside that stands in `OVERRIDES`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

WORDS = 80
# Words of the tokenizer, and ids of images, sounds and the like behind them.
VOCABULARY = 96
LAYERS = 4

# Name of an integer in a config (whole) -> its value; the first that matches.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size|vocab_size_per_layer_input|decoder_vocab_size", VOCABULARY),
    # Layers that are told apart by their number keep what their class chooses for that many.
    (r"num_hidden_layers|n_layers?|num_layers|(de|en)coder_layers|num_(de|en)coder_layers|num_blocks|depth", LAYERS),
    (r"(num_)?(key_value|kv)_heads|n(um)?_kv_heads|num_key_value_heads|swa_num_key_value_heads|num_query_groups", 2),
    (r"mamba_n(um)?_heads|mamba_num_heads", 8),
    (r"(.*_)?num_global_key_value_heads", 2),
    (r"linear_num_key_heads|n_mamba_heads", 2),
    (r"index_n_heads", 2),
    (r"(.*_)?(num_)?(attention_)?heads|n_heads?|linear_num_value_heads|linear_num_heads", 4),
    (r"mamba_d_head|mamba_headdim|mamba_head_dim", 16),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"qk_head_dim", 24),
    (r"(.*_)?head_dim|dim_head|d_head|kv_channels|head_size|attention_head_size", 16),
    (r"hidden_size|d_model|n_embd|embed_dim|embedding_dim|emb_dim|embedding_size|word_embed_proj_dim|lru_width", 64),
    (r"output_hidden_size|projection_dim|out_hidden_size|proj_hidden_size|attention_hidden_size|hidden_dim|dim", 64),
    (r"input_embedding_size|output_embedding_size|.*_embed_dim|projector_hidden_size|.*_output_dim|.*_input_dim", 64),
    (r"downsample_hidden_size", 16),
    (
        r"(.*_)?intermediate_size(_mlp)?|(.*_)?ffn_dim|ffn_hidden_size|.*_ffn_hidden_size|dff|dim_ff|d_inner|mlp_dim",
        128,
    ),
    (r"mamba_d_ssm|feed_forward_size|n_inner", 128),
    (r"moe_(shared_expert_)?intermediate_size|shared_expert_intermediate_size", 64),
    (r"(n_routed|num|num_local|moe_num|n_physical)_experts|num_experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_k|num_experts_per_token|top_k|moe_top_k", 2),
    (r"n_groups", 2),
    (r"n_group|topk_group|n_shared_experts|num_shared_experts", 1),
    (r"(q|kv|o)_lora_rank", 32),
    (r"mamba_d_state|state_size|ssm_state_size", 16),
    (r"(mamba_)?chunk_size|mamba_chunk_size|block_size|.*_chunk_size", 16),
    (r"time_step_rank|mamba_dt_rank|dt_rank", 8),
    (r"hidden_size_per_layer_input|laurel_rank|d_rel|hc_lowrank|gated_norm_rank|adapter_rank", 16),
    (r"sliding_window(_size)?|attention_window_size|window_size|local_attention|attention_chunk_size", 8),
    # All tokens: random models give many the same score, and which of them are chosen is then chance.
    (r"index_topk", 256),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|context_length|max_.*_positions", 256),
    (r"num_kv_shared_layers", 2),
    (r"pronunciation_vocab_size|shape_vocab_size", 16),
    (r"image_size", 28),
    (r"patch_size", 14),
    (r"type_vocab_size", 2),
)
_TOKEN = re.compile(r".*(token|start|end)_(id|index)|image_token|.*_token_idx")
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

_ROPE = {"rope_type": "default", "rope_theta": 1e4}
# Positions of three kinds; together half of what is turned of a head.
_ROPE_OF_3 = {**_ROPE, "mrope_section": [4, 2, 2]}
_GLM_ROPE = {**_ROPE, "mrope_section": [4, 2, 2], "partial_rotary_factor": 1.0}
_HEIGHT_AND_WIDTH_FIRST = {**_ROPE, "mrope_section": [2, 2, 4]}
_TWO_ROPES = dict.fromkeys(("full_attention", "sliding_attention"), _ROPE_OF_3)
_HYBRID = ["linear_attention", "full_attention"] * 2
_SHARED = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_ALL_HEADS = {"num_key_value_heads": 4}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 256,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 64,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 4,
}

# Family -> what its config gets beside the sizes above; nested as the config is.
OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "bamba": {
        "attn_layer_indices": [1, 3],
    },
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
    "chameleon": {
        "vocabulary_map": {"<image>": VOCABULARY - 1},
        "vq_config": {"base_channels": 32, "codebook_size": 32},
    },
    "cohere_compass": {"text_config": {"rope_parameters": _TWO_ROPES}},
    "cohere_compass_text": {"rope_parameters": _TWO_ROPES},
    "cosmos3_edge": {"text_config": {"rope_parameters": _ROPE_OF_3}},
    "dbrx": {
        "rope_parameters": _ROPE,
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 64},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"] * 2, "num_experts_per_tok": 2}},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "emu3": {"vocabulary_map": {"<image>": VOCABULARY - 1}, "vq_config": {"base_channels": 32, "codebook_size": 32}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": _HEIGHT_AND_WIDTH_FIRST, "moe_intermediate_size": [64, 64]}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma3n_text": {"intermediate_size": 128},
    "glm46v": {"text_config": {"rope_parameters": _GLM_ROPE}},
    "glm4v": {"text_config": {"rope_parameters": _GLM_ROPE}},
    "glm4v_moe": {"text_config": {"rope_parameters": _GLM_ROPE}},
    "glm_ocr": {"text_config": {"rope_parameters": _GLM_ROPE}},
    "glmga": {"text_config": {"rope_parameters": _GLM_ROPE}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "text_config": {"model_type": "granite"},
        "deepstack_layer_map": [],
        "spatial_target_layers": [],
    },
    "granitemoehybrid": {"layer_types": _HYBRID},
    "hunyuan_vl": {"text_config": {"rope_parameters": _ROPE_OF_3}},
    "janus": {"vq_config": {"base_channels": 32, "num_embeddings": 32, "latent_channels": 32}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 4, "expert_layer_offset": 1},
    "kimi_linear": {"layer_types": _HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"zero_expert_num": 2, "n_routed_experts": 4},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h_omni": {"video_temporal_patch_size": 2, "vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": {"text_config": {"rope_parameters": _ROPE_OF_3}},
    "phi4_multimodal": {"audio_config": {"nemo_conv_channels": 32}},
    "qwen2_5_omni_thinker": {"text_config": {"rope_parameters": _ROPE_OF_3}, "vision_start_token_id": VOCABULARY - 9},
    "qwen2_5_vl": {"text_config": {"rope_parameters": _ROPE_OF_3}},
    "qwen2_vl": {"text_config": {"rope_parameters": _ROPE_OF_3}},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": VOCABULARY - 9},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"axial_pos_shape": (16, 16), "axial_pos_embds_dim": (32, 32), "attn_layers": ("local", "lsh") * 2},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": _SHARED, "attention_hidden_size": 128, "attention_head_dim": 32, **_ALL_HEADS},
    "zamba2": {
        "layers_block_type": _SHARED,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "n_mamba_heads": 8,
        **_ALL_HEADS,
    },
    "zaya": {"num_experts_per_tok": 1, "sliding_window": None},
}


# Families without a row -> why.
LEFT_OUT: Mapping[str, str] = {
    **dict.fromkeys(("florence2", "pix2struct", "pp_formulanet", "t5gemma2", "udop"), "an encoder-decoder"),
    **dict.fromkeys(
        ("blip", "blip-2", "idefics", "instructblip", "instructblipvideo", "kosmos-2", "pi0"), "needs images"
    ),
    **dict.fromkeys(("musicgen", "musicgen_melody", "vision-encoder-decoder"), "has no configuration of its own"),
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"), "drafts for another model, whose states it needs"
    ),
    "voxtral_realtime": "needs sounds",
    "shieldgemma2": "classifies images",
    **dict.fromkeys(("qwen2_5_omni", "qwen3_omni_moe"), "its class has no forward pass; its thinker has a line"),
    **dict.fromkeys(("kyutai_speech_to_text", "vibevoice_asr"), "has no tiny configuration yet"),
    "diffusion_gemma": "no causal language model: it denoises blocks",
}


def causal_families() -> list[str]:
    """Return the families that `AutoModelForCausalLM` names."""
    return [family for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if family not in LEFT_OUT]


def wrapper_families() -> list[str]:
    """Return the families whose class for texts with images, or sounds, holds a causal language model."""
    named = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
    return [family for family in named if family not in {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **LEFT_OUT}]


def architecture_of(family: str) -> str:
    """Return the name of the class whose checkpoints are taken for a family."""
    # A wrapper of which AutoModelForCausalLM opens the text part: its checkpoints are those of the wrapper.
    names = (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )
    found = next(mapping[family] for mapping in names if family in mapping)
    return found if isinstance(found, str) else found[0]


def tiny_config(family: str) -> PretrainedConfig:
    """Return the tiny configuration of a family."""
    config_class = CONFIG_MAPPING[family]
    options = _tiny_options(_default(config_class), OVERRIDES.get(family, {}))
    config = config_class(**options)
    if getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder:
        config.is_decoder = True
    return config


def _default(config_class: type[PretrainedConfig]) -> PretrainedConfig:
    return config_class()


def _tiny_options(default: PretrainedConfig, own: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    next_token = VOCABULARY - 1
    for name, value in vars(default).items():
        given = own.get(name)
        if isinstance(value, PretrainedConfig):
            part = _tiny_options(value, given if isinstance(given, Mapping) else {})
            options[name] = {"model_type": value.model_type, **part} if value.model_type else part
        elif name in _ENDS:
            options[name] = _ENDS[name]
        elif _TOKEN.fullmatch(name) and isinstance(value, int) and value >= VOCABULARY:
            options[name], next_token = next_token, next_token - 1
        elif name == "rope_parameters" and isinstance(value, dict) and "mrope_section" in value:
            # Its parts together are half of what is turned of a head.
            turned = int(8 * value.get("partial_rotary_factor", 1))
            options[name] = {**value, "mrope_section": [turned // 2, turned // 4, turned // 4]}
        elif (isinstance(value, int) and not isinstance(value, bool) and value > 0) or name == "head_dim":
            size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
            if size is not None:
                options[name] = size
    if "kv_lora_rank" in options:
        # Latent attention: keys are made for every head, and what turns of them is a part of their own.
        options |= {name: size for name, size in (("num_key_value_heads", 4), ("head_dim", 8)) if name in options}
    return {
        **options,
        **{name: value for name, value in own.items() if name not in options or not _is_part(default, name)},
    }


def _is_part(default: PretrainedConfig, name: str) -> bool:
    return isinstance(vars(default).get(name), PretrainedConfig)
