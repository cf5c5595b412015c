"""A packed linear with low-rank adapters, one of them for every token: `y = x Q^T + bias + s_i (x A_i^T) B_i^T`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from cloq_export.kernels.reference.linear import packed_linear_input_grad_op, packed_linear_op


@dataclasses.dataclass(frozen=True)
class Adapters:
    """LoRA pairs over one layer.

    Args:
        a: (adapters, rank, in) float.
        b: (adapters, out, rank) float.
        scaling: (adapters) float32, alpha / rank of each.
        index: one adapter per token, int32 of the leading shape of x; what names no adapter (-1) means none. None means
            adapter 0 for all.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: torch.Tensor
    index: torch.Tensor | None = None

    def operands(self) -> list[torch.Tensor]:
        """Return the tensors as an operator of torch takes them."""
        tensors = [self.a, self.b, self.scaling]
        return tensors if self.index is None else [*tensors, self.index]


def check_adapters(x: torch.Tensor, out_features: int, adapters: Adapters) -> None:
    """Check that adapters fit a layer and its input.

    Args:
        x: (..., in).
        out_features: of the layer.
        adapters: the pairs.

    Raises:
        ValueError: they do not; the message says what was seen and what is allowed.
    """
    lora_a, lora_b, scaling, index = adapters.a, adapters.b, adapters.scaling, adapters.index
    count = lora_a.shape[0]
    rank = lora_a.shape[1] if lora_a.ndim == 3 else 0
    if lora_a.shape != (count, rank, x.shape[-1]) or lora_b.shape != (count, out_features, rank) or not rank:
        raise ValueError(
            f"the adapters are A {tuple(lora_a.shape)} and B {tuple(lora_b.shape)}; this layer takes "
            f"(adapters, rank, {x.shape[-1]}) and (adapters, {out_features}, rank)."
        )
    if scaling.shape != (count,) or scaling.dtype != torch.float32:
        raise ValueError(f"scaling is {tuple(scaling.shape)} {scaling.dtype}; allowed is ({count},) torch.float32.")
    if index is not None and (index.shape != x.shape[:-1] or index.dtype != torch.int32):
        raise ValueError(
            f"the adapter index is {tuple(index.shape)} {index.dtype}; allowed is {tuple(x.shape[:-1])} torch.int32."
        )


def _low_rank(
    rows: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    scaling: torch.Tensor,
    index: torch.Tensor | None,
) -> torch.Tensor:
    """Return `s_i (rows first_i^T) second_i^T` in float32; rows whose index names no adapter are zero."""
    total = torch.zeros(rows.shape[0], second.shape[1], dtype=torch.float32, device=rows.device)
    which = None if index is None else index.reshape(-1)
    for adapter in range(1 if which is None else first.shape[0]):
        term = rows @ first[adapter].to(torch.float32).t() @ second[adapter].to(torch.float32).t()
        term = term * scaling[adapter]
        total += term if which is None else torch.where((which == adapter).unsqueeze(-1), term, 0.0)
    return total


def compute_packed_lora_linear(
    x: torch.Tensor,
    layer: Sequence[torch.Tensor],
    bits: int,
    bias: torch.Tensor | None,
    adapters: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Compute what `packed_lora_linear` returns.

    Args:
        x: as there.
        layer: qweight, qzeros and scales.
        bits: width of a code.
        bias: as there.
        adapters: the operands of `Adapters`.

    Returns:
        torch.Tensor: (..., out), the dtype of x.
    """
    pairs, out_features = Adapters(*adapters), layer[2].shape[1]
    check_adapters(x, out_features, pairs)
    with torch.autocast(x.device.type, enabled=False):
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
        y = packed_linear_op(rows, *layer, bits, bias)
        y = y + _low_rank(rows, pairs.a, pairs.b, pairs.scaling, pairs.index)
    return y.to(x.dtype).view(*x.shape[:-1], out_features)


packed_lora_linear_op = torch.library.custom_op(
    "cloq_export::packed_lora_linear",
    compute_packed_lora_linear,
    mutates_args=(),
    schema="(Tensor x, Tensor[] layer, int bits, Tensor? bias, Tensor[] adapters) -> Tensor",
)


@packed_lora_linear_op.register_fake
def _packed_lora_linear_shape(
    x: torch.Tensor,
    layer: Sequence[torch.Tensor],
    bits: int,
    bias: torch.Tensor | None,
    adapters: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Return an empty tensor of the shape and dtype that `packed_lora_linear_op` returns."""
    return x.new_empty(*x.shape[:-1], layer[2].shape[1])


def _keep_for_backward(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
    """Keep references to the frozen tensors: no activation is needed."""
    _, layer, bits, bias, adapters = inputs
    ctx.save_for_backward(*layer, *adapters)
    ctx.bits = bits  # type: ignore[attr-defined]
    ctx.bias_dtype = None if bias is None else bias.dtype  # type: ignore[attr-defined]


def _packed_lora_linear_backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple:
    """Return the gradients by x and bias; everything else is frozen and gets none."""
    layer, operands = ctx.saved_tensors[:3], ctx.saved_tensors[3:]  # type: ignore[attr-defined]
    pairs = Adapters(*operands)
    input_grad = bias_grad = None
    rows = grad.reshape(-1, grad.shape[-1])
    if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
        with torch.autocast(grad.device.type, enabled=False):
            wide = rows.to(torch.float32)
            total = packed_linear_input_grad_op(wide, *layer, ctx.bits)  # type: ignore[attr-defined]
            turned = (pairs.b.transpose(1, 2), pairs.a.transpose(1, 2))
            total = total + _low_rank(wide, *turned, pairs.scaling, pairs.index)
        input_grad = total.to(grad.dtype).view(*grad.shape[:-1], total.shape[-1])
    if ctx.needs_input_grad[3]:  # type: ignore[attr-defined]
        bias_grad = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)  # type: ignore[attr-defined]
    return input_grad, [None] * len(layer), None, bias_grad, [None] * len(operands)


packed_lora_linear_op.register_autograd(_packed_lora_linear_backward, setup_context=_keep_for_backward)


def packed_lora_linear(
    x: torch.Tensor, layer: Sequence[torch.Tensor], bits: int, bias: torch.Tensor | None, adapters: Adapters
) -> torch.Tensor:
    """Return `x Q^T + bias + scaling_i (x A_i^T) B_i^T`, with an adapter i for every token.

    It is for serving: gradients reach x and the bias, but not A and B.

    Args:
        x: (..., in) float32, bfloat16 or float16.
        layer: qweight (in * bits / 32, out) int32, qzeros (groups, out * bits / 32) int32 with zeros stored as they
            are, and scales (groups, out) float.
        bits: width of a code.
        bias: (out) float, or None.
        adapters: the pairs, and which of them each token gets.

    Returns:
        torch.Tensor: (..., out), the dtype of x.

    Raises:
        ValueError: the tensors do not belong together.
    """
    return packed_lora_linear_op(x, list(layer), bits, bias, adapters.operands())
