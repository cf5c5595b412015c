"""Packed linear layers on the CPU: `y = x Q^T (+ bias) (+ low-rank term)`, `Q = scales * (codes - zeros)`.

A layer is brought into the kernels' own layout once (`pack_weight`); cloq_cpu.h describes it. `linear` and
`lora_linear` then compute with it, in one of two precisions:

- "exact": activations as they are and float32 sums. One exception has the error of the activations' own dtype and no
  more: with AMX, bfloat16 activations of several tokens meet weights and low-rank factors rounded to bfloat16, as in
  any bfloat16 layer;
- "int8": every token's activations are first rounded to 255 steps between minus and plus their largest. With AMX,
  those of several tokens then meet weights rounded to bfloat16.

Both are registered with torch (fake tensors, gradients by activations and bias); outside of tracing and gradients the
library is called directly, because the way through torch's dispatcher costs as much as a small layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from cloq_export.kernels.cpu.lora import CpuLora
from cloq_export.kernels.cpu.weight import DTYPES, LANES, CpuWeight, require_library, weight_of

Precision = Literal["exact", "int8"]


def linear(
    x: torch.Tensor, weight: CpuWeight, bias: torch.Tensor | None = None, *, precision: Precision = "exact"
) -> torch.Tensor:
    """Return `x Q^T + bias`. Differentiable by x and bias in the precision "exact".

    Args:
        x: (..., in) float32, bfloat16 or float16.
        weight: the layer.
        bias: (out) float, or None.
        precision: "exact" or "int8".

    Returns:
        torch.Tensor: (..., out), the dtype of x.

    Raises:
        ValueError: the tensors do not belong together.
        RuntimeError: there is no native library, or gradients are asked for in the precision "int8".
    """
    return lora_linear(x, weight, bias, precision=precision)


def lora_linear(
    x: torch.Tensor,
    weight: CpuWeight,
    bias: torch.Tensor | None = None,
    lora: CpuLora | None = None,
    index: torch.Tensor | None = None,
    *,
    precision: Precision = "exact",
) -> torch.Tensor:
    """Return `x Q^T + bias + scaling_i (x A_i^T) B_i^T`, with an adapter i for every token.

    The low-rank term is computed from the activations as they are, in both precisions. It is for serving: gradients
    reach x, but not A and B.

    Args:
        x: (..., in) float32, bfloat16 or float16.
        weight: the layer.
        bias: (out) float, or None.
        lora: the adapters, or None.
        index: one adapter per token, int32 of the leading shape of x, -1 for none; None means adapter 0 for all.
        precision: "exact" or "int8".

    Returns:
        torch.Tensor: (..., out), the dtype of x.

    Raises:
        ValueError: the tensors do not belong together, or an index names no adapter.
        RuntimeError: there is no native library, or gradients are asked for in the precision "int8".
    """
    if precision not in ("exact", "int8"):
        raise ValueError(f"the precision is {precision!r}; allowed are 'exact' and 'int8'.")
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if wants_grad and precision == "int8":
        raise RuntimeError("8-bit activations have no gradient; fine-tune in the precision 'exact'.")
    if wants_grad or type(x) is not torch.Tensor or torch.compiler.is_compiling():
        adapters = [] if lora is None else [lora.a, lora.b, lora.scaling, lora.ranks, lora.ends]
        if index is not None:
            adapters.append(index)
        result: torch.Tensor = cpu_linear_op(x, *weight.operands(), bias, adapters, precision == "int8")
        return result
    return _compute(x, weight, bias, lora, index, precision == "int8")


def _compute(
    x: torch.Tensor,
    weight: CpuWeight,
    bias: torch.Tensor | None,
    lora: CpuLora | None,
    index: torch.Tensor | None,
    int8_activations: bool,
) -> torch.Tensor:
    """Check what is not checked yet, and call the library."""
    out_features, in_features = weight.out_features, weight.in_features
    shape, dtype = x.shape, DTYPES.get(x.dtype)
    if dtype is None or shape[-1:] != (in_features,) or x.device.type != "cpu":
        raise ValueError(
            f"the input is {tuple(shape)} {x.dtype} on {x.device}; this layer takes (..., {in_features}) float32, "
            "bfloat16 or float16 on the CPU."
        )
    if bias is not None:
        if bias.shape != (out_features,) or not bias.is_floating_point():
            raise ValueError(f"the bias is {tuple(bias.shape)} {bias.dtype}; this layer takes ({out_features},) float.")
        bias = bias.detach().to(torch.float32).contiguous()
    if lora is None:
        if index is not None:
            raise ValueError("an adapter index was given, but no adapters.")
    else:
        blocks = weight.words.shape[0]
        if lora.a.shape[3] != in_features or lora.b.shape[1] != blocks:
            raise ValueError(
                f"the adapters are A {tuple(lora.a.shape)} and B {tuple(lora.b.shape)}; this layer has {in_features} "
                f"inputs and {blocks} blocks of outputs."
            )
        if index is not None:
            if index.shape != shape[:-1] or index.dtype != torch.int32:
                raise ValueError(
                    f"the adapter index is {tuple(index.shape)} {index.dtype}; allowed is {tuple(shape[:-1])} int32."
                )
            index = index.contiguous()
    x = x.contiguous()
    y = torch.empty((*shape[:-1], out_features), dtype=x.dtype)
    failed = require_library().cloq_linear(
        weight.structure(),
        x.data_ptr(),
        x.numel() // in_features,
        dtype,
        None if bias is None else bias.data_ptr(),
        None if lora is None else lora.structure(index),
        int8_activations,
        weight.deterministic,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        assert index is not None
        assert lora is not None
        raise ValueError(f"the adapter index names {int(index.max())}; there are {lora.a.shape[0]} adapters.")
    return y


@torch.library.custom_op(
    "cloq_export::cpu_linear",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor[] layer, int[] sizes, Tensor? bias, Tensor[] adapters, bool int8_activations) -> Tensor"
    ),
)
def cpu_linear_op(
    x: torch.Tensor,
    layer: list[torch.Tensor],
    sizes: list[int],
    bias: torch.Tensor | None,
    adapters: list[torch.Tensor],
    int8_activations: bool,
) -> torch.Tensor:
    """Compute what `lora_linear` returns.

    Args:
        x: as there.
        layer: words, scales and zeros of a `CpuWeight`.
        sizes: its other operands.
        bias: as there.
        adapters: a, b, scaling, ranks and ends of a `CpuLora`, and the index if there is one; empty without adapters.
        int8_activations: the precision is "int8".

    Returns:
        torch.Tensor: (..., out), the dtype of x.
    """
    lora, index = _adapters(adapters)
    return _compute(x, weight_of(layer, sizes), bias, lora, index, int8_activations)


def _adapters(adapters: Sequence[torch.Tensor]) -> tuple[CpuLora | None, torch.Tensor | None]:
    """Return adapters and index from the operands of an operator."""
    if len(adapters) == 1:
        raise ValueError("an adapter index was given, but no adapters.")
    lora = CpuLora(*adapters[:5]) if adapters else None
    return lora, adapters[5] if len(adapters) > 5 else None


@cpu_linear_op.register_fake
def _cpu_linear_shape(
    x: torch.Tensor,
    layer: list[torch.Tensor],
    sizes: list[int],
    bias: torch.Tensor | None,
    adapters: list[torch.Tensor],
    int8_activations: bool,
) -> torch.Tensor:
    """Return an empty tensor of the shape and dtype that `cpu_linear_op` returns."""
    return x.new_empty(*x.shape[:-1], sizes[1])


@torch.library.custom_op(
    "cloq_export::cpu_linear_input_grad",
    mutates_args=(),
    schema="(Tensor grad, Tensor[] layer, int[] sizes, Tensor[] adapters) -> Tensor",
)
def cpu_linear_input_grad_op(
    grad: torch.Tensor, layer: list[torch.Tensor], sizes: list[int], adapters: list[torch.Tensor]
) -> torch.Tensor:
    """Compute `grad Q`, and the adapters' share of it in float32; operands as those of `cpu_linear_op`."""
    weight = weight_of(layer, sizes)
    lora, index = _adapters(adapters)
    out_features, in_features = sizes[1:3]
    if grad.dtype not in DTYPES or grad.device.type != "cpu" or grad.shape[-1:] != (out_features,):
        raise ValueError(
            f"the gradient is {tuple(grad.shape)} {grad.dtype} on {grad.device}; this layer takes "
            f"(..., {out_features}) float32, bfloat16 or float16 on the CPU."
        )
    grad = grad.contiguous()
    result = torch.empty(*grad.shape[:-1], in_features, dtype=grad.dtype)
    tokens = grad.numel() // out_features
    require_library().cloq_linear_input_grad(
        weight.structure(),
        grad.data_ptr(),
        tokens,
        DTYPES[grad.dtype],
        result.data_ptr(),
        torch.get_num_threads(),
    )
    if lora is None:
        return result
    with torch.autocast("cpu", enabled=False):
        rows, total = grad.view(-1, out_features).to(torch.float32), result.view(-1, in_features).to(torch.float32)
        which = torch.zeros(rows.shape[0], dtype=torch.int32) if index is None else index.reshape(-1)
        starts = [0, *lora.ends.tolist()]
        for adapter in range(lora.a.shape[0]):
            chosen = (which == adapter).nonzero()[:, 0]
            for number, rank in enumerate(lora.ranks[adapter].tolist()):
                first, last = starts[number] * LANES, min(starts[number + 1] * LANES, out_features)
                blocked = lora.b[adapter, starts[number] : starts[number + 1], :rank]
                b = blocked.transpose(1, 2).reshape(-1, rank)[: last - first].to(torch.float32)
                inner = rows[chosen, first:last] @ b * lora.scaling[adapter]
                total.index_add_(0, chosen, inner @ lora.a[adapter, number, :rank].to(torch.float32))
    return total.to(grad.dtype).view(result.shape)


@cpu_linear_input_grad_op.register_fake
def _cpu_linear_input_grad_shape(
    grad: torch.Tensor, layer: list[torch.Tensor], sizes: list[int], adapters: list[torch.Tensor]
) -> torch.Tensor:
    """Return an empty tensor of the shape and dtype that `cpu_linear_input_grad_op` returns."""
    return grad.new_empty(*grad.shape[:-1], sizes[2])


def _keep_for_backward(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
    """Keep references to packed tensors only: no activation is needed."""
    _, layer, sizes, bias, adapters, _ = inputs
    ctx.save_for_backward(*layer, *adapters)
    ctx.sizes = list(sizes)  # type: ignore[attr-defined]
    ctx.bias_dtype = None if bias is None else bias.dtype  # type: ignore[attr-defined]


def _cpu_linear_backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple:
    """Return the gradients by x and bias; everything else is frozen and gets none."""
    saved = list(ctx.saved_tensors)  # type: ignore[attr-defined]
    layer, adapters = saved[:3], saved[3:]
    input_grad = bias_grad = None
    if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
        input_grad = cpu_linear_input_grad_op(grad, layer, ctx.sizes, adapters)  # type: ignore[attr-defined]
    if ctx.needs_input_grad[3]:  # type: ignore[attr-defined]
        summed = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32)
        bias_grad = summed.to(ctx.bias_dtype)  # type: ignore[attr-defined]
    return input_grad, [None] * len(layer), None, bias_grad, [None] * len(adapters), None


cpu_linear_op.register_autograd(_cpu_linear_backward, setup_context=_keep_for_backward)
