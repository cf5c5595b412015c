"""Which weights a grid cannot hold because its scales are float16 numbers, and how much of a layer they are."""

from __future__ import annotations

import math

import torch

from cloq_export.quantize.grid import LARGEST_SCALE, SMALLEST_SCALE
from cloq_export.types import QuantSpec

# A layer may lose this share of its squared norm, a tenth of its norm.
LOST_SHARE = 0.01
# A layer that loses more than this is refused without measuring the error of its other groups.
_MOST = 0.25

# A group is lost if the smallest stored scale is so many times what its range asks for, and the error of its steps is
# above that share of its root mean square: with many codes, twice the scale may still be fine enough.
_COARSER, _COARSER_AT_2_BITS = 2.0, 1.5
_LARGEST_ERROR = 0.02
# Weights up to here leave room for the steps that change them before they are rounded, and for the ends of a symmetric
# grid.
_LARGEST_WEIGHT = LARGEST_SCALE / 2.0


def lost_groups(weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Return which groups have weights that are too small for every scale that is stored.

    With `s` the scale that a group's range asks for and `t` the smallest stored one: `t > 2 s` (at 2 bits `1.5 s`, as
    that leaves as little), and a step's error `t / sqrt(12)` above a fiftieth of the group's root mean square. A group
    of zeros loses nothing.

    Args:
        weight: W, (out, in) float.
        spec: bits, group size, symmetric or not.

    Returns:
        torch.Tensor: (out, groups) bool.
    """
    groups = _in_groups(weight, spec)
    scales = _wanted_scales(groups, spec)
    lost = (scales < SMALLEST_SCALE / _coarser(spec)) & (scales > 0)
    if bool(lost.any()):
        size = groups[lost].to(torch.float64).square().mean(-1).sqrt()
        lost[lost.clone()] = SMALLEST_SCALE / math.sqrt(12.0) > _LARGEST_ERROR * size
    return lost


def lost_energy(weight: torch.Tensor, lost: torch.Tensor) -> torch.Tensor:
    """Return W with everything but its lost groups zero, squared, (out, in) float64.

    Args:
        weight: W, (out, in) float.
        lost: from `lost_groups`.
    """
    spread = lost.repeat_interleave(weight.shape[1] // lost.shape[1], dim=1)
    return weight.to(torch.float64).square() * spread


def exceeds_float16(weight: torch.Tensor) -> bool:
    """Return whether weights are too large for readers that hold a weight in float16."""
    return bool(weight.numel()) and float(weight.abs().amax()) > _LARGEST_WEIGHT


def reach_fault(weight: torch.Tensor, spec: QuantSpec) -> str | None:
    """Return why a grid cannot hold a weight, in plain words, or None if it can.

    Args:
        weight: W, (out, in) float.
        spec: bits, group size, symmetric or not.
    """
    if exceeds_float16(weight):
        return (
            f"its weights reach {float(weight.abs().amax()):.3g}, and codes with float16 scales hold them safely up to "
            f"{_LARGEST_WEIGHT:.0f}"
        )
    lost = lost_groups(weight, spec)
    if not bool(lost.any()):
        return None
    groups = _in_groups(weight, spec)
    energy = groups.to(torch.float64).square().sum(-1)
    share = float(energy[lost].sum() / energy.sum())
    if share <= LOST_SHARE:
        return None
    if share <= _MOST:
        # Other groups may be barely fine enough, so the error of all groups together decides.
        scales = _wanted_scales(groups, spec)
        of_step = groups.shape[-1] / 12.0
        wanted, stored = (
            float(torch.minimum(energy, of_step * step.square()).sum())
            for step in (scales, scales.clamp_min(SMALLEST_SCALE))
        )
        if stored <= _coarser(spec) ** 2 * wanted:
            return None
    size = float((energy.sum() / weight.numel()).sqrt())
    return (
        f"its weights (root mean square {size:.3g}) are too small for {spec.bits} bits: groups with "
        f"{math.sqrt(share):.0%} of its norm need scales below those of a normal float16 number"
    )


def _coarser(spec: QuantSpec) -> float:
    return _COARSER_AT_2_BITS if spec.bits == 2 else _COARSER


def _in_groups(weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    return weight.reshape(weight.shape[0], spec.group_count(weight.shape[1]), -1)


def _wanted_scales(groups: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Return the scales that the ranges of groups ask for, (out, groups) float64: they may be below float32's range."""
    low, high = groups.amin(-1).clamp_max(0.0).to(torch.float64), groups.amax(-1).clamp_min(0.0).to(torch.float64)
    return (2.0 * torch.maximum(-low, high) if spec.symmetric else high - low) / spec.max_code
