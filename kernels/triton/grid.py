"""The search for each group's scale and zero: all candidate ranges in one pass, with the group in registers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from cloq_export.kernels.triton.tuning import on_its_device

_TILE_ELEMENTS = 4096
_ROUNDER: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def _fit(low, high, max_code, SYMMETRIC: tl.constexpr, least, largest):
    """Return scales, rounded to float16, and zeros that span `low..high`."""
    if SYMMETRIC:
        reach = 2.0 * tl.maximum(-low, high)
        scales = tl.math.div_rn(reach, max_code + tl.zeros_like(reach))
        scales = tl.minimum(tl.maximum(scales, least), largest).to(tl.float16).to(tl.float32)
        zeros = tl.zeros_like(scales) + (max_code + 1.0) * 0.5
    else:
        scales = tl.math.div_rn(high - low, max_code + tl.zeros_like(low))
        scales = tl.minimum(tl.maximum(scales, least), largest).to(tl.float16).to(tl.float32)
        # Clamped first, so that the rounding trick meets small numbers only.
        zeros = tl.minimum(tl.maximum(tl.math.div_rn(-low, scales), 0.0), max_code)
        zeros = (zeros + _ROUNDER) - _ROUNDER
    return scales, zeros


@triton.jit
def _search(
    groups,
    fractions,
    scales,
    zeros,
    count,
    span,
    coarse,
    trials,
    max_code,
    least,
    largest,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SPAN)
    inside = (row < count)[:, None] & (column < span)[None, :]
    weight = tl.load(groups + row.to(tl.int64)[:, None] * span + column[None, :], mask=inside, other=0.0)
    low = tl.minimum(tl.min(weight, axis=1), 0.0)
    high = tl.maximum(tl.max(weight, axis=1), 0.0)
    best_scales, best_zeros = _fit(low, high, max_code, SYMMETRIC, least, largest)
    best_error = tl.full((ROWS,), float("inf"), dtype=tl.float32)
    best_fraction = tl.full((ROWS,), 1.0, dtype=tl.float32)
    for trial in range(trials):
        step = tl.load(fractions + trial)
        # The first fractions are tried as they are, the later ones are offsets from the best so far.
        fraction = step + tl.where(trial < coarse, 0.0, best_fraction)
        scale, zero = _fit(low * fraction, high * fraction, max_code, SYMMETRIC, least, largest)
        codes = tl.math.div_rn(weight, scale[:, None] + tl.zeros_like(weight))
        # Rounded before the zero is added, as the reference does; codes far outside are clamped first.
        codes = tl.minimum(tl.maximum(codes, -2.0 - max_code), 2.0 + max_code)
        codes = (codes + _ROUNDER) - _ROUNDER
        codes = tl.minimum(tl.maximum(codes + zero[:, None], 0.0), max_code)
        miss = tl.abs((codes - zero[:, None]) * scale[:, None] - weight)
        error = tl.sum(miss * miss * tl.math.sqrt_rn(miss), axis=1)
        better = error < best_error
        best_error = tl.where(better, error, best_error)
        best_scales = tl.where(better, scale, best_scales)
        best_zeros = tl.where(better, zero, best_zeros)
        best_fraction = tl.where(better, fraction, best_fraction)
    tl.store(scales + row, best_scales, mask=row < count)
    tl.store(zeros + row, best_zeros, mask=row < count)


@on_its_device
def search_grid(
    groups: torch.Tensor,
    max_code: int,
    fractions: Sequence[float],
    refinement: Sequence[float],
    limits: tuple[float, float],
    *,
    symmetric: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale and zero of each group whose rounding leaves the least `sum |error|^2.5`.

    The reference is `cloq_export.quantize.grid`; the two differ in the order of the sums.

    Args:
        groups: (n, span) float32, contiguous.
        max_code: `2**bits - 1`.
        fractions: shares of the group's range to try.
        refinement: offsets from the best share to try afterwards, one after the other.
        limits: smallest and largest scale.
        symmetric: the zero is the middle code.

    Returns:
        Scales and zeros, (n,) float32 each; scales are float16 numbers.
    """
    count, span = groups.shape
    scales = torch.empty(count, dtype=torch.float32, device=groups.device)
    zeros = torch.empty_like(scales)
    wide = triton.next_power_of_2(span)
    rows = max(1, _TILE_ELEMENTS // wide)
    trials = torch.tensor([*fractions, *refinement], dtype=torch.float32, device=groups.device)
    _search[(triton.cdiv(count, rows),)](
        groups,
        trials,
        scales,
        zeros,
        count,
        span,
        len(fractions),
        len(trials),
        float(max_code),
        *limits,
        SYMMETRIC=symmetric,
        ROWS=rows,
        SPAN=wide,
        num_warps=4 if wide <= _TILE_ELEMENTS else 16,
        enable_fp_fusion=False,
    )
    return scales, zeros
