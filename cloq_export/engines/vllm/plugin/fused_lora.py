"""LoRA over layers that the native CPU library computes: base and adapters in one call, an adapter for every token.

vLLM computes such a layer in steps: the base, then for every slice (q, k and v; gate and up) the products with A and B.
Here the library does all of them at once, with float32 sums that are rounded once. Layers that it does not compute, and
adapters whose rank is cut between ranks of a tensor-parallel engine, keep vLLM's steps with the products of `punica`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from vllm.lora import layers, model_manager
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.platforms import current_platform

from cloq_export.engines.vllm.plugin.expert_lora import ExpertsWithLoRA
from cloq_export.engines.vllm.plugin.linear import native_weight
from cloq_export.kernels.cpu import linear as cpu_linear
from cloq_export.kernels.cpu import lora as cpu_lora
from cloq_export.kernels.cpu import weight as cpu_weight

_KINDS = (
    layers.ColumnParallelLinearWithLoRA,
    layers.MergedColumnParallelLinearVariableSliceWithLoRA,
    layers.MergedColumnParallelLinearWithLoRA,
    layers.MergedQKVParallelLinearWithLoRA,
    layers.QKVParallelLinearWithLoRA,
    layers.ReplicatedLinearWithLoRA,
    layers.RowParallelLinearWithLoRA,
)
# Exactly these: a subclass may compute something else than its quantization method does.
_BASES = (ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, ReplicatedLinear, RowParallelLinear)


def register() -> None:
    """Let vLLM make fused layers where it can, on the CPU."""
    if not current_platform.is_cpu() or hasattr(model_manager.from_layer, "of_cloq_export"):
        return
    stock_make, stock_update = model_manager.from_layer, PunicaWrapperCPU.update_metadata

    @functools.wraps(stock_make)
    def from_layer(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(layer, MoERunner):
            experts = ExpertsWithLoRA(layer)
            experts.create_lora_weights(*_settings(*args, **kwargs))
            return experts
        made = stock_make(layer, *args, **kwargs)
        fuse(made)
        return made

    def update_metadata(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_update(self, *args, **kwargs)
        adapters = self.token_lora_indices.to(torch.int32)
        # One tensor for all layers, and none where no token has an adapter.
        self.adapter_of_tokens = adapters if bool((adapters >= 0).any()) else None

    from_layer.of_cloq_export = True  # type: ignore[attr-defined]
    model_manager.from_layer = from_layer
    PunicaWrapperCPU.adapter_of_tokens = None  # until the first batch
    PunicaWrapperCPU.update_metadata = update_metadata


def _settings(max_loras: int, lora_config: Any, packed_modules_list: Any = None, model_config: Any = None) -> Any:
    """Return what a layer makes room by, of the arguments of vLLM's `from_layer`."""
    return max_loras, lora_config, model_config


def fuse(layer: Any) -> bool:
    """Make a LoRA layer of vLLM compute with the native library from now on, if it can.

    Args:
        layer: as vLLM made it, with no adapter yet.

    Returns:
        bool: whether it does.
    """
    if type(layer) not in _KINDS or type(layer.base_layer) not in _BASES:
        return False
    weight = native_weight(layer.base_layer)
    if weight is None:
        return False
    outputs = [stacked.shape[2] for stacked in layer.lora_b_stacked]
    if not cpu_lora.can_slice(outputs) or sum(outputs) != weight.out_features:
        return False
    slots, _, rank, in_features = layer.lora_a_stacked[0].shape
    layer.adapters = cpu_lora.allocate_lora(slots, rank, in_features, outputs, layer.lora_a_stacked[0].dtype)
    layer.native = weight
    # Where vLLM writes an adapter, cut to this rank's share, before it goes to its slot in the library's layout. Such
    # room is shared by the layers of a shape.
    for name in ("lora_a_stacked", "lora_b_stacked"):
        stacked = getattr(layer, name)
        setattr(layer, name, tuple(_room(index, tensor.shape, tensor.dtype) for index, tensor in enumerate(stacked)))
    kind: Any = type(layer)
    layer.__class__ = _fused_kind(kind)
    return True


@functools.cache
def _room(index: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of this shape whose slots all lie in the same memory; every slice has its own."""
    return torch.zeros(1, *shape[1:], dtype=dtype).expand(shape)


@functools.cache
def _fused_kind(kind: Any) -> type:
    return type(f"Fused{kind.__name__}", (FusedLora, kind), {})


class FusedLora:
    """What a LoRA layer of vLLM does otherwise where the library computes it; `fuse` puts it before the layer's class.

    Attributes:
        native: the base.
        adapters: a slot for each that can be active.
    """

    native: cpu_weight.CpuWeight
    adapters: cpu_lora.CpuLora
    lora_a_stacked: tuple[torch.Tensor, ...]
    lora_b_stacked: tuple[torch.Tensor, ...]
    punica_wrapper: Any

    def reset_lora(self, index: int) -> None:
        """Take the adapter out of a slot."""
        super().reset_lora(index)  # type: ignore[misc]
        self.adapters.ranks[index] = 0

    def set_lora(self, index: int, *args: Any, **kwargs: Any) -> None:
        """Put an adapter into a slot."""
        super().set_lora(index, *args, **kwargs)  # type: ignore[misc]
        pairs = zip(self.lora_a_stacked, self.lora_b_stacked, strict=True)
        cpu_lora.place_adapter(self.adapters, index, [(a[index, 0], b[index, 0]) for a, b in pairs])

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return `x Q^T + bias` and every token's own `(x A^T) B^T`; vLLM has the scaling in B.

        Args:
            x: (..., in), one token after the other.
            bias: (out), or None.

        Returns:
            torch.Tensor: (..., out), the dtype of x.
        """
        index = self.punica_wrapper.adapter_of_tokens
        if index is None:
            return cpu_linear.linear(x, self.native, bias)
        tokens = x.numel() // x.shape[-1]
        if len(index) < tokens:  # rows that only fill up a batch have no adapter
            index = torch.nn.functional.pad(index, (0, tokens - len(index)), value=-1)
        return cpu_linear.lora_linear(x, self.native, bias, self.adapters, index[:tokens].view(x.shape[:-1]))
