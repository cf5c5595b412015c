"""Gram matrices: `H += X^T X`, float32 sums, tiles on and above the diagonal only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cloq_export.kernels.triton.tuning import INTERPRETED, on_its_device

# One shape, not tuned: H decides the bytes of a run.
_SHAPE = {"TILE": 32, "TOKENS": 16} if INTERPRETED else {"TILE": 128, "TOKENS": 64}


@triton.jit
def _add_gram(
    tokens,
    gram,
    count,
    in_features,
    token_stride,
    OPERAND: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    tile_row, tile_column = tl.program_id(0), tl.program_id(1)
    if tile_row <= tile_column:
        row = tile_row * TILE + tl.arange(0, TILE)
        column = tile_column * TILE + tl.arange(0, TILE)
        total = tl.zeros((TILE, TILE), dtype=tl.float32)
        for first in range(0, count, TOKENS):
            token = first + tl.arange(0, TOKENS)
            start = tokens + token.to(tl.int64)[:, None] * token_stride
            known = (token < count)[:, None]
            left = tl.load(start + row[None, :], mask=known & (row < in_features)[None, :], other=0.0)
            right = tl.load(start + column[None, :], mask=known & (column < in_features)[None, :], other=0.0)
            total += tl.dot(tl.trans(left.to(OPERAND)), right.to(OPERAND), input_precision="ieee")
        place = gram + row.to(tl.int64)[:, None] * in_features + column[None, :]
        mask = (column < in_features)[None, :] & (row[:, None] <= column[None, :])
        tl.store(place, tl.load(place, mask=mask, other=0.0) + total, mask=mask)


@on_its_device
def add_gram(gram: torch.Tensor, tokens: torch.Tensor) -> None:
    """Add `X^T X` to the upper triangle of H; what lies below the diagonal is neither read nor written.

    The products of bfloat16 and float16 numbers are exact in float32, so H is positive semi-definite as far as float32
    sums are. Every tile is one program's, which adds its tokens in order: the same tokens give the same bits.

    Args:
        gram: H, (in, in) float32, contiguous.
        tokens: X, (tokens, in) bfloat16 or float16, rows contiguous.
    """
    in_features = gram.shape[0]
    tiles = triton.cdiv(in_features, _SHAPE["TILE"])
    operand = tl.float16 if tokens.dtype == torch.float16 else tl.bfloat16
    _add_gram[(tiles, tiles)](
        tokens,
        gram,
        tokens.shape[0],
        in_features,
        tokens.stride(0),
        OPERAND=tl.float32 if INTERPRETED else operand,
        **_SHAPE,
        num_warps=8,
        num_stages=3,
    )
