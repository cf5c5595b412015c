"""A `torch.nn.Linear` that holds packed codes instead of a weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from cloq_export import kernels
from cloq_export.errors import NonFiniteError, ShapeError
from cloq_export.kernels.bitpack import pack_columns, pack_rows, unpack_columns, unpack_rows
from cloq_export.kernels.cpu import linear as cpu_linear
from cloq_export.kernels.cpu import weight as cpu_weight
from cloq_export.kernels.dispatch import native_takes_layer
from cloq_export.types import QuantizedLayer

# As the state dict names the parts of a layer.
_PARTS = ("qweight", "qzeros", "scales")
_WORD_BITS = 32


class PackedLinear(nn.Linear):
    """A frozen linear layer that computes from packed codes: `y = x Q^T + bias`, `Q = scales * (codes - zeros)`.

    It is a `torch.nn.Linear`, so that code that wraps linear layers (PEFT above all) accepts it as one, but it has no
    weight parameter: `weight` is made on demand and never kept. Gradients reach x and the bias; codes, scales and
    zeros are buffers. Casting the module changes the dtype that `weight` and `bias` have, never the scales, because
    float16 scales rounded to bfloat16 would be another base.

    The codes are held once, in the order of what computes: the native CPU library has a layout of its own, everything
    else reads GPTQ order. `qweight`, `qzeros`, `scales` and the state dict are in GPTQ order everywhere.

    GPTQ order is made of whole words. A layer whose sides do not fill them (other layouts hold any width) is padded
    there with weights of zero: they meet inputs of zero, and their outputs are dropped.

    Args:
        qweight: (in * bits / 32, out) int32, GPTQ order.
        qzeros: (groups, out * bits / 32) int32, zeros stored as they are (`gptq_v2`).
        scales: (groups, out) float16.
        bits: width of a code.
        features: (out, in) of a layer that is padded; None takes the words as they are.
        dtype: of the weight as others see it, and of the bias.

    Raises:
        ShapeError: the tensors do not belong together.
        NonFiniteError: a scale is NaN, Inf, zero or negative.
    """

    packed_codes: torch.Tensor
    packed_zeros: torch.Tensor
    packed_scales: torch.Tensor
    native: cpu_weight.CpuWeight | None
    deterministic = False

    def __init__(
        self,
        qweight: torch.Tensor,
        qzeros: torch.Tensor,
        scales: torch.Tensor,
        *,
        bits: int,
        features: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own constructor would make the dense weight
        self.bits = bits
        self.compute_dtype = dtype
        self._features = features
        self._hold(qweight, qzeros, scales)
        # Whoever places the layer gives it the bias of the linear that it replaces.
        self.register_parameter("bias", None)

    @classmethod
    def of_layer(cls, layer: QuantizedLayer, *, dtype: torch.dtype = torch.float32) -> PackedLinear:
        """Return the packed linear of a layer of any width, without a bias.

        Args:
            layer: codes, scales and zeros.
            dtype: as in the class.
        """
        bits, features = layer.spec.bits, (layer.out_features, layer.in_features)
        codes, scales, zeros = _padded(layer.codes, layer.scales, layer.zeros, bits)
        return cls(
            pack_columns(codes, bits),
            pack_rows(zeros.t().contiguous(), bits),
            scales.t().contiguous(),
            bits=bits,
            features=None if codes.shape == features else features,
            dtype=dtype,
        )

    def _hold(self, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> None:
        """Check a layer in GPTQ order, and hold it in the order that its device computes from."""
        try:
            in_features = kernels.check_packed(qweight, qzeros, scales, self.bits)
        except ValueError as error:
            raise ShapeError(str(error)) from None
        if not bool((torch.isfinite(scales) & (scales > 0)).all()):
            raise NonFiniteError("a scale is NaN, Inf, zero or negative; every scale must be a positive number.")
        groups, out_features = scales.shape
        self.out_features, self.in_features = self._features or (out_features, in_features)
        # The one group of a channel is padded within; others are followed by groups of padding alone.
        self.groups = groups if groups == 1 else self.in_features * groups // in_features
        self._padding = (out_features - self.out_features, in_features - self.in_features)
        if not native_takes_layer(scales, qweight, qzeros):
            self._register(qweight, qzeros, scales, None)
            return
        zeros, codes, scales = unpack_rows(qzeros, self.bits).t(), unpack_columns(qweight, self.bits), scales.t()
        if any(self._padding):
            codes = codes[: self.out_features, : self.in_features]
            zeros, scales = (part[: self.out_features, : self.groups] for part in (zeros, scales))
        native = cpu_weight.pack_weight(
            *(codes.contiguous(), scales.contiguous(), zeros.contiguous(), self.bits), deterministic=self.deterministic
        )
        self._register(native.words, native.zeros, native.scales, native)

    def _register(
        self, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, native: cpu_weight.CpuWeight | None
    ) -> None:
        # Not persistent: the state dict is in GPTQ order.
        self.register_buffer("packed_codes", codes, persistent=False)
        self.register_buffer("packed_zeros", zeros, persistent=False)
        self.register_buffer("packed_scales", scales, persistent=False)
        self.native = native

    def make_deterministic(self) -> None:
        """Give a token the same bits whatever else is in its batch, where the native library computes."""
        self.deterministic = True
        if self.native is not None:
            self.native = dataclasses.replace(self.native, deterministic=True)

    def in_gptq_order(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return qweight, qzeros and scales, converted if they are held in the native library's layout."""
        if self.native is None:
            return self.packed_codes, self.packed_zeros, self.packed_scales
        codes, scales, zeros = cpu_weight.unpack_weight(self.native)
        if any(self._padding):
            codes, scales, zeros = _padded(codes, scales, zeros, self.bits)
        return pack_columns(codes, self.bits), pack_rows(zeros.t().contiguous(), self.bits), scales.t().contiguous()

    @property
    def qweight(self) -> torch.Tensor:
        """Return the codes, (in * bits / 32, out) int32, padded where the layer is."""
        return self.in_gptq_order()[0]

    @property
    def qzeros(self) -> torch.Tensor:
        """Return the zeros, stored as they are, (groups, out * bits / 32) int32."""
        return self.in_gptq_order()[1]

    @property
    def scales(self) -> torch.Tensor:
        """Return the scales, (groups, out) float16."""
        return self.in_gptq_order()[2]

    @property
    def weight(self) -> PackedWeight:  # type: ignore[override]
        """Return Q, (out, in): shape, dtype and device at once, the numbers when something computes with it."""
        return PackedWeight(self)

    @property
    def group_size(self) -> int:
        """Return the input channels that share a scale."""
        return self.in_features // self.groups

    def dequantize(self) -> torch.Tensor:
        """Return Q, (out, in) float32, newly computed."""
        if self.native is not None:
            return cpu_weight.dequantize(self.native)
        weight = kernels.dequantize(self.packed_codes, self.packed_zeros, self.packed_scales, self.bits)
        return weight[: self.out_features, : self.in_features] if any(self._padding) else weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return `x Q^T + bias`, summed in float32 and rounded once.

        On the CPU, many bfloat16 tokens meet weights rounded to bfloat16, as in any bfloat16 layer.

        Args:
            input: x, (..., in) of any float dtype.

        Returns:
            Tensor: (..., out), the dtype of x.
        """
        if self.native is None:
            bias: torch.Tensor | None = self.bias
            if any(self._padding):
                input = nn.functional.pad(input, (0, self._padding[1]))
                bias = None if bias is None else nn.functional.pad(bias, (0, self._padding[0]))
            y = kernels.packed_linear(input, self.packed_codes, self.packed_zeros, self.packed_scales, self.bits, bias)
            return y[..., : self.out_features] if self._padding[0] else y
        x = input.to(torch.float32) if input.dtype == torch.float64 else input
        if torch.compiler.is_compiling():
            # The buffers by name: a traced program must find them in the module.
            layer = [self.packed_codes, self.packed_scales, self.packed_zeros]
            sizes = [self.bits, self.out_features, self.in_features, int(self.deterministic)]
            y = cpu_linear.cpu_linear_op(x, layer, sizes, self.bias, [], False)
        else:
            y = cpu_linear.linear(x, self.native, self.bias)
        return y.to(input.dtype)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        before = self.packed_codes.device
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=before))
        if probe.device != before:
            self._register(*self.in_gptq_order(), None)
        scales = self.packed_scales
        super()._apply(fn, recurse)
        self.compute_dtype = probe.dtype
        if self.packed_scales.dtype != scales.dtype:
            self.packed_scales = scales.to(probe.device)
        if self.native is not None:
            self.native = dataclasses.replace(
                self.native, words=self.packed_codes, scales=self.packed_scales, zeros=self.packed_zeros
            )
        elif probe.device.type == "cpu" and before.type not in ("cpu", "meta"):  # from "meta" come no numbers
            self._hold(self.packed_codes, self.packed_zeros, self.packed_scales)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + part: tensor for part, tensor in zip(_PARTS, self.in_gptq_order(), strict=True)})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = [prefix + part for part in _PARTS]
        held = {name: state_dict[name] for name in names if name in state_dict}
        super()._load_from_state_dict(
            {name: value for name, value in state_dict.items() if name not in held},
            *(prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs),
        )
        missing_keys.extend(name for name in names if name not in held)
        if len(held) < len(names):
            return
        qweight, qzeros, scales = (held[name].to(self.packed_codes.device, copy=True) for name in names)
        more_outputs, more_inputs = self._padding
        size = (self.in_features + more_inputs, self.out_features + more_outputs)
        groups = self.groups if self.groups == 1 else size[0] // self.group_size
        try:
            found_size = (kernels.check_packed(qweight, qzeros, scales, self.bits), scales.shape[1])
            if (found_size, scales.shape[0]) != (size, groups):
                raise ShapeError(
                    f"a layer with (in, out, groups) = {(*size, groups)} cannot hold {tuple(qweight.shape)} words."
                )
            self._hold(qweight, qzeros, scales)
        except (ValueError, ShapeError, NonFiniteError) as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")


def _padded(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes (out, in), scales and zeros (out, groups) with sides that fill whole words, by weights of zero."""
    step = _WORD_BITS // math.gcd(_WORD_BITS, bits)
    out_features, in_features = codes.shape
    groups = scales.shape[1]
    outputs, inputs = -out_features % step, -in_features % step
    if not outputs and not inputs:
        return codes, scales, zeros
    span = in_features // groups
    if groups > 1:
        while inputs % span:
            inputs += step
    # A code that equals its zero is a weight of zero.
    filling = zeros[:, -1:].expand(-1, inputs) if groups == 1 else codes.new_zeros(out_features, inputs)
    codes = nn.functional.pad(torch.cat([codes, filling], dim=1), (0, 0, 0, outputs))
    more = (0, inputs // span if groups > 1 else 0, 0, outputs)
    return codes, nn.functional.pad(scales, more, value=1.0), nn.functional.pad(zeros, more)


class PackedWeight(torch.Tensor):
    """The weight of a packed layer as other libraries see it: computed when it is used, and read-only.

    Libraries ask a weight for its dtype or device far more often than for its numbers, and some write into it (LoRA
    merging): the first must not cost a dequantization, the second must not be lost without a word.
    """

    _layer: PackedLinear

    @staticmethod
    def __new__(cls, layer: PackedLinear) -> PackedWeight:
        """Return a weight without storage."""
        weight = torch.Tensor._make_wrapper_subclass(
            cls, (layer.out_features, layer.in_features), dtype=layer.compute_dtype, device=layer.packed_codes.device
        )
        weight._layer = layer
        return weight

    def __init__(self, layer: PackedLinear) -> None:
        """Take the argument of `__new__`."""

    def __repr__(self) -> str:  # type: ignore[override]
        """Return the shape, without computing anything."""
        return f"PackedWeight({tuple(self.shape)}, dtype={self.dtype}, bits={self._layer.bits})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Refuse `weight.data = ...`, which torch would carry out on a temporary tensor."""
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            raise ShapeError(_READ_ONLY)
        with torch._C.DisableTorchFunctionSubclass():  # results are plain tensors, not packed weights
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute with the dequantized weight; refuse what would write into it."""
        if func is torch.ops.aten.detach.default:
            return cls(args[0]._layer)
        named = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else named.get(argument.name)
            if isinstance(value, cls) and argument.alias_info is not None and argument.alias_info.is_write:
                raise ShapeError(_READ_ONLY)
        return func(*tree_map(_numbers, args), **tree_map(_numbers, named))


_READ_ONLY = (
    "the weight of a packed layer cannot be changed or merged into: it is computed from codes; use "
    "cloq_export.dequantized_model(path, adapter) for a dense model with the adapter merged."
)


def _numbers(value: Any) -> Any:
    if isinstance(value, PackedWeight):
        return value._layer.dequantize().to(value.dtype)
    return value
