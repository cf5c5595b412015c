"""OPTQ's walk over a block of columns, in one launch.

Rows of the weight are independent, so each program walks through all columns of the block for some rows and keeps
their errors in registers: what a column lacks is the sum of the earlier errors times one column of the feedback
matrix. The reference, `cloq_export.quantize.optq`, hands the errors on to the right instead; the two differ in the
order of float32 sums only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cloq_export.kernels.triton.tuning import on_its_device

BLOCK_COLUMNS = 128
_ROWS = 32
# Adding and taking away 1.5 * 2^23 rounds a float32 of modest size to the nearest integer, ties to even.
_ROUNDER: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def _walk(
    remaining,
    exact,
    scales,
    moves,
    codes,
    errors,
    columns,
    rows,
    max_code,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    place = tl.arange(0, BLOCK)
    made_errors = tl.zeros((BLOCK, ROWS), dtype=tl.float32)
    for column in range(columns):
        here = column * rows + row
        scale = tl.load(scales + here, mask=inside, other=1.0)
        weight = tl.load(exact + here, mask=inside, other=0.0)
        # Errors of columns not yet visited are zero, so the whole column of moves may be taken.
        share = tl.load(moves + column * columns + place, mask=place < columns, other=0.0)
        wanted = tl.load(remaining + here, mask=inside, other=0.0) + tl.sum(made_errors * share[:, None], axis=0)
        code = tl.minimum(tl.maximum(tl.math.div_rn(wanted, scale), 0.0), max_code)
        code = (code + _ROUNDER) - _ROUNDER
        error = weight - code * scale
        made_errors = tl.where(place[:, None] == column, error[None, :], made_errors)
        tl.store(codes + here, code.to(tl.uint8), mask=inside)
    every = place[:, None] * rows + row[None, :]
    tl.store(errors + every, made_errors, mask=(place < columns)[:, None] & inside[None, :])


@on_its_device
def walk_block(
    remaining: torch.Tensor,
    exact: torch.Tensor,
    scales: torch.Tensor,
    moves: torch.Tensor,
    max_code: int,
    results: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Choose the codes of a block of columns, each after the errors of those before it.

    For column k: `code = clamp(round((remaining_k + sum_(j<k) M_jk error_j) / scale_k), 0, max_code)` and
    `error_k = exact_k - code * scale_k` (OPTQ algorithm 1 in its LDL form).

    Args:
        remaining: (columns, rows) float32, contiguous: the weights with the errors of earlier blocks, transposed.
        exact: the weights themselves, same shape.
        scales: same shape, positive.
        moves: M, (columns, columns) float32; only what lies above the diagonal counts.
        max_code: `2**bits - 1`.
        results: codes (columns, rows) uint8 and errors (columns, rows) float32, written.
    """
    codes, errors = results
    columns, rows = remaining.shape
    assert columns <= BLOCK_COLUMNS
    _walk[(triton.cdiv(rows, _ROWS),)](
        remaining,
        exact,
        scales,
        moves.t().contiguous(),
        codes,
        errors,
        columns,
        rows,
        float(max_code),
        BLOCK=max(16, triton.next_power_of_2(columns)),
        ROWS=_ROWS,
        num_warps=4,
        enable_fp_fusion=False,
    )
