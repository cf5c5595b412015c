"""Choose scales and zeros: the integer grid that a group of weights is rounded to."""

from __future__ import annotations

import torch

from cloq_export.errors import NonFiniteError
from cloq_export.kernels.dispatch import triton_takes_groups
from cloq_export.types import QuantSpec

# The search judges a grid by the sum of |error|^2.5: between the mean square, which lets rare large weights pass,
# and the maximum, which ignores all others. 2.5 and not the 2.4 of GPTQ's own search because x^2 * sqrt(x) costs far
# less than a general power.
SEARCH_RANGE_FRACTIONS = tuple(1.0 - 0.06 * step for step in range(12))
SEARCH_REFINEMENT = (-0.03, 0.03, -0.015, 0.015)

# Elements that one pass of the search touches: small enough that its temporaries stay in the cache.
SEARCH_CHUNK_ELEMENTS = 1 << 17

# What is stored is a normal float16 number: some readers take smaller ones for zero.
SMALLEST_SCALE = 2.0**-14
LARGEST_SCALE = 65504.0


def round_to_grid(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, max_code: int) -> torch.Tensor:
    """Return the nearest codes, `clip(round(W / scale) + zero, 0, max_code)` (CLoQ section 2, integer quantizer).

    Args:
        weight: W, any shape, float.
        scales: broadcastable to `weight`, float, positive.
        zeros: broadcastable to `weight`, float holding integers.
        max_code: `2**bits - 1`.

    Returns:
        Codes as floats holding integers, shape of `weight`.
    """
    return torch.clamp(torch.round(weight / scales) + zeros, 0, max_code)


def _representable(scales: torch.Tensor) -> torch.Tensor:
    """Return scales as the layouts store them (float16, normal numbers), in float32."""
    return scales.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float16).to(torch.float32)


def _grid_for_range(
    low: torch.Tensor, high: torch.Tensor, spec: QuantSpec, shrink: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scales, zeros) that span `low..high`, or a share of it, both float32; `low <= 0 <= high`."""
    if spec.symmetric:
        reach = torch.maximum(-low, high)
        scales = _representable(shrink * (2.0 * reach / spec.max_code))
        return scales, torch.full_like(scales, float(2 ** (spec.bits - 1)))
    scales = _representable(shrink * ((high - low) / spec.max_code))
    return scales, torch.clamp(torch.round(-low / scales), 0, spec.max_code)


def _search_error(groups: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, max_code: int) -> torch.Tensor:
    codes = torch.round(groups / scales.unsqueeze(-1)).add_(zeros.unsqueeze(-1)).clamp_(0, max_code)
    error = codes.sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1)).sub_(groups).abs_()
    return (error.square() * error.sqrt()).sum(-1)


def _search_chunk(groups: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Search one chunk of groups, (n, span) float32; return (scales, zeros), (n,) float32 each."""
    low = groups.amin(-1).clamp_max(0.0)
    high = groups.amax(-1).clamp_min(0.0)
    best_error = torch.full_like(low, torch.inf)
    best_scales, best_zeros = _grid_for_range(low, high, spec)
    best_fraction = torch.ones_like(low)

    def consider(fraction: torch.Tensor) -> None:
        nonlocal best_error, best_scales, best_zeros, best_fraction
        scales, zeros = _grid_for_range(low * fraction, high * fraction, spec)
        error = _search_error(groups, scales, zeros, spec.max_code)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = torch.where(better, scales, best_scales)
        best_zeros = torch.where(better, zeros, best_zeros)
        best_fraction = torch.where(better, fraction, best_fraction)

    for fraction in SEARCH_RANGE_FRACTIONS:
        consider(torch.full_like(low, fraction))
    for offset in SEARCH_REFINEMENT:
        consider(best_fraction + offset)
    return best_scales, best_zeros


def fit_grid(
    weight: torch.Tensor, spec: QuantSpec, method: str = "searched", shrink: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales and zeros of every group of one weight.

    `minmax` spans the group's range including zero: `scale = shrink * (max - min) / (2**bits - 1)`, `zero = round(-min
    / scale)` (CLoQ section 2; MagR's authors shrink the step so, and take the zero for the shrunk one). `searched`
    shrinks that range by the fraction that leaves the least sum of `|W - Q|**2.5` over the group. Scales are rounded
    to float16 before they are judged.

    Args:
        weight: W, (out, in) float32.
        spec: bits, group size, symmetric or not.
        method: "searched" or "minmax".
        shrink: beta of MagR's authors, above 0 and at most 1; "searched" does not look at it.

    Returns:
        Scales (out, groups) float16 and zeros (out, groups) uint8.

    Raises:
        NonFiniteError: a weight is NaN or Inf, or too large for a float16 scale.
        ShapeError: in is not divisible by the group size.
    """
    out_features, in_features = weight.shape
    groups = weight.reshape(out_features * spec.group_count(in_features), spec.columns_per_group(in_features))
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError("a weight is NaN or Inf; repair the source model before quantizing it.")
    if weight.numel() and float(weight.abs().amax()) > LARGEST_SCALE:
        raise NonFiniteError(
            f"a weight of magnitude {float(weight.abs().amax()):.3g} cannot be scaled in float16 (largest "
            f"{LARGEST_SCALE:.0f}); leave this layer in float with `overrides='MODULE:skip=true'`."
        )
    shape = (out_features, spec.group_count(in_features))
    if method == "searched" and triton_takes_groups(groups.shape[1], weight):
        from cloq_export.kernels.triton.grid import search_grid

        scales, zeros = search_grid(
            groups.contiguous(),
            spec.max_code,
            SEARCH_RANGE_FRACTIONS,
            SEARCH_REFINEMENT,
            (SMALLEST_SCALE, LARGEST_SCALE),
            symmetric=spec.symmetric,
        )
        return scales.view(shape).to(torch.float16), zeros.view(shape).to(torch.uint8)
    scales = torch.empty(groups.shape[0], dtype=torch.float32, device=weight.device)
    zeros = torch.empty_like(scales)
    chunk = max(1, SEARCH_CHUNK_ELEMENTS // groups.shape[1]) if weight.device.type == "cpu" else groups.shape[0]
    for start in range(0, groups.shape[0], chunk):
        piece = groups[start : start + chunk]
        if method == "searched":
            fitted = _search_chunk(piece, spec)
        else:
            fitted = _grid_for_range(piece.amin(-1).clamp_max(0.0), piece.amax(-1).clamp_min(0.0), spec, shrink)
        scales[start : start + chunk], zeros[start : start + chunk] = fitted
    return scales.view(shape).to(torch.float16), zeros.view(shape).to(torch.uint8)


def raise_zeros(
    scales: torch.Tensor, zeros: torch.Tensor, spec: QuantSpec, least: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return grids whose zeros are at least `least`; a group that loses codes keeps its range.

    Args:
        scales: (out, groups) float16.
        zeros: (out, groups) uint8.
        spec: bits, group size, symmetric or not.
        least: 0 changes nothing; 1 is for a layout that stores `zero - 1`.

    Returns:
        Scales (out, groups) float16 and zeros (out, groups) uint8.
    """
    low = zeros < least
    if not bool(low.any()):
        return scales, zeros
    wider = scales.to(torch.float32) * ((spec.max_code - zeros.to(torch.float32)) / (spec.max_code - least))
    return torch.where(low, _representable(wider).to(torch.float16), scales), zeros.clamp_min(least)
