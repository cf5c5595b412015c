"""Float layers of vLLM on a CPU, the head above all, in one order of addition where the engine is deterministic.

vLLM computes them by oneDNN or by a kernel for small layers (vllm/model_executor/layers/utils.py in 0.32), which pick
their way by the number of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers import utils
from vllm.platforms import current_platform

from cloq_export.engines.vllm.plugin.deterministic import is_deterministic
from cloq_export.errors import UsageError
from cloq_export.kernels import cpu
from cloq_export.kernels.cpu.dense import dense_linear

_OF_VLLM = utils.dispatch_cpu_unquantized_gemm


def register() -> None:
    """Let float layers be computed by the native library, if the engine is to be deterministic.

    Raises:
        UsageError: there is no native library.
    """
    if not is_deterministic() or not current_platform.is_cpu():
        return
    if not cpu.available():
        raise UsageError(f"deterministic serving is for the native library on the CPU. {cpu.describe()} Leave it out.")
    utils.dispatch_cpu_unquantized_gemm = _dispatch


def _dispatch(layer: Any, remove_weight: bool) -> None:
    """Do as vLLM does where there is no matrix, and remember what computes the layer where there is one."""
    if layer.weight.is_meta or layer.weight.ndim != 2:
        _OF_VLLM(layer, remove_weight)
        return
    layer.cpu_linear = _compute


def _compute(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return dense_linear(x, weight, bias)
