"""The operations of `cloq_export.kernels.cpu.linear` in plain torch, from the canonical form of a layer.

`codes` are (out, in) uint8, `scales` (out, groups) float and `zeros` (out, groups) uint8; Q = scales * (codes - zeros).
Everything is computed in the dtype of the scales, so float64 scales give exact results to compare with.
"""

from __future__ import annotations

import torch

from cloq_export.kernels.reference.lora import Adapters


def dequantize(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Return Q, (out, in), in the dtype of the scales."""
    grouped = codes.view(*scales.shape, -1).to(scales.dtype)
    return ((grouped - zeros.to(scales.dtype).unsqueeze(-1)) * scales.unsqueeze(-1)).view(codes.shape)


def round_activations(x: torch.Tensor) -> torch.Tensor:
    """Return x with every token rounded to 255 steps between minus and plus its largest absolute value."""
    step = x.abs().amax(dim=-1, keepdim=True) / 127
    return torch.where(step > 0, torch.round(x / step) * step, x)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    adapters: Adapters | None = None,
    *,
    int8_activations: bool = False,
) -> torch.Tensor:
    """Return `x Q^T + bias + scaling_i (x A_i^T) B_i^T`, with an adapter i for every token.

    Args:
        x: (..., in).
        weight: Q, (out, in).
        bias: (out), or None.
        adapters: the pairs, and which of them each token gets; or None.
        int8_activations: meet Q with rounded activations; the low-rank term takes them as they are.

    Returns:
        torch.Tensor: (..., out), the dtype of the weight.
    """
    rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
    y = (round_activations(rows) if int8_activations else rows) @ weight.t()
    if bias is not None:
        y = y + bias.to(weight.dtype)
    if adapters is not None:
        index = adapters.index
        which = torch.zeros(rows.shape[0], dtype=torch.int64) if index is None else index.reshape(-1)
        for adapter in range(adapters.a.shape[0]):
            a, b = adapters.a[adapter].to(weight.dtype), adapters.b[adapter].to(weight.dtype)
            term = rows @ a.t() @ b.t() * adapters.scaling[adapter].to(weight.dtype)
            y = y + torch.where((which == adapter).unsqueeze(-1), term, 0)
    return y.view(*x.shape[:-1], weight.shape[0])
