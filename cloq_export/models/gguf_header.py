"""The keys of a GGUF header that say what a model computes, held against the model that transformers makes of them.

transformers reads some keys of each architecture's header and passes over the rest in silence (soft caps, attention
scales, windows). Each key that llama.cpp computes by is compared here with what the loaded model does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Keys that the shapes of the tensors hold to, or that only describe.
_HELD_BY_SHAPES = frozenset(
    {
        "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length",
        "tensor_data_layout", "rope.scaling.finetuned",
    }
)  # fmt: skip
# What else a scaling type needs; without one llama.cpp does not look at them.
_SCALING_DETAILS = (
    "original_context_length", "yarn_beta_fast", "yarn_beta_slow", "yarn_ext_factor", "yarn_log_multiplier",
    "yarn_attn_factor",
)  # fmt: skip
# Scales of which zero means that there is none.
_NEUTRAL: Mapping[str, float] = {
    "rope.scaling.factor": 1.0, "rope.scale_linear": 1.0, "rope.scaling.alpha": 1.0, "rope.scaling.attn_factor": 1.0,
    "logit_scale": 1.0, "embedding_scale": 1.0, "residual_scale": 1.0, "expert_weights_scale": 1.0,
    "expert_group_count": 1, "expert_group_used_count": 1,
}  # fmt: skip
_EPSILONS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_rms_eps")
_GATING = {"softmax": 1, "sigmoid": 2}


def header_differences(
    own: Mapping[str, Any], config: Any, *, rope_from_tensor: bool
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, value, what the model has instead) where a header and a model differ.

    Args:
        own: the keys of the architecture, without its name.
        config: of the model that transformers made.
        rope_from_tensor: the model's rope scaling was made from a tensor of the file, so the header knows of none.

    Returns:
        An iterator; what the model has is None for a key that nothing here knows.
    """
    facts = _Facts(config, own, rope_from_tensor=rope_from_tensor)
    scaled = facts.header_scales
    for key, value in own.items():
        if key in _HELD_BY_SHAPES:
            continue
        detail = key.removeprefix("rope.scaling.")
        if detail != key and detail in _SCALING_DETAILS and not scaled:
            continue
        asked = _EXPECTED.get(key)
        expected = None if asked is None else asked(facts)
        if not _same(_normal(key, value, facts), expected):
            yield key, value, expected
    # llama.cpp has a default of its own for Gemma 2 alone, and it is the same.
    if "attention.sliding_window" not in own and facts.architecture != "gemma2" and facts.window < math.inf:
        yield "attention.sliding_window", "nothing", facts.window


def _normal(key: str, value: Any, facts: _Facts) -> Any:
    """Return a value of the header with the several ways to say one thing made one."""
    if key in _NEUTRAL:
        return value or _NEUTRAL[key]
    if key == "rope.scaling.type":
        return {"none": "default"}.get(value, value)
    if key == "rope.dimension_sections" and isinstance(value, list):
        return [section for section in value if section]
    if key == "attention.head_count_kv" and isinstance(value, list):
        # Layers without attention have none.
        return [heads for heads in value if heads]
    if key == "attention.sliding_window":
        return facts.effective(value)
    if key == "attention.sliding_window_pattern" and not isinstance(value, list):
        # Every n-th layer sees everything.
        return [bool(value) and (layer + 1) % value != 0 for layer in range(len(facts.slides))]
    return value


def _same(value: Any, expected: Any) -> bool:
    if isinstance(value, list) and not isinstance(expected, list):
        return all(_same(entry, expected) for entry in value)
    if isinstance(value, list) or isinstance(expected, list):
        return value == expected
    if isinstance(value, str) or isinstance(expected, str):
        return bool(value == expected)
    if expected is None:
        return False
    return math.isclose(float(value), float(expected), rel_tol=1e-4) if value != expected else True


class _Facts:
    """What a loaded model does, under the words of a GGUF header."""

    def __init__(self, config: Any, own: Mapping[str, Any], *, rope_from_tensor: bool) -> None:
        self.config = config.get_text_config()
        self.architecture = str(self.config.model_type).removesuffix("_text")
        heads = self.first("num_attention_heads", default=1)
        self.head_dim = self.first("head_dim") or self.first("hidden_size", default=0) // heads
        rope = self.first("rope_parameters") or {}
        nested = any(isinstance(value, Mapping) for value in rope.values())
        self.rope: Mapping[str, Any] = (rope.get("full_attention") or {}) if nested else rope
        if rope_from_tensor:
            self.rope = {name: self.rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in self.rope}
        self.local_rope: Mapping[str, Any] = (rope.get("sliding_attention") or {}) if nested else rope
        self.context = own.get("context_length") or self.first("max_position_embeddings") or math.inf
        kind, factor = own.get("rope.scaling.type", "none"), own.get("rope.scaling.factor", 1.0)
        self.further = own.get("nextn_predict_layers", 0)
        self.header_scales = kind != "none" or factor not in (0.0, 1.0)

    def effective(self, window: float | None) -> float:
        """Return a window, or infinity for one that shuts nothing out of the longest text."""
        return window if window and window < self.context else math.inf

    def first(self, *names: str, default: Any = None) -> Any:
        """Return the first of several attributes that the config has."""
        return next((value for name in names if (value := getattr(self.config, name, None)) is not None), default)

    @property
    def rotary(self) -> int:
        """Return how many dimensions of a head are rotated."""
        whole = self.first("rotary_dim")
        if whole is not None:
            return int(whole)
        head = self.first("global_head_dim") or self.head_dim
        share = self.rope.get("partial_rotary_factor", self.first("partial_rotary_factor", default=1.0))
        return int(head * share)

    @property
    def window(self) -> float:
        """Return how far attention looks back in the layers where it slides; infinity for none."""
        return self.effective(self.first("sliding_window")) if any(self.slides) else math.inf

    @property
    def attention_scale(self) -> float:
        """Return what products of queries and keys are multiplied with."""
        return float(self.first("query_pre_attn_scalar", default=self.head_dim)) ** -0.5

    @property
    def slides(self) -> list[bool]:
        """Return for each layer whether its attention slides."""
        kinds = self.first("layer_types")
        if kinds is None:
            return [self.first("sliding_window") is not None] * self.first("num_hidden_layers", default=1)
        return [kind == "sliding_attention" for kind in kinds]


# Key without the architecture -> what the loaded model has.
_EXPECTED: Mapping[str, Callable[[_Facts], Any]] = {
    "attention.head_count": lambda facts: facts.first("num_attention_heads", default=0),
    "attention.head_count_kv": lambda facts: facts.first(
        "num_key_value_heads", "num_kv_heads", "num_attention_heads", default=0
    ),
    "attention.key_length": lambda facts: facts.first("global_head_dim", default=facts.head_dim),
    "attention.value_length": lambda facts: facts.first("global_head_dim", default=facts.head_dim),
    "attention.key_length_swa": lambda facts: facts.head_dim,
    "attention.value_length_swa": lambda facts: facts.head_dim,
    "attention.layer_norm_rms_epsilon": lambda facts: facts.first(*_EPSILONS),
    "attention.layer_norm_epsilon": lambda facts: facts.first(*_EPSILONS),
    "attention.scale": lambda facts: facts.attention_scale,
    "attention.sliding_window": lambda facts: facts.window,
    "attention.sliding_window_pattern": lambda facts: facts.slides,
    "attention.causal": lambda facts: True,
    "attention.clamp_kqv": lambda facts: facts.first("clip_qkv", default=0.0),
    "attention.max_alibi_bias": lambda facts: 8.0 if facts.architecture == "bloom" or facts.first("alibi") else 0.0,
    "attention.shared_kv_layers": lambda facts: facts.first("num_kv_shared_layers", default=0),
    "embedding_length_per_layer_input": lambda facts: facts.first("hidden_size_per_layer_input", default=0),
    "rope.freq_base": lambda facts: facts.rope.get("rope_theta"),
    "rope.freq_base_swa": lambda facts: facts.local_rope.get("rope_theta"),
    "rope.dimension_count": lambda facts: facts.rotary,
    "rope.dimension_sections": lambda facts: list(facts.rope.get("mrope_section") or ()),
    "rope.scaling.type": lambda facts: facts.rope.get("rope_type", "default"),
    "rope.scaling.factor": lambda facts: facts.rope.get("factor", 1.0),
    "rope.scale_linear": lambda facts: (
        facts.rope.get("factor", 1.0) if facts.rope.get("rope_type") == "linear" else 1.0
    ),
    "rope.scaling.alpha": lambda facts: facts.rope.get("alpha", 1.0),
    "rope.scaling.attn_factor": lambda facts: facts.rope.get("attention_factor") or 1.0,
    "rope.scaling.original_context_length": lambda facts: facts.rope.get("original_max_position_embeddings"),
    "rope.scaling.yarn_beta_fast": lambda facts: facts.rope.get("beta_fast"),
    "rope.scaling.yarn_beta_slow": lambda facts: facts.rope.get("beta_slow"),
    "attn_logit_softcapping": lambda facts: facts.first("attn_logit_softcapping", default=0.0),
    "final_logit_softcapping": lambda facts: facts.first("final_logit_softcapping", default=0.0),
    "router_logit_softcapping": lambda facts: 0.0,
    "logit_scale": lambda facts: facts.first("logit_scale", default=1.0),
    "embedding_scale": lambda facts: facts.first("embedding_multiplier", default=1.0),
    "residual_scale": lambda facts: facts.first("residual_multiplier", default=1.0),
    "use_parallel_residual": lambda facts: facts.first("use_parallel_residual", "parallel_attn", default=False),
    "pooling_type": lambda facts: 0,
    "expert_count": lambda facts: facts.first("num_experts", "num_local_experts", default=0),
    "expert_used_count": lambda facts: facts.first("num_experts_per_tok", default=0),
    "expert_feed_forward_length": lambda facts: facts.first("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": lambda facts: facts.first("shared_expert_intermediate_size", default=0),
    "expert_shared_count": lambda facts: facts.first(
        "n_shared_experts", default=1 if facts.first("shared_expert_intermediate_size") else 0
    ),
    "expert_group_count": lambda facts: facts.first("n_group", default=1),
    "expert_group_used_count": lambda facts: facts.first("topk_group", default=1),
    "expert_weights_scale": lambda facts: facts.first("routed_scaling_factor", default=1.0),
    "expert_weights_norm": lambda facts: facts.first("norm_topk_prob", default=True),
    "expert_gating_func": lambda facts: _GATING.get(facts.first("scoring_func", default="softmax")),
    # Blocks that predict further tokens; transformers leaves out those of the families whose layers it counts without.
    "nextn_predict_layers": lambda facts: facts.further if facts.architecture.startswith("qwen3_5") else 0,
    "leading_dense_block_count": lambda facts: facts.first("first_k_dense_replace", default=0),
    "full_attention_interval": lambda facts: facts.first("full_attention_interval"),
    "shortconv.l_cache": lambda facts: facts.first("conv_L_cache"),
    "ssm.conv_kernel": lambda facts: facts.first("linear_conv_kernel_dim", "conv_kernel"),
    "ssm.state_size": lambda facts: facts.first("linear_key_head_dim", "state_size"),
    "ssm.group_count": lambda facts: facts.first("linear_num_key_heads"),
    "ssm.time_step_rank": lambda facts: facts.first("linear_num_value_heads", "time_step_rank"),
    "ssm.inner_size": lambda facts: (
        facts.first("linear_num_value_heads") * facts.first("linear_value_head_dim")
        if facts.first("linear_num_value_heads")
        else facts.first("intermediate_size")
    ),
    "ssm.dt_b_c_rms": lambda facts: False,
}
