"""Q from packed codes, in one pass over memory, for prefill and training, where a matrix product follows."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from cloq_export.kernels.triton.tuning import on_its_device, tuned
from cloq_export.kernels.triton.unpack import UNIT, as_fraction, load_codes, load_zeros

_LARGEST_TILE_UNITS = 4

_SPACE = [{"COLUMNS": columns, "num_warps": warps, "num_stages": 1} for columns in (64, 32, 128) for warps in (4, 8)]


def tile_units(in_features: int, groups: int) -> int | None:
    """Return how many units of 32 inputs a tile may have so that it lies in one group; None if none fits."""
    columns = in_features // groups
    if columns % UNIT:
        return None
    return math.gcd(columns // UNIT, _LARGEST_TILE_UNITS)


@tuned(_SPACE, ["out_features", "in_features", "BITS", "UNITS", "in_stride"])
@triton.jit
def _dequantize(
    qweight,
    qzeros,
    scales,
    result,
    first,
    last,
    out_features,
    in_features,
    group_units,
    out_stride,
    in_stride,
    BITS: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    unit = tl.program_id(0) * UNITS
    column = first + tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < last
    group = unit // group_units
    codes = load_codes(qweight, unit, column, mask, out_features, BITS, UNITS)
    zeros = load_zeros(qzeros, group, column, mask, out_features, BITS)
    scale = tl.load(scales + group * out_features + column, mask=mask, other=0.0).to(tl.float32) * (1 << BITS)
    # Exact: code minus zero fits the mantissa, and the power of two only moves the exponent.
    weight = (as_fraction(codes, BITS) - as_fraction(zeros, BITS)[None, :]) * scale[None, :]
    row = unit * 32 + tl.arange(0, UNITS * 32)
    place = (column - first).to(tl.int64)[None, :] * out_stride + row.to(tl.int64)[:, None] * in_stride
    tl.store(result + place, weight.to(result.dtype.element_ty), mask=mask[None, :])


@on_its_device
def dequantize_into(
    result: torch.Tensor, layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor], bits: int, first: int, last: int
) -> None:
    """Write `Q[first:last]`, computed in float32 and rounded once.

    Args:
        result: (last - first, in), float32, bfloat16 or float16, any strides.
        layer: qweight (in * bits / 32, out) int32, qzeros (groups, out * bits / 32) int32 and scales (groups, out)
            float, contiguous.
        bits: 2, 3, 4 or 8.
        first: output channel of the first row.
        last: output channel behind the last row.
    """
    qweight, qzeros, scales = layer
    groups, out_features = scales.shape
    in_features = result.shape[1]
    units = tile_units(in_features, groups)
    assert units is not None
    grid = lambda meta: (in_features // UNIT // units, triton.cdiv(last - first, meta["COLUMNS"]))  # noqa: E731
    _dequantize[grid](
        qweight,
        qzeros,
        scales,
        result,
        first,
        last,
        out_features,
        in_features,
        in_features // groups // UNIT,
        result.stride(0),
        result.stride(1),
        BITS=bits,
        UNITS=units,
    )


def dequantize(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, bits: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the whole weight Q, (out, in), contiguous; arguments as `dequantize_into`."""
    out_features = scales.shape[1]
    in_features = qweight.shape[0] * UNIT // bits
    result = torch.empty(out_features, in_features, dtype=dtype, device=qweight.device)
    dequantize_into(result, (qweight, qzeros, scales), bits, 0, out_features)
    return result
