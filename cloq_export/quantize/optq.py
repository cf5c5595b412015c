"""OPTQ: round column by column and let the columns not yet rounded absorb the error."""

from __future__ import annotations

import torch

from cloq_export.kernels.dispatch import triton_takes

# Columns handled between two large matrix products; and the elements of a tile inside which columns are updated one
# by one: few enough that torch keeps them on one thread, which is faster than splitting them.
BLOCK_COLUMNS = 128
TILE_ELEMENTS = (1 << 15) - 1


def tile_columns(out_features: int) -> int:
    """Return how many columns of a layer with that many rows make a tile, between 4 and 32."""
    return min(32, max(4, TILE_ELEMENTS // max(1, out_features)))


def feedback_factor(gram: torch.Tensor, order: torch.Tensor | None = None) -> torch.Tensor:
    """Return the unit upper triangular M with `H = M diag(d) M^T`: column k mends `sum_(j<k) e_j M_jk` of the others.

    OPTQ (algorithm 1) walks along the Cholesky factor of H^-1. The same codes follow from H itself, because
    `||e H^(1/2)||^2 = sum_k d_k (e_k + sum_(j<k) e_j M_jk)^2` (OPTQ equals LDLQ, Chee et al., QuIP). One
    Cholesky factorisation of H with rows and columns reversed gives M: nothing is inverted, which is quicker and loses
    no accuracy on ill-conditioned matrices.

    Args:
        gram: H, (in, in) float64, positive definite.
        order: the order in which its rows and columns are taken, (in,) int64; None takes them as they are.

    Returns:
        M, (in, in) float64.
    """
    backwards = torch.arange(gram.shape[0], device=gram.device) if order is None else order
    backwards = backwards.flip(0)
    # Two matrices of this size at a time and no third: they are most of what a solve holds.
    lower = torch.linalg.cholesky(gram[backwards.unsqueeze(1), backwards])
    return lower.div_(lower.diagonal().clone()).flip(0, 1)


def processing_order(gram: torch.Tensor) -> torch.Tensor:
    """Return the column order of static act-order: descending diagonal of H, ties by position; (in,) int64."""
    return torch.argsort(gram.diagonal(), descending=True, stable=True)


def optq_codes(
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    max_code: int,
    gram: torch.Tensor,
) -> torch.Tensor:
    """Return codes that nearly minimise `||(W - Q) H^(1/2)||_F` for fixed scales and zeros (CLoQ eq. 3, by OPTQ).

    Columns are visited by descending `diag(H)` with the groups' parameters fixed beforehand, so the result is in the
    original column order and needs no `g_idx`. Rows are independent: layers that share H may be stacked.

    Args:
        weight: W, (out, in) float32.
        scales: per column, (out, in) float32.
        zeros: per column, (out, in) float32 holding integers.
        max_code: `2**bits - 1`.
        gram: damped H, (in, in) float64, positive definite.

    Returns:
        Codes, (out, in) uint8.
    """
    in_features = weight.shape[1]
    order = processing_order(gram)
    moves = feedback_factor(gram, order).to(torch.float32)
    # Transposed, one visited column is one contiguous row. Shifted by zero * scale, the grid starts at 0.
    column_scales = scales.t()[order].contiguous()
    original = torch.addcmul(weight.t()[order], zeros.t()[order], column_scales)
    remaining = original.clone()
    codes = torch.empty_like(remaining, dtype=torch.uint8)
    errors = torch.empty_like(remaining)
    walk = _walk_block
    if triton_takes(weight):
        from cloq_export.kernels.triton.optq import walk_block as walk
    for block in range(0, in_features, BLOCK_COLUMNS):
        block_end = min(block + BLOCK_COLUMNS, in_features)
        here = slice(block, block_end)
        results = (codes[here], errors[here])
        walk(remaining[here], original[here], column_scales[here], moves[here, here], max_code, results)
        if block_end < in_features:
            remaining[block_end:].addmm_(moves[block:block_end, block_end:].t(), errors[block:block_end])
    result = torch.empty_like(codes)
    result[order] = codes
    return result.t().contiguous()


def _walk_block(
    remaining: torch.Tensor,
    exact: torch.Tensor,
    scales: torch.Tensor,
    moves: torch.Tensor,
    max_code: int,
    results: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Choose the codes of a block of columns, as `kernels.triton.optq.walk_block` does; `remaining` is used up."""
    codes, errors = results
    width, out_features = remaining.shape
    chosen = torch.empty_like(remaining)
    # Row views made once: indexing a tensor costs as much as the arithmetic on a row.
    columns = list(zip(*(tensor.unbind(0) for tensor in (remaining, exact, scales, chosen, errors)), strict=True))
    tile_width = tile_columns(out_features)
    for tile in range(0, width, tile_width):
        tile_end = min(tile + tile_width, width)
        for column in range(tile, tile_end):
            wanted, original, scale, code, error = columns[column]
            torch.div(wanted, scale, out=code)
            code.round_().clamp_(0, max_code)
            torch.addcmul(original, code, scale, value=-1.0, out=error)
            if column + 1 < tile_end:
                remaining[column + 1 : tile_end].addr_(moves[column, column + 1 : tile_end], error)
        if tile_end < width:
            remaining[tile_end:].addmm_(moves[tile:tile_end, tile_end:].t(), errors[tile:tile_end])
    codes.copy_(chosen)
