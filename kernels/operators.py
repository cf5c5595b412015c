"""The operators of `reference` on every device: Triton's kernels are registered for tensors on a GPU.

The operators are registered with torch, so callers, fake tensors, `torch.compile` and gradients meet the same names
everywhere; only the arithmetic behind them differs, as `dispatch` decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cloq_export.kernels.dispatch import triton_takes_layer
from cloq_export.kernels.reference import linear as reference
from cloq_export.kernels.reference import lora as reference_lora

# Entries of Q that exist at a time on a GPU: enough to keep its matrix units busy.
BLOCK_ELEMENTS = 1 << 25
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One group may be cut at any word of its codes.
_UNIT = 32


def dequantize(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the whole weight `Q = scales * (codes - zeros)`, computed in float32.

    Args:
        qweight: (in * bits / 32, out) int32.
        qzeros: (groups, out * bits / 32) int32.
        scales: (groups, out) float.
        bits: width of a code.

    Returns:
        torch.Tensor: Q, (out, in) float32, contiguous.

    Raises:
        ValueError: the tensors do not belong together.
    """
    in_features = reference.check_packed(qweight, qzeros, scales, bits)
    if not triton_takes_layer(bits, in_features, scales.shape[0], qweight, qzeros, scales):
        return reference.dequantize(qweight, qzeros, scales, bits)
    from cloq_export.kernels.triton import dequantize as kernel

    return kernel.dequantize(qweight.contiguous(), qzeros.contiguous(), scales.contiguous(), bits)


def packed_linear_on_gpu(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Compute `packed_linear` with Triton: few tokens straight from the codes, many with Q a block at a time.

    Few tokens meet the exact Q and float32 sums. Many tokens of bfloat16 or float16 meet Q rounded to their dtype, as
    they do in any layer of that dtype.
    """
    in_features = reference.check_packed(qweight, qzeros, scales, bits)
    out_features = scales.shape[1]
    if x.shape[-1] != in_features:
        raise ValueError(f"the input has {x.shape[-1]} channels; this layer takes {in_features}.")
    operands = (x, qweight, qzeros, scales, bias)
    if x.dtype not in _DTYPES or not triton_takes_layer(bits, in_features, scales.shape[0], *operands):
        return reference.compute_packed_linear(x, qweight, qzeros, scales, bits, bias)
    from cloq_export.kernels.triton import dequantize as kernel
    from cloq_export.kernels.triton import linear as few

    layer = (qweight.contiguous(), qzeros.contiguous(), scales.contiguous())
    rows = x.reshape(-1, in_features).contiguous()
    if 0 < rows.shape[0] <= few.MOST_TOKENS:
        return few.lora_linear(rows, layer, bits, bias).view(*x.shape[:-1], out_features)
    y = torch.empty(rows.shape[0], out_features, dtype=x.dtype, device=x.device)
    if not rows.shape[0]:
        return y.view(*x.shape[:-1], out_features)
    addend = None if bias is None else bias.to(x.dtype)
    step = max(1, BLOCK_ELEMENTS // in_features)
    with torch.autocast(x.device.type, enabled=False):
        for first in range(0, out_features, step):
            last = min(first + step, out_features)
            # Made transposed: words of neighbouring outputs lie side by side, and so do the entries then.
            block = torch.empty(in_features, last - first, dtype=x.dtype, device=x.device)
            kernel.dequantize_into(block.t(), layer, bits, first, last)
            if addend is None:
                torch.mm(rows, block, out=y[:, first:last])
            else:
                torch.addmm(addend[first:last], rows, block, out=y[:, first:last])
    return y.view(*x.shape[:-1], out_features)


def packed_linear_input_grad_on_gpu(
    grad: torch.Tensor, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, bits: int
) -> torch.Tensor:
    """Compute `grad Q` with Q made a block of inputs at a time, in the dtype of the gradient."""
    in_features = reference.check_packed(qweight, qzeros, scales, bits)
    groups, out_features = scales.shape
    if grad.dtype not in _DTYPES or not triton_takes_layer(bits, in_features, groups, grad, qweight, qzeros, scales):
        return reference.compute_packed_linear_input_grad(grad, qweight, qzeros, scales, bits)
    from cloq_export.kernels.triton import dequantize as kernel

    qweight, qzeros, scales = qweight.contiguous(), qzeros.contiguous(), scales.contiguous()
    rows = grad.reshape(-1, out_features).contiguous()
    total = torch.empty(rows.shape[0], in_features, dtype=grad.dtype, device=grad.device)
    # Whole groups, so that a block is a layer of its own; the one group of a per-channel layer may be cut anywhere.
    columns = in_features // groups if groups > 1 else _UNIT
    step = max(1, BLOCK_ELEMENTS // (out_features * columns)) * columns
    with torch.autocast(grad.device.type, enabled=False):
        for first in range(0, in_features, step):
            last = min(first + step, in_features)
            part = slice(first // columns, last // columns) if groups > 1 else slice(0, 1)
            words = qweight[first * bits // _UNIT : last * bits // _UNIT]
            block = torch.empty(last - first, out_features, dtype=grad.dtype, device=grad.device)
            kernel.dequantize_into(block.t(), (words, qzeros[part], scales[part]), bits, 0, out_features)
            torch.mm(rows, block.t(), out=total[:, first:last])
    return total.view(*grad.shape[:-1], in_features)


def packed_lora_linear_on_gpu(
    x: torch.Tensor,
    layer: Sequence[torch.Tensor],
    bits: int,
    bias: torch.Tensor | None,
    adapters: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Compute `packed_lora_linear` with Triton for few tokens, by the reference over `packed_linear` for many."""
    qweight, qzeros, scales = (tensor.contiguous() for tensor in layer)
    in_features = reference.check_packed(qweight, qzeros, scales, bits)
    groups, out_features = scales.shape
    pairs = reference_lora.Adapters(*adapters)
    reference_lora.check_adapters(x, out_features, pairs)
    tokens = x.numel() // in_features
    if tokens and x.dtype in _DTYPES and triton_takes_layer(bits, in_features, groups, x, *layer, bias, *adapters):
        from cloq_export.kernels.triton import linear as few

        if tokens <= few.MOST_TOKENS:
            lined_up = reference_lora.Adapters(
                pairs.a.contiguous(),
                pairs.b.contiguous(),
                pairs.scaling.contiguous(),
                None if pairs.index is None else pairs.index.reshape(-1).contiguous(),
            )
            rows = x.reshape(-1, in_features).contiguous()
            y = few.lora_linear(rows, (qweight, qzeros, scales), bits, bias, lined_up)
            return y.view(*x.shape[:-1], out_features)
    return reference_lora.compute_packed_lora_linear(x, layer, bits, bias, adapters)


reference.packed_linear_op.register_kernel("cuda", packed_linear_on_gpu)
reference.packed_linear_input_grad_op.register_kernel("cuda", packed_linear_input_grad_on_gpu)
reference_lora.packed_lora_linear_op.register_kernel("cuda", packed_lora_linear_on_gpu)
