"""What stored codes and zeros show about how they were stored, when a file does not say so or is wrong.

Two facts are used here; neither is proof, since both rest on what weights usually look like.

A weight has about as much above zero as below, and `Q = scales * (codes - zeros)`. So the mean of `codes - zeros` over
a layer lies near 0, and it lies near 1 where the file holds `zeros - 1` (GPTQ version 1).

Codes of one channel hardly depend on each other. So of several ways to cut the same words into codes, the right one
gives the least entropy per code: cutting elsewhere only regroups the bits of independent codes, and the entropies of
parts never sum to less than that of the whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")

PLANE_BLOCK = 32

# How far the mean of codes - zeros may lie from 0 in a whole model for other reasons than the version, in steps:
# clipped ranges, rounding with error feedback.
_MODEL_BIAS = 0.12
# Odds of 1000 to 1 in natural logarithms.
_DECISIVE_ODDS = math.log(1000.0)
# Beyond this many standard errors from both readings, the numbers are explained by neither.
_FAR = 4.0
# Bits per code by which one reading must beat another.
_DECISIVE_ENTROPY = 0.02
_MIN_CODES = 1 << 13
_MAX_COUNTED = 1 << 20


@dataclasses.dataclass(frozen=True)
class LayerOffset:
    """Where the codes of one layer lie beside its stored zeros.

    Args:
        mean: of codes - stored zeros, in steps of the grid.
        standard_error: of the mean, from the scatter between output channels.
        slope: of the mean code of a group on its stored zero; 1 where they belong together, 0 where they have nothing
            to do with each other, None where the stored zeros hardly vary.
    """

    mean: float
    standard_error: float
    slope: float | None


@dataclasses.dataclass(frozen=True)
class ZeroOffset:
    """What the layers of a checkpoint say about how zeros are stored.

    Args:
        mean: of codes - stored zeros over layers, in steps of the grid.
        standard_error: of the mean: the scatter between layers, or between channels where that is larger.
        log_odds: natural logarithm of how much better "stored as they are" explains the mean than "stored less one".
        shift: 0 (stored as they are), 1 (stored less one), or None where the figures do not decide.
        explained: False where the mean is far from both.
        layers: number of layers.
    """

    mean: float
    standard_error: float
    log_odds: float
    shift: int | None
    explained: bool
    layers: int


def layer_offset(codes: torch.Tensor, zeros: torch.Tensor) -> LayerOffset:
    """Compare the codes of a layer with its stored zeros.

    Args:
        codes: (out, groups, columns of a group) uint8.
        zeros: (out, groups) uint8, as stored.

    Returns:
        LayerOffset: the figures.
    """
    group_means = codes.mean(dim=2, dtype=torch.float32).to(torch.float64)
    stored = zeros.to(torch.float64)
    channels = (group_means - stored).mean(dim=1)
    scatter = float(channels.std()) if channels.numel() > 1 else math.inf
    spread = stored - stored.mean()
    variance = float((spread * spread).mean())
    slope = None
    if variance > 0.05 and stored.numel() >= 64:
        slope = float((spread * (group_means - group_means.mean())).mean()) / variance
    return LayerOffset(float(channels.mean()), scatter / math.sqrt(channels.numel()), slope)


def zero_offset(layers: Sequence[LayerOffset]) -> ZeroOffset | None:
    """Decide from the layers of a checkpoint whether zeros are stored as they are or less one.

    With m the mean over layers and s^2 its variance plus that of a model's own bias, the two readings are compared by
    `log N(m; 0, s) - log N(m; 1, s) = (1 - 2 m) / (2 s^2)`.

    Args:
        layers: figures of the layers.

    Returns:
        ZeroOffset or None: the figures, None without a layer.
    """
    layers = [layer for layer in layers if math.isfinite(layer.standard_error)]
    if not layers:
        return None
    means = torch.tensor([layer.mean for layer in layers], dtype=torch.float64)
    within = math.sqrt(sum(layer.standard_error**2 for layer in layers)) / len(layers)
    between = float(means.std()) / math.sqrt(len(layers)) if len(layers) > 1 else 0.0
    error = max(within, between)
    mean = float(means.mean())
    total = math.hypot(error, _MODEL_BIAS)
    log_odds = (1 - 2 * mean) / (2 * total**2)
    explained = min(abs(mean), abs(mean - 1)) <= _FAR * total
    shift = None
    if explained and abs(log_odds) >= _DECISIVE_ODDS:
        shift = 0 if log_odds > 0 else 1
    return ZeroOffset(mean, error, log_odds, shift, explained, len(layers))


def position_counts(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Count codes by their place among 32 neighbours.

    Args:
        codes: (rows, columns) uint8; columns that do not fill a whole 32 are left out, and of many rows some.
        bits: width of a code.

    Returns:
        torch.Tensor: (32, 2**bits) int64.
    """
    blocks = codes.shape[1] // PLANE_BLOCK
    if not blocks or not codes.shape[0]:
        return torch.zeros(PLANE_BLOCK, 1 << bits, dtype=torch.int64)
    rows = max(1, _MAX_COUNTED // (blocks * PLANE_BLOCK))
    step = max(1, -(-codes.shape[0] // rows))
    chosen = codes[::step, : blocks * PLANE_BLOCK].reshape(-1, PLANE_BLOCK).to(torch.int64)
    keys = chosen + (torch.arange(PLANE_BLOCK) << bits)
    return torch.bincount(keys.reshape(-1), minlength=PLANE_BLOCK << bits).view(PLANE_BLOCK, 1 << bits)


def entropy_per_code(counts: torch.Tensor) -> float | None:
    """Return the mean entropy of a code given its place, in bits.

    Args:
        counts: as `position_counts` gives them, summed over layers.

    Returns:
        float or None: the entropy, None where too few codes were counted to compare readings.
    """
    if int(counts.sum()) < _MIN_CODES:
        return None
    shares = counts.to(torch.float64) / counts.sum(dim=1, keepdim=True).clamp(min=1)
    return float(-(shares * shares.clamp(min=1e-300).log2()).sum(dim=1).mean())


def least_entropy(entropies: dict[str, float | None]) -> str | None:
    """Return the reading whose codes have the least entropy, or None where none is clearly the least."""
    known = sorted((value, name) for name, value in entropies.items() if value is not None)
    if len(known) < 2 or len(known) < len(entropies) or known[1][0] - known[0][0] < _DECISIVE_ENTROPY:
        return None
    return known[0][1]


def unpack_planar_columns(words: torch.Tensor) -> torch.Tensor:
    """Return the 3-bit codes of columns of words in the planar order of GPTQModel's `gptq_p`.

    Of every three words the first two hold the low two bits of 32 codes, 16 to a word, and the third their high bits.

    Args:
        words: (3 n, out) int32.

    Returns:
        torch.Tensor: (out, 32 n) uint8.
    """
    count, out = words.shape[0] // 3, words.shape[1]
    planes = words.view(count, 3, out)
    codes = torch.empty(count, PLANE_BLOCK, out, dtype=torch.uint8)
    for place in range(PLANE_BLOCK):
        low = (planes[:, place // 16] >> (2 * (place % 16))) & 3
        high = (planes[:, 2] >> place) & 1
        codes[:, place] = (low | (high << 2)).to(torch.uint8)
    return codes.view(count * PLANE_BLOCK, out).t()


def spread_evenly(items: Sequence[Item], most: int) -> list[Item]:
    """Return at most so many items, spread over all of them, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    if most == 1:
        return [items[len(items) // 2]]
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def code_shares(counts: torch.Tensor) -> list[float]:
    """Return the share of each code, to four digits."""
    total = counts.sum(dim=0)
    return [round(share, 4) for share in (total / total.sum().clamp(min=1)).tolist()]


def add_counts(counts: Iterable[torch.Tensor], bits: int) -> torch.Tensor:
    """Return the sum of counts of several layers."""
    return sum(counts, start=torch.zeros(PLANE_BLOCK, 1 << bits, dtype=torch.int64))
