"""A and B as their dtype holds them: where one leaves its range, a power of two moves to the other."""

from __future__ import annotations

import math

import torch

from cloq_export.types import LoraPair

# Largest loss of the product by entries below the smallest normal number, in units of the dtype's own rounding.
_ALLOWED_LOSS = 8.0


def stored_pair(
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    dtype: torch.dtype,
    *,
    alpha: float | None = None,
    input_energy: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
) -> LoraPair:
    """Return a pair in a dtype, `B A` as exact as the dtype allows.

    Ordinary factors are only cast. Where entries overflow, or those below the smallest normal number lose more than
    eight roundings of `||B A R^T||`, A is multiplied by the power of two that makes the largest entries of both alike,
    and B divided by it. A pair that still does not fit is kept in float32.

    Args:
        lora_a: A, (rank, in) float.
        lora_b: B, (out, rank) float.
        dtype: of the stored pair.
        alpha: LoRA alpha; None makes the scaling 1.
        input_energy: diag of `H = R^T R`, (in,) float64; None takes R = 1.
        seen: `A R^T`, (rank, k) float64, together with `input_energy`.

    Raises:
        NonFiniteError: the product is beyond float32.
    """
    moved = lora_a, lora_b
    if not _keeps(lora_a, lora_b, dtype, input_energy, seen):
        ratio = float(lora_b.abs().amax()) / (float(lora_a.abs().amax()) or math.inf)
        if ratio and math.isfinite(ratio):
            exponent = round(math.log2(ratio) / 2.0)
            factor = 2.0**exponent
            moved = lora_a.to(torch.float64) * factor, lora_b.to(torch.float64) / factor
            if not _keeps(*moved, dtype, input_energy, None if seen is None else seen * factor):
                dtype = torch.float32
    lora_a, lora_b = (factor.to(dtype).contiguous() for factor in moved)
    return LoraPair(lora_a, lora_b, float(lora_a.shape[0]) if alpha is None else alpha)


def _keeps(
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    dtype: torch.dtype,
    input_energy: torch.Tensor | None,
    seen: torch.Tensor | None,
) -> bool:
    """Return whether a dtype holds both factors: nothing overflows, and what is below its normal numbers is little."""
    wide_a, wide_b = lora_a.to(torch.float64), lora_b.to(torch.float64)
    seen = wide_a if seen is None else seen.to(torch.float64)
    lost = torch.zeros((), dtype=torch.float64, device=wide_a.device)
    for factor, outer in ((wide_a, False), (wide_b, True)):
        stored = factor.to(dtype)
        if not bool(torch.isfinite(stored).all()):
            return False
        small = factor.abs() < torch.finfo(dtype).tiny
        error = torch.where(small, stored.to(torch.float64) - factor, 0.0).square()
        if outer:
            lost = lost + (error.sum(0) * seen.square().sum(1)).sum()
        else:
            # Rounding errors of different inputs are independent, so only the diagonal of H counts.
            per_row = error.sum(1) if input_energy is None else error @ input_energy.to(torch.float64)
            lost = lost + (wide_b.square().sum(0) * per_row).sum()
    whole = (seen * ((wide_b.t() @ wide_b) @ seen)).sum()
    return float(lost) <= (_ALLOWED_LOSS * torch.finfo(dtype).eps) ** 2 * float(whole) or float(whole) == 0.0
