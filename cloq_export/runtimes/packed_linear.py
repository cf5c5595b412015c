"""A `torch.nn.Linear` that holds packed codes instead of a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from cloq_export import kernels
from cloq_export.errors import NonFiniteError, ShapeError


class PackedLinear(nn.Linear):
    """A frozen linear layer that computes from packed codes: `y = x Q^T + bias`, `Q = scales * (codes - zeros)`.

    It is a `torch.nn.Linear`, so that whatever wraps linear layers (PEFT above all) takes it for one, but it has no
    weight parameter: `weight` is made on demand and never kept. Gradients reach x and the bias; codes, scales and
    zeros are buffers. Casting the module changes the dtype that `weight` and `bias` have, never the scales, because
    float16 scales rounded to bfloat16 would be another base.

    Args:
        qweight: (in * bits / 32, out) int32, GPTQ order.
        qzeros: (groups, out * bits / 32) int32, zeros stored as they are (`gptq_v2`).
        scales: (groups, out) float16.
        bits: width of a code.
        bias: (out), or None.
        dtype: of the weight as others see it, and of the bias.

    Raises:
        ShapeError: the tensors do not belong together.
        NonFiniteError: a scale is NaN, Inf, zero or negative.
    """

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor

    def __init__(
        self,
        qweight: torch.Tensor,
        qzeros: torch.Tensor,
        scales: torch.Tensor,
        *,
        bits: int,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own constructor would make the dense weight
        try:
            self.in_features = kernels.check_packed(qweight, qzeros, scales, bits)
        except ValueError as error:
            raise ShapeError(str(error)) from None
        if not bool((torch.isfinite(scales) & (scales > 0)).all()):
            raise NonFiniteError("a scale is NaN, Inf, zero or negative; every scale must be a positive number.")
        self.out_features = scales.shape[1]
        self.bits = bits
        self.compute_dtype = dtype
        self.register_buffer("qweight", qweight)
        self.register_buffer("qzeros", qzeros)
        self.register_buffer("scales", scales)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.to(dtype)))

    @property
    def weight(self) -> PackedWeight:  # type: ignore[override]
        """Return Q, (out, in): shape, dtype and device at once, the numbers when something computes with it."""
        return PackedWeight(self)

    @property
    def group_size(self) -> int:
        """Return the input channels that share a scale."""
        return self.in_features // self.scales.shape[0]

    def dequantize(self) -> torch.Tensor:
        """Return Q, (out, in) float32, newly computed."""
        return kernels.dequantize(self.qweight, self.qzeros, self.scales, self.bits)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return `x Q^T + bias`, computed in float32 and rounded once.

        Args:
            input: x, (..., in) of any float dtype.

        Returns:
            Tensor: (..., out), the dtype of x.
        """
        return kernels.packed_linear(input, self.qweight, self.qzeros, self.scales, self.bits, self.bias)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=scales.device)).dtype
        return self


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
            cls, (layer.out_features, layer.in_features), dtype=layer.compute_dtype, device=layer.qweight.device
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
        """Refuse `weight.data = ...`, which torch would carry out on a tensor that nobody keeps."""
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
