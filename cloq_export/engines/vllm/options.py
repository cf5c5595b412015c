"""What vLLM is told about a base of ours and its adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.empty_model import tie_entries
from cloq_export.artifact.quantization_description import CONFIG_NAME
from cloq_export.engines.vllm.plugin import adapters as adapter_rules
from cloq_export.errors import FormatError, UsageError
from cloq_export.formats.gptq import GptqLayout
from cloq_export.formats.peft.codec import read_adapter

DTYPES = ("float32", "float16", "bfloat16")
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """How an engine serves a base and its adapters.

    Args:
        dtype: of the activations, one of `DTYPES`.
        max_model_len: longest prompt with its answer; None takes the model's own length, or what the memory holds.
        max_lora_rank: rank that adapters may have; None takes the least value that the served ones need.
        max_loras: adapters in one batch; None takes all that are served.
        force: take adapters of another base.
        trust_adapters: take adapters that are bound to no base.
        cuda: the engine computes on an NVIDIA GPU, or does not; None where that is not known before it starts.
        more: further keyword arguments of vLLM's `LLM`, which win over those that are chosen here.
    """

    dtype: str = "float32"
    max_model_len: int | None = None
    max_lora_rank: int | None = None
    max_loras: int | None = None
    force: bool = False
    trust_adapters: bool = False
    cuda: bool | None = None
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def engine_options(
    checkpoint: Checkpoint, adapters: Mapping[str, Path], settings: EngineSettings, *, kv_cache_gib: int = 1
) -> dict[str, Any]:
    """Return vLLM's options for a base and its adapters, after checking each of them.

    Args:
        checkpoint: the base.
        adapters: name -> folder.
        settings: how they are served.
        kv_cache_gib: memory for keys and values.

    Returns:
        dict: keyword arguments of vLLM's `LLM`; as options of its server, underscores are dashes.

    Raises:
        UsageError: a dtype, a rank or a name is not allowed.
        BindingError: an adapter belongs to another base.
        FormatError: a file is damaged, an adapter does not fit the base, or experts are half quantized.
    """
    dtype, max_lora_rank = settings.dtype, settings.max_lora_rank
    if dtype not in DTYPES:
        raise UsageError(f"the dtype is {dtype!r:.40}; allowed are {', '.join(DTYPES)}.")
    if max_lora_rank is not None and max_lora_rank not in adapter_rules.RANKS:
        allowed = ", ".join(map(str, adapter_rules.RANKS))
        raise UsageError(f"the largest rank is {max_lora_rank}; vLLM takes {allowed}.")
    entries = tie_entries(checkpoint)
    if entries:
        raise FormatError(
            f"{checkpoint.folder / CONFIG_NAME} ties head and embeddings, and the files hold two that differ; vLLM "
            "goes by the config and would serve another model. Set tie_word_embeddings to false wherever it stands, "
            "or write the folder again with cloq export."
        )
    adapter_rules.refuse_half_quantized(checkpoint)
    options: dict[str, Any] = {
        "model": str(checkpoint.folder),
        "dtype": dtype,
        "max_model_len": settings.max_model_len or _context_length(checkpoint.config, dtype, kv_cache_gib),
    }
    if isinstance(checkpoint.grids.layout, GptqLayout) and dtype == "float32":
        # vLLM's own kernels for GPTQ's words have no float32.
        options["quantization"] = "cloq"
    targets = adapter_rules.quantized_suffixes(checkpoint)
    ranks = [1]
    for folder in adapters.values():
        adapter = adapter_rules.check_adapter(
            checkpoint,
            folder,
            max_rank=max_lora_rank,
            force=settings.force,
            trust_unbound=settings.trust_adapters,
        )
        if settings.cuda is False:
            adapter_rules.refuse_float_experts(checkpoint, folder, adapter.pairs)
        ranks += [pair.rank for pair in adapter.pairs.values()]
        targets |= {adapter_rules.target_name(module) for module in adapter.pairs}
    if adapters or max_lora_rank is not None or settings.max_loras is not None:
        options |= {
            "enable_lora": True,
            "max_lora_rank": max_lora_rank or adapter_rules.smallest_rank(ranks),
            "max_loras": settings.max_loras or max(1, len(adapters)),
            # Without this list vLLM adapts the head too, and 0.32 then crashes when asked for prompt log-probabilities.
            "lora_target_modules": sorted(targets),
        }
        options["max_cpu_loras"] = max(options["max_loras"], len(adapters))
    return options | dict(settings.more)


def float_options(
    model: str, config: Mapping[str, Any], adapters: Mapping[str, Path], settings: EngineSettings
) -> dict[str, Any]:
    """Return vLLM's options for a base that is not quantized, and any PEFT adapters.

    Args:
        model: a folder or hub id.
        config: of the model.
        adapters: name -> folder, at least one.
        settings: how they are served.

    Returns:
        dict: as `engine_options`.

    Raises:
        UsageError: a rank is not allowed.
        FormatError: an adapter is damaged.
    """
    pairs = [pair for folder in adapters.values() for pair in read_adapter(folder).pairs.items()]
    return {
        "model": model,
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len or _context_length(config, settings.dtype, 1),
        "enable_lora": True,
        "max_lora_rank": settings.max_lora_rank or adapter_rules.smallest_rank([pair.rank for _, pair in pairs]),
        "max_loras": settings.max_loras or len(adapters),
        "max_cpu_loras": len(adapters),
        # As above.
        "lora_target_modules": sorted({module.rpartition(".")[2] for module, _ in pairs}),
        **settings.more,
    }


def _context_length(config: Mapping[str, Any], dtype: str, kv_cache_gib: int) -> int:
    """Return the model's own length, or what the memory for keys and values holds."""
    sizes = {name: config.get(name) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")}
    longest = config.get("max_position_embeddings")
    longest = longest if isinstance(longest, int) and longest > 0 else 2048
    if not all(isinstance(size, int) and size > 0 for size in sizes.values()):
        return longest
    heads = config.get("num_key_value_heads") or sizes["num_attention_heads"]
    width = config.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]  # type: ignore[operator]
    per_token = 2 * sizes["num_hidden_layers"] * heads * width * _DTYPE_BYTES[dtype]  # type: ignore[operator]
    held = int(0.9 * kv_cache_gib * _GIB) // per_token
    # vLLM gives memory out in blocks of tokens.
    return min(longest, max(16, held // 128 * 128))
