"""The vLLM plugin: with this package installed beside vLLM, vLLM reads what this package writes.

vLLM calls `register` in every one of its processes (entry point `vllm.general_plugins`). It adds

- a quantization config that claims the GPTQ checkpoints which vLLM itself refuses (`quantization`, `linear`), quantized
  experts among them on the CPU (`experts`, `expert_parts`, `mixture`);
- on the CPU, a kernel for the compressed-tensors grids which vLLM has none for (`cpu_kernel`), and their
  experts (`compressed_experts`);
- on the CPU, float layers in one order of addition, where the engine is deterministic (`float_layers`);
- on the CPU, adapters that are computed in one call with the layers of the native library (`fused_lora`);
- on the CPU, adapters of single experts (`expert_lora`);
- on the CPU, low-rank products that leave requests without an adapter alone for every other layer, and prompt
  log-probabilities with adapters (`punica`);
- a check of every adapter that is loaded onto a base of ours (`guard`), and its modules under the names of the files
  (`adapter_names`);
- a refusal of requests without an adapter to a base that needs one (`needed_adapter`);
- in a server of `cloq serve`, an API key before every path (`api_key`), and answers to the program that started it
  before its port opens (`before_opening`);
- an answer to which weights of its adapters it holds (`held_adapters`);
- keys of known prompts that tell the loads of one name apart (`prefix_cache`);
- adapters over a model whose head has codes (`quantized_head`).

vLLM is imported by the functions, not by the modules `adapters` and this one, so that they can be read without it.
"""

from __future__ import annotations

import os

SUPPORTED_VERSIONS = ("0.32", "0.33")
"""Versions of vLLM whose sources the plugin was written against; any other is left untouched."""

# Set once a process has said that the version is unsupported, so that its children do not say it again.
_TOLD = "CLOQ_EXPORT_VLLM_TOLD"

_registered = False


def is_supported(version: str) -> bool:
    """Return whether the plugin knows a version of vLLM, by its first two numbers."""
    return ".".join(version.split(".")[:2]) in SUPPORTED_VERSIONS


def register() -> None:
    """Add to vLLM what it lacks; a second call in one process changes nothing.

    A version that is not supported gets one log line and is left as it is.

    Raises:
        EngineError: a supported version lacks a piece that the plugin builds on.
    """
    global _registered
    if _registered:
        return
    _registered = True
    from vllm.logger import init_logger
    from vllm.version import __version__ as version

    if not is_supported(version):
        if os.environ.get(_TOLD) != version:
            os.environ[_TOLD] = version
            # A child of vLLM's own logger, because vLLM shows no other.
            init_logger("vllm.plugins.cloq_export").warning(
                "cloq-export knows vLLM %s and leaves %s untouched: its 2/3-bit and asymmetric checkpoints will not "
                "load; install one of these versions, or update cloq-export.",
                " and ".join(SUPPORTED_VERSIONS),
                version,
            )
        return
    from cloq_export.engines.vllm.plugin.pieces import PIECES, require_pieces

    require_pieces(PIECES)
    from cloq_export.engines.vllm.plugin import (
        adapter_names,
        compressed_experts,
        cpu_kernel,
        expert_lora,
        float_layers,
        fused_lora,
        guard,
        held_adapters,
        needed_adapter,
        prefix_cache,
        punica,
        quantization,
        quantized_head,
    )

    quantization.register()
    cpu_kernel.register()
    compressed_experts.register()
    float_layers.register()
    punica.register()
    fused_lora.register()
    expert_lora.register()
    adapter_names.register()
    guard.register()
    needed_adapter.register()
    held_adapters.register()
    prefix_cache.register()
    quantized_head.register()
