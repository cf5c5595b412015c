"""OPTQ: round column by column and let the columns not yet rounded absorb the error."""

from __future__ import annotations

import torch

# Columns handled between two large matrix products; and the elements of a tile inside which columns are updated one
# by one: few enough that torch keeps them on one thread, which is quicker than sharing them out.
BLOCK_COLUMNS = 128
TILE_ELEMENTS = (1 << 15) - 1


def tile_columns(out_features: int) -> int:
    """Return how many columns of a layer with that many rows make a tile, between 4 and 32."""
    return min(32, max(4, TILE_ELEMENTS // max(1, out_features)))


def inverse_factor(gram: torch.Tensor) -> torch.Tensor:
    """Return the upper triangular U with `U^T U = H^-1`, the factor that OPTQ walks along (OPTQ, algorithm 1).

    One Cholesky factorisation of H with rows and columns reversed gives `H = V V^T` with V upper triangular, and
    `U = V^-1`: no inverse of H is formed, so little accuracy is lost on ill-conditioned matrices.

    Args:
        gram: H, (in, in) float64, positive definite.

    Returns:
        U, (in, in) float64.
    """
    upper = torch.linalg.cholesky(gram.flip(0, 1)).flip(0, 1)
    identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True)


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
    factor = inverse_factor(gram[order][:, order])
    # Divided by its pivot, a row moves the plain rounding error of its column, so no column has to divide its own.
    moves = (factor / factor.diagonal().unsqueeze(1)).to(torch.float32)
    # Transposed, one visited column is one contiguous row. Shifted by zero * scale, the grid starts at 0.
    column_scales = scales.t()[order].contiguous()
    remaining = torch.addcmul(weight.t()[order], zeros.t()[order], column_scales)
    codes = torch.empty_like(remaining)
    errors = torch.empty_like(remaining)
    # Row views made once: indexing a tensor costs as much as the arithmetic on a row.
    columns = list(zip(remaining.unbind(0), column_scales.unbind(0), codes.unbind(0), errors.unbind(0), strict=True))
    tile_width = tile_columns(weight.shape[0])
    for block in range(0, in_features, BLOCK_COLUMNS):
        block_end = min(block + BLOCK_COLUMNS, in_features)
        for tile in range(block, block_end, tile_width):
            tile_end = min(tile + tile_width, block_end)
            for column in range(tile, tile_end):
                current, scale, code, error = columns[column]
                torch.div(current, scale, out=code)
                code.round_().clamp_(0, max_code)
                torch.addcmul(current, code, scale, value=-1.0, out=error)
                if column + 1 < tile_end:
                    remaining[column + 1 : tile_end].addr_(moves[column, column + 1 : tile_end], error, alpha=-1.0)
            if tile_end < block_end:
                remaining[tile_end:block_end].addmm_(
                    moves[tile:tile_end, tile_end:block_end].t(), errors[tile:tile_end], alpha=-1.0
                )
        if block_end < in_features:
            remaining[block_end:].addmm_(moves[block:block_end, block_end:].t(), errors[block:block_end], alpha=-1.0)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.t().to(torch.uint8).contiguous()
