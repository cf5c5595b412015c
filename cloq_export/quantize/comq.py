"""Coordinate descent after OPTQ: revisit codes one column at a time, and refit scales by least squares."""

from __future__ import annotations

import torch

from cloq_export.quantize.optq import BLOCK_COLUMNS, tile_columns


def sweep_codes(
    target: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    max_code: int,
    gram: torch.Tensor,
) -> torch.Tensor:
    """Return codes after one sweep of coordinate descent on `||(W - Q) H^(1/2)||_F^2` (COMQ).

    For column j with all others fixed the objective is a parabola in `q_j` with its minimum at
    `q_j + ((W - Q) H)_j / H_jj`; rounding that to the grid never raises the objective.

    Args:
        target: W, (out, in) float32.
        codes: starting codes, (out, in) uint8.
        scales: per column, (out, in) float32.
        zeros: per column, (out, in) float32 holding integers.
        max_code: `2**bits - 1`.
        gram: damped H, (in, in) float64 or float32, positive definite.

    Returns:
        Codes, (out, in) uint8.
    """
    in_features = target.shape[1]
    metric = gram.to(torch.float32)
    order = torch.argsort(metric.diagonal(), descending=True, stable=True)
    metric = metric[order][:, order].contiguous()
    column_scales = scales.t()[order].contiguous()
    column_zeros = zeros.t()[order].contiguous()
    current_codes = codes.t()[order].to(torch.float32)
    weight = target.t()[order].contiguous()
    diagonal = metric.diagonal().tolist()
    moves = torch.empty_like(weight)
    tile_width = tile_columns(weight.shape[1])
    residual = weight - (current_codes - column_zeros) * column_scales
    gradient = metric @ residual
    for block in range(0, in_features, BLOCK_COLUMNS):
        block_end = min(block + BLOCK_COLUMNS, in_features)
        for tile in range(block, block_end, tile_width):
            tile_end = min(tile + tile_width, block_end)
            for column in range(tile, tile_end):
                scale, code, move = column_scales[column], current_codes[column], moves[column]
                new_code = torch.div(gradient[column], scale * diagonal[column])
                new_code.add_(code).round_().clamp_(0, max_code)
                torch.sub(new_code, code, out=move)
                move.mul_(scale)
                code.copy_(new_code)
                gradient[column:tile_end].addr_(metric[column, column:tile_end], move, alpha=-1.0)
            if tile_end < block_end:
                gradient[tile_end:block_end].addmm_(
                    metric[tile:tile_end, tile_end:block_end].t(), moves[tile:tile_end], alpha=-1.0
                )
        if block_end < in_features:
            gradient[block_end:].addmm_(metric[block:block_end, block_end:].t(), moves[block:block_end], alpha=-1.0)
    result = torch.empty_like(current_codes)
    result[order] = current_codes
    return result.t().to(torch.uint8).contiguous()


def refit_scales(
    target: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, gram: torch.Tensor
) -> torch.Tensor:
    """Return the scales that minimise `||(W - Q) H^(1/2)||_F` for fixed codes and zeros.

    Every row is a least-squares problem in its groups' scales: with `c_g = codes - zeros` restricted to group g,
    `M s = b`, `M_gh = c_g H_gh c_h^T`, `b_g = c_g (H W^T)_g`. A scale that would turn zero or negative, or leave
    half to twice its old value, keeps its old value (its codes were chosen for that one). A row whose error would rise
    all the same, because some of its scales were kept or float16 rounds them, keeps all its old scales.

    Args:
        target: W, (out, in) float32.
        codes: (out, in) uint8.
        scales: (out, groups) float16.
        zeros: (out, groups) uint8.
        gram: damped H, (in, in) float, positive definite.

    Returns:
        Scales, (out, groups) float16.
    """
    out_features, in_features = codes.shape
    groups = scales.shape[1]
    span = in_features // groups
    metric = gram.to(torch.float32)
    centred = codes.to(torch.float32).view(out_features, groups, span) - zeros.to(torch.float32).unsqueeze(-1)
    correlation = (target @ metric).view(out_features, groups, span)
    right = (centred * correlation).sum(-1)
    left = torch.empty(out_features, groups, groups, dtype=torch.float32, device=codes.device)
    for group in range(groups):
        rows = metric[group * span : (group + 1) * span]
        left[:, group] = ((centred[:, group] @ rows).view(out_features, groups, span) * centred).sum(-1)
    old = scales.to(torch.float64)
    left64, right64 = left.to(torch.float64), right.to(torch.float64)
    exact = left64.clone()
    # A group whose codes all equal the zero says nothing about its scale: pin it to the old one.
    ridge = left64.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True) * 1e-6 + 1e-30
    left64.diagonal(dim1=1, dim2=2).add_(ridge)
    fitted = torch.linalg.solve(left64, right64 + ridge * old)
    keep = (fitted < 0.5 * old) | (fitted > 2.0 * old) | ~torch.isfinite(fitted)
    fitted = torch.where(keep, old, fitted).to(torch.float16).to(torch.float64)

    def objective(candidate: torch.Tensor) -> torch.Tensor:
        return (candidate * ((exact @ candidate.unsqueeze(-1)).squeeze(-1) - 2.0 * right64)).sum(-1, keepdim=True)

    return torch.where(objective(fitted) <= objective(old), fitted, old).to(torch.float16)
