"""PEFT's LoRA layer over a packed linear: base and adapters in one call of the native CPU library, or of a GPU's."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from peft.tuners import lora
from torch import nn

from cloq_export import kernels
from cloq_export.engines.packed_linear import PackedLinear
from cloq_export.kernels.cpu import linear as cpu_linear
from cloq_export.kernels.cpu import lora as cpu_lora
from cloq_export.kernels.cpu import weight as cpu_weight
from cloq_export.kernels.dispatch import MOST_TOKENS, triton_takes_layer

# What PEFT calls the base in a list of adapters.
_BASE = "__base__"


class PackedLoraLinear(lora.Linear):
    """PEFT's LoRA layer, computed as `y = x Q^T + scaling (x A^T) B^T + bias` with one rounding where it only serves.

    With gradients, dropout, a variant of LoRA, or a base that the native library does not hold, PEFT computes. On a GPU
    few tokens, those of decoding, take one call too, with an adapter for every row; PEFT would take six or more for
    each adapter. It computes many tokens there, and pairs that are trained.

    The pairs are brought into the library's layout once, in the narrowest dtype that holds them exactly, and again when
    a parameter has been changed. Of frozen ones that is what torch counts, and writing through `parameter.data` is not
    counted; trained ones are compared number by number, because fused optimizers do not update the count either.
    """

    _kept: tuple[tuple[Any, ...], cpu_lora.CpuLora, list[torch.Tensor]] | None = None
    _served: _Served | None = None
    _kept_there: tuple[tuple[Any, ...], kernels.Adapters] | None = None
    _index_there: tuple[tuple[Any, ...], torch.Tensor] | None = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the output of the layer.

        Args:
            x: (..., in) of any float dtype.
            args: as PEFT's layer takes them.
            kwargs: as PEFT's layer takes them; `adapter_names` holds an adapter for every row of a batch.

        Returns:
            torch.Tensor: (..., out), the dtype of x.
        """
        rows: list[str] | None = kwargs.get("adapter_names")
        served = self._served
        if served is not None and not args and len(kwargs) == (rows is not None) and served.is_current(self, x, rows):
            return cpu_linear.lora_linear(x, served.native, served.bias, served.packed, served.index(x))
        names = list(dict.fromkeys(self.active_adapters if rows is None else rows))
        names = [name for name in names if name in self.lora_A]
        base = self.base_layer
        native = base.native if type(base) is PackedLinear else None
        there = native is None and type(base) is PackedLinear and self._few_on_gpu(x)
        served_here = native is not None or there
        if not served_here or args or len(kwargs) > (rows is not None) or not self._only_served(x, names, rows):
            result: torch.Tensor = super().forward(x, *args, **kwargs)
            return result
        if native is None:
            self._check_forward_args(x, **kwargs)
            layer = [base.packed_codes, base.packed_zeros, base.packed_scales]
            return kernels.packed_lora_linear(x, layer, base.bits, base.bias, self._pairs_there(x, names, rows))
        self._check_forward_args(x, **kwargs)
        served = _Served(self, names, rows, native, self._packed(names))
        self._served = None if torch.is_grad_enabled() or self._trained(names) else served
        return cpu_linear.lora_linear(x, native, base.bias, served.packed, served.index(x))

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
                if (wants_grad and factor.requires_grad) or factor.is_inference() or factor.device != x.device:
                    return False
                if factor.requires_grad and factor.device.type != "cpu":
                    # Whether it has been changed would have to be asked for every batch, and the host would wait.
                    return False
        return True

    def _few_on_gpu(self, x: torch.Tensor) -> bool:
        """Return whether a GPU computes base and adapters of these tokens in one call."""
        base = self.base_layer
        layer = (base.packed_codes, base.packed_zeros, base.packed_scales)
        few = 0 < x.numel() <= MOST_TOKENS * base.in_features
        if not few or any(base._padding) or x.dtype not in _NARROWEST_FIRST:
            return False
        return triton_takes_layer(base.bits, base.in_features, base.groups, x, base.bias, *layer)

    def _pairs_there(self, x: torch.Tensor, names: list[str], rows: list[str] | None) -> kernels.Adapters:
        """Return the pairs of these adapters as a GPU's kernel takes them, with the adapter of every token."""
        pairs = [(self.lora_A[name].weight.detach(), self.lora_B[name].weight.detach()) for name in names]
        factors = [factor for pair in pairs for factor in pair]
        scaling = [self.scaling[name] for name in names]
        key = (*names, *scaling, *((factor.data_ptr(), factor._version, factor.dtype) for factor in factors))
        if self._kept_there is None or self._kept_there[0] != key:
            rank, (out_features, in_features) = max(a.shape[0] for a, _ in pairs), self.base_layer.weight.shape
            dtype = next(dtype for dtype in _NARROWEST_FIRST if all(_holds(dtype, factor) for factor in factors))
            a = torch.zeros(len(pairs), rank, in_features, dtype=dtype, device=x.device)
            b = torch.zeros(len(pairs), out_features, rank, dtype=dtype, device=x.device)
            for number, (first, second) in enumerate(pairs):
                a[number, : len(first)] = first
                b[number, :, : len(first)] = second
            of_each = torch.tensor(scaling, dtype=torch.float32, device=x.device)
            self._kept_there = key, kernels.Adapters(a, b, of_each)
        if rows is None:
            return self._kept_there[1]
        tokens = (tuple(names.index(row) if row in names else -1 for row in rows), x.shape[:-1], x.device)
        if self._index_there is None or self._index_there[0] != tokens:
            self._index_there = tokens, _index_of(*tokens[:2]).to(x.device)
        return dataclasses.replace(self._kept_there[1], index=self._index_there[1])

    def _packed(self, names: list[str]) -> cpu_lora.CpuLora:
        """Return the pairs of these adapters in the library's layout, with room for the largest of their ranks."""
        pairs = [(self.lora_A[name].weight.detach(), self.lora_B[name].weight.detach()) for name in names]
        scaling = [self.scaling[name] for name in names]
        state = tuple((factor.data_ptr(), factor._version, factor.dtype) for pair in pairs for factor in pair)
        trained = self._trained(names)
        key = (*names, *scaling, *state, len(trained))
        if self._kept is None or self._kept[0] != key or not all(map(torch.equal, trained, self._kept[2])):
            rank, (out_features, in_features) = max(a.shape[0] for a, _ in pairs), self.base_layer.weight.shape
            factors = [factor for pair in pairs for factor in pair]
            dtype = next(dtype for dtype in _NARROWEST_FIRST if all(_holds(dtype, factor) for factor in factors))
            packed = cpu_lora.allocate_lora(len(pairs), rank, in_features, (out_features,), dtype)
            for index, (a, b) in enumerate(pairs):
                cpu_lora.place_adapter(packed, index, [(a.to(dtype), b.to(dtype))], scaling[index])
            self._kept = key, packed, [factor.clone() for factor in trained]
        return self._kept[1]

    def _trained(self, names: list[str]) -> list[torch.Tensor]:
        """Return the factors of these adapters that an optimizer may change."""
        factors = (pairs[name].weight for name in names for pairs in (self.lora_A, self.lora_B))
        return [factor.detach() for factor in factors if factor.requires_grad]

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLoraLinear:
        self._kept = self._served = self._kept_there = self._index_there = None
        super()._apply(fn, recurse)
        return self


class _Served:
    """What one adapter for all rows, or one for each, was found to need; finding it costs as much as computing a token.

    Args:
        layer: the layer.
        names: the adapters.
        rows: an adapter for every row of the batch, or None if the one is for all.
        native: the base.
        packed: the pairs.
    """

    def __init__(
        self,
        layer: PackedLoraLinear,
        names: list[str],
        rows: list[str] | None,
        native: cpu_weight.CpuWeight,
        packed: cpu_lora.CpuLora,
    ) -> None:
        self.names, self.native, self.packed = names, native, packed
        self.rows = None if rows is None else list(rows)
        self.slots = None if rows is None else tuple(names.index(row) if row in names else -1 for row in rows)
        self.active, self.training = layer._active_adapter, layer.training
        self.scaling = dict(layer.scaling)
        self.base, self.bias = layer.base_layer, layer.base_layer.bias
        self.pairs = layer.lora_A, layer.lora_B
        # Of every factor: who keeps it under which name, and the state that it was in.
        self.factors = []
        for pairs in self.pairs:
            for name in names:
                module = pairs[name]
                weight = module.weight
                state = (weight._version, weight.data_ptr())
                self.factors.append((pairs._modules, name, module, module._parameters, weight, *state))

    def index(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return the adapter of every token, or None for the first adapter."""
        return None if self.slots is None else _index_of(self.slots, x.shape[:-1])

    def is_current(self, layer: PackedLoraLinear, x: torch.Tensor, rows: list[str] | None) -> bool:
        """Return whether the layer would find the same again. Goes past the slow attribute look-up of modules."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.dtype == torch.float64:
            return False
        if rows != self.rows or (rows is not None and len(rows) != x.shape[0]):
            return False
        if layer._disable_adapters or layer.merged_adapters or layer.training != self.training:
            return False
        modules = layer._modules
        if self.active != layer._active_adapter or modules["base_layer"] is not self.base:
            return False
        if modules["lora_A"] is not self.pairs[0] or modules["lora_B"] is not self.pairs[1]:
            return False
        if self.base.native is not self.native or self.base._parameters["bias"] is not self.bias:
            return False
        if layer.scaling != self.scaling:
            return False
        for held, name, module, parameters, weight, version, place in self.factors:
            if held.get(name) is not module or parameters["weight"] is not weight:
                return False
            if weight._version != version or weight.data_ptr() != place:
                return False
        return True


@functools.lru_cache(maxsize=64)
def _index_of(slots: tuple[int, ...], shape: torch.Size) -> torch.Tensor:
    """Return the adapter of every token, int32 of this shape, from that of every row: one tensor for all layers."""
    rows = torch.tensor(slots, dtype=torch.int32).view(-1, *[1] * (len(shape) - 1))
    return rows.expand(shape).contiguous()


_NARROWEST_FIRST = (torch.float16, torch.bfloat16, torch.float32)


def _holds(dtype: torch.dtype, factor: torch.Tensor) -> bool:
    return bool((factor.to(dtype).to(torch.float32) == factor).all()) or dtype == torch.float32
