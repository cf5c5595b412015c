"""MagR's proximal map: clip each group at the level that takes a given amount off its l1 norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cloq_export.kernels.triton.tuning import on_its_device

_TILE_ELEMENTS = 4096
_STEPS = 64


@triton.jit
def _clip(
    groups,
    levels,
    result,
    count,
    span,
    amount,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SPAN)
    inside = (row < count)[:, None] & (column < span)[None, :]
    place = row.to(tl.int64)[:, None] * span + column[None, :]
    value = tl.load(groups + place, mask=inside, other=0.0)
    magnitude = tl.abs(value)
    level = tl.load(levels + row, mask=row < count, other=0.0)
    step = 0
    moving = 1
    while (moving > 0) & (step < STEPS):
        above = magnitude > level[:, None]
        number = tl.maximum(tl.sum(above.to(tl.float32), axis=1), 1.0)
        excess = tl.sum(tl.where(above, magnitude, 0.0), axis=1) - amount
        new_level = tl.maximum(tl.math.div_rn(excess, number), 0.0)
        moving = tl.max((new_level > level * (1.0 + 1e-7)).to(tl.int32), axis=0)
        if step == 0:
            # From an old level the first step may go down; after it Newton's method climbs.
            moving = 1
            level = new_level
        else:
            level = tl.maximum(level, new_level)
        step += 1
    tl.store(levels + row, level, mask=row < count)
    clipped = tl.minimum(tl.maximum(value, -level[:, None]), level[:, None])
    tl.store(result + place, clipped, mask=inside)


@on_its_device
def clip_groups(groups: torch.Tensor, amount: float, levels: torch.Tensor) -> torch.Tensor:
    """Return the proximal map of `amount * ||v||_inf` on each row.

    That is `|v|` clipped at tau with `sum(max(|v| - tau, 0)) = amount` (MagR section 3). The reference is
    `cloq_export.quantize.magr.shrink_infinity_norm`.

    Args:
        groups: (n, span) float32, contiguous.
        amount: radius, >= 0.
        levels: tau, (n,) float32: where Newton's method starts, overwritten with where it ends.

    Returns:
        torch.Tensor: (n, span) float32; all zero where the l1 norm is at most `amount`.
    """
    count, span = groups.shape
    result = torch.empty_like(groups)
    wide = triton.next_power_of_2(span)
    rows = max(1, _TILE_ELEMENTS // wide)
    _clip[(triton.cdiv(count, rows),)](
        groups,
        levels,
        result,
        count,
        span,
        amount,
        STEPS=_STEPS,
        ROWS=rows,
        SPAN=wide,
        num_warps=4 if wide <= _TILE_ELEMENTS else 16,
        enable_fp_fusion=False,
    )
    return result
