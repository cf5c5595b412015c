"""Packed linears for few tokens: `y = x Q^T + bias + scaling_i (x A_i^T) B_i^T`, with an adapter i for every token.

One token is a matrix-vector product, which memory bandwidth limits: every thread turns words into partial sums of
its own outputs, in registers. More tokens, up to `MOST_TOKENS`, go through the matrix units, whose operands are
`code - zero`, exact in float16 and bfloat16; scales meet the float32 sums. So no rounding is added to that of the
activations.

Where the outputs alone do not fill the GPU, the inputs are split too; the partial sums are then added by a second
kernel in a fixed order. Adapters use the same two steps: `x A^T` is made beside the partial sums, `(x A^T) B^T` is
added with them. No result depends on the order in which programs finish.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from cloq_export.kernels.dispatch import MOST_TOKENS as MOST_TOKENS
from cloq_export.kernels.gpu import cuda
from cloq_export.kernels.reference.lora import Adapters
from cloq_export.kernels.triton.dequantize import tile_units
from cloq_export.kernels.triton.linear_kernels import add_partial_sums, matrix_product, vector_product
from cloq_export.kernels.triton.tuning import INTERPRETED, on_its_device
from cloq_export.kernels.triton.unpack import UNIT

_MOST_SPLITS = 8
_RANK_TILE = 16
_SHRINK_SPLITS = 4
# Programs that a GPU wants at least, where the interpreter cannot tell how many multiprocessors there are.
_INTERPRETED_PROCESSORS = 4
_NARROWEST = 16

_ONE = 0x3F800000
_MANTISSA_BITS = 23
# Neighbouring codes that are read without moving them: at most nine bits, so that few bits of the sums are lost.
_RUNS = {2: 4, 3: 3, 4: 2, 8: 1}


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return cuda().processors(device)


def _splits(out_features: int, units: int, width: int, device: torch.device) -> int:
    """Return into how many parts the inputs are cut so that all multiprocessors have work."""
    splits = 1
    while (
        splits < _MOST_SPLITS
        and splits * 2 <= units
        and triton.cdiv(out_features, width) * splits < _processors(device)
    ):
        splits *= 2
    return splits


@on_its_device
def lora_linear(
    x: torch.Tensor,
    layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    bits: int,
    bias: torch.Tensor | None = None,
    adapters: Adapters | None = None,
    *,
    splits: int | None = None,
) -> torch.Tensor:
    """Return `x Q^T + bias + scaling_i (x A_i^T) B_i^T` for up to `MOST_TOKENS` tokens, with float32 sums.

    Args:
        x: (tokens, in) float32, bfloat16 or float16, contiguous.
        layer: qweight (in * bits / 32, out) int32, qzeros (groups, out * bits / 32) int32 and scales (groups, out)
            float, contiguous.
        bits: 2, 3, 4 or 8.
        bias: (out) float, or None.
        adapters: the pairs, contiguous, with an index of shape (tokens,) if there is one; or None.
        splits: into how many parts the inputs are cut; None lets the size of the GPU decide.

    Returns:
        torch.Tensor: (tokens, out), the dtype of x.
    """
    tokens, in_features = x.shape
    qweight, qzeros, scales = layer
    lora_a = lora_b = scaling = index = None
    if adapters is not None:
        lora_a, lora_b, scaling, index = adapters.a, adapters.b, adapters.scaling, adapters.index
    groups, out_features = scales.shape
    units = tile_units(in_features, groups)
    assert units is not None
    all_units = in_features // UNIT
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    if splits is None:
        splits = _splits(out_features, all_units, _NARROWEST if tokens == 1 else 4 * _NARROWEST, x.device)
    count, rank = (0, 0) if lora_a is None else (lora_a.shape[0], lora_a.shape[1])
    has_lora = rank > 0 and count > 0
    partial = splits > 1 or has_lora
    target = torch.empty(splits, tokens, out_features, dtype=torch.float32, device=x.device) if partial else y
    rank_tiles = triton.cdiv(rank, _RANK_TILE)
    inner = torch.empty(_SHRINK_SPLITS if has_lora else 0, tokens, rank, dtype=torch.float32, device=x.device)
    shrink_programs = tokens * rank_tiles * _SHRINK_SPLITS if has_lora else 0
    grid = lambda meta: (triton.cdiv(out_features, meta["COLUMNS"]) * splits + shrink_programs,)  # noqa: E731
    # Arguments that a launch does not use must still be tensors; any will do.
    operands = (
        x,
        qweight,
        qzeros,
        scales,
        x if bias is None or partial else bias,
        target,
        lora_a if has_lora else x,
        x if index is None else index,
        inner if has_lora else x,
    )
    sizes = (out_features, all_units, in_features // groups // UNIT, splits, count, rank, rank_tiles, _SHRINK_SPLITS)
    choices: dict[str, Any] = {
        "BITS": bits,
        "PARTIAL": partial,
        "HAS_BIAS": bias is not None,
        "HAS_LORA": has_lora,
        "HAS_INDEX": index is not None,
        "RANK_TILE": _RANK_TILE,
    }
    if tokens == 1:
        vector_product[grid](
            *operands,
            *sizes,
            _ONE,
            ((1 << bits) - 1) << (_MANTISSA_BITS - bits),
            **choices,
            CENTRED=x.dtype == torch.float32,
            RUN=_RUNS[bits],
            WINDOW=10 if bits == 3 else UNIT // bits,
            WINDOWS=4 if bits == 3 else bits,
        )
    else:
        most = max(16, triton.next_power_of_2(tokens))
        matrix_product[grid](*operands, tokens, *sizes, **choices, OPERAND=_operand(x.dtype), TOKENS=most, UNITS=units)
    if partial:
        step = 1 if tokens == 1 else 16
        columns = 64
        add_partial_sums[(triton.cdiv(out_features, columns), triton.cdiv(tokens, step))](
            target,
            x if bias is None else bias,
            y,
            lora_b if has_lora else x,
            scaling if has_lora else x,
            x if index is None else index,
            inner if has_lora else x,
            tokens,
            out_features,
            splits,
            rank,
            count,
            _SHRINK_SPLITS,
            HAS_BIAS=bias is not None,
            HAS_LORA=has_lora,
            HAS_INDEX=index is not None,
            TOKENS=step,
            RANK=max(16, triton.next_power_of_2(rank)) if has_lora else 16,
            COLUMNS=columns,
        )
    return y


def _operand(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype of the matrix product's operands; the interpreter has no bfloat16, float32 gives the same."""
    if dtype == torch.float16:
        return tl.float16
    return tl.bfloat16 if dtype == torch.bfloat16 and not INTERPRETED else tl.float32
