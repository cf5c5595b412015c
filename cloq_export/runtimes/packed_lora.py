"""PEFT's LoRA layer over a packed linear: base and adapters in one call of the native CPU library."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import nn

from cloq_export.kernels.cpu import linear as cpu_linear
from cloq_export.runtimes.packed_linear import PackedLinear

# What PEFT calls the base in a list of adapters.
_BASE = "__base__"


class PackedLoraLinear(lora.Linear):
    """PEFT's LoRA layer, computed as `y = x Q^T + scaling (x A^T) B^T + bias` with one rounding where it only serves.

    With gradients, dropout, a variant of LoRA, or a base that the native library does not hold, PEFT computes.

    The pairs are brought into the library's layout once, in the narrowest dtype that holds them exactly, and again when
    a parameter has been changed in a way that torch counts; writing through `parameter.data` is not counted.
    """

    _kept: tuple[tuple[Any, ...], cpu_linear.CpuLora] | None = None
    _single: _Single | None = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the output of the layer.

        Args:
            x: (..., in) of any float dtype.
            args: as PEFT's layer takes them.
            kwargs: as PEFT's layer takes them; `adapter_names` holds an adapter for every row of a batch.

        Returns:
            torch.Tensor: (..., out), the dtype of x.
        """
        single = self._single
        if single is not None and not args and not kwargs and single.is_current(self, x):
            return cpu_linear.lora_linear(x, single.native, single.bias, single.packed)
        rows: list[str] | None = kwargs.get("adapter_names")
        names = list(dict.fromkeys(self.active_adapters if rows is None else rows))
        names = [name for name in names if name in self.lora_A]
        base = self.base_layer
        native = base.native if type(base) is PackedLinear else None
        if native is None or args or len(kwargs) > (rows is not None) or not self._only_served(x, names, rows):
            result: torch.Tensor = super().forward(x, *args, **kwargs)
            return result
        self._check_forward_args(x, **kwargs)
        packed = self._packed(names)
        if rows is None:
            self._single = None if torch.is_grad_enabled() else _Single(self, names[0], native, packed)
            return cpu_linear.lora_linear(x, native, base.bias, packed)
        slots = torch.tensor([names.index(row) if row in names else -1 for row in rows], dtype=torch.int32)
        index = slots.view(-1, *[1] * (x.ndim - 2)).expand(x.shape[:-1])
        return cpu_linear.lora_linear(x, native, base.bias, packed, index)

    def _only_served(self, x: torch.Tensor, names: list[str], rows: list[str] | None) -> bool:
        if not names or (rows is None and len(names) > 1) or self.disable_adapters or self.merged:
            return False
        if x.dtype == torch.float64 or torch.compiler.is_compiling():
            return False
        wants_grad, bias = torch.is_grad_enabled(), self.base_layer.bias
        if wants_grad and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return False
        for name in names:
            if name in self.lora_variant or self.lora_bias[name]:
                return False
            if self.training and not isinstance(self.lora_dropout[name], nn.Identity):
                return False
            for factor in (self.lora_A[name].weight, self.lora_B[name].weight):
                if (wants_grad and factor.requires_grad) or factor.is_inference() or factor.device.type != "cpu":
                    return False
        return True

    def _packed(self, names: list[str]) -> cpu_linear.CpuLora:
        """Return the pairs of these adapters in the library's layout, padded to the largest of their ranks."""
        pairs = [(self.lora_A[name].weight, self.lora_B[name].weight) for name in names]
        scaling = [self.scaling[name] for name in names]
        state = tuple((factor.data_ptr(), factor._version, factor.dtype) for pair in pairs for factor in pair)
        key = (*names, *scaling, *state)
        if self._kept is None or self._kept[0] != key:
            rank = max(a.shape[0] for a, _ in pairs)
            # No copy but the library's own stays: one adapter is the common case and needs no padding.
            lora_a = torch.stack([nn.functional.pad(a.detach(), (0, 0, 0, rank - a.shape[0])) for a, _ in pairs])
            lora_b = torch.stack([nn.functional.pad(b.detach(), (0, rank - b.shape[1])) for _, b in pairs])
            dtype = next(dtype for dtype in _NARROWEST_FIRST if _holds(dtype, lora_a) and _holds(dtype, lora_b))
            self._kept = key, cpu_linear.pack_lora(lora_a.to(dtype), lora_b.to(dtype), torch.tensor(scaling))
        return self._kept[1]

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLoraLinear:
        self._kept = self._single = None
        super()._apply(fn, recurse)
        return self


class _Single:
    """What one adapter for all rows was found to need; a token costs as much as finding that out.

    Args:
        layer: the layer.
        name: the adapter.
        native: the base.
        packed: the pair.
    """

    def __init__(
        self, layer: PackedLoraLinear, name: str, native: cpu_linear.CpuWeight, packed: cpu_linear.CpuLora
    ) -> None:
        self.name, self.native, self.packed = name, native, packed
        self.active, self.scaling, self.training = layer._active_adapter, layer.scaling[name], layer.training
        self.base, self.bias = layer.base_layer, layer.base_layer.bias
        self.modules = layer.lora_A[name], layer.lora_B[name]
        self.factors = tuple(module.weight for module in self.modules)
        self.state = tuple((factor.data_ptr(), factor._version) for factor in self.factors)

    def is_current(self, layer: PackedLoraLinear, x: torch.Tensor) -> bool:
        """Return whether the layer would find the same again. Goes past the slow attribute look-up of modules."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.dtype == torch.float64:
            return False
        if layer._disable_adapters or layer.merged_adapters or layer.training != self.training:
            return False
        modules = layer._modules
        if self.active != layer._active_adapter or modules["base_layer"] is not self.base:
            return False
        if self.base.native is not self.native or self.base._parameters["bias"] is not self.bias:
            return False
        if layer.scaling.get(self.name) != self.scaling:
            return False
        for kind, module, factor, state in zip(_KINDS, self.modules, self.factors, self.state, strict=True):
            if modules[kind]._modules.get(self.name) is not module or module._parameters["weight"] is not factor:
                return False
            if factor._version != state[1] or factor.data_ptr() != state[0]:
                return False
        return True


_KINDS = ("lora_A", "lora_B")
_NARROWEST_FIRST = (torch.float16, torch.bfloat16, torch.float32)


def _holds(dtype: torch.dtype, factor: torch.Tensor) -> bool:
    return bool((factor.to(dtype).to(torch.float32) == factor).all()) or dtype == torch.float32
