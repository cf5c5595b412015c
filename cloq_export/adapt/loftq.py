"""What CLoQ is compared with: LoRA pairs from the singular vectors of the weight error, without any calibration."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cloq_export.adapt.cloq import split_factors, truncated_svd
from cloq_export.adapt.stored import stored_pair
from cloq_export.errors import ShapeError
from cloq_export.types import LoraPair, QuantizedLayer

# What LoftQ runs by default, as the CLoQ paper (section 3.2) notes.
LOFTQ_ITERATIONS = 5
# LQ-LoRA ends by itself, mostly after five to ten.
LQ_LORA_ITERATIONS = 50


def init_svd(
    weight: torch.Tensor, quantized: torch.Tensor, rank: int, *, dtype: torch.dtype = torch.float16
) -> LoraPair:
    """Return the pair that minimises `||W - Q - B A||_F`, its singular values shared evenly by A and B.

    Args:
        weight: W, (out, in) float.
        quantized: Q, (out, in) float.
        rank: 1 <= rank <= min(out, in).
        dtype: of the stored pair; float32 is taken where it cannot hold the pair.

    Returns:
        LoraPair: scaling 1.

    Raises:
        ShapeError: rank is out of range or shapes disagree.
        NonFiniteError: the pair does not fit float32.
    """
    if weight.shape != quantized.shape or not 1 <= rank <= min(weight.shape):
        raise ShapeError(
            f"rank {rank} does not fit W {tuple(weight.shape)} and Q {tuple(quantized.shape)}; choose 1 to "
            f"{min(weight.shape)} with --rank."
        )
    found = truncated_svd(weight.to(torch.float64) - quantized.to(torch.float64), rank)
    lora_b, right = split_factors(found, "balanced")
    return stored_pair(right.t(), lora_b, dtype)


def init_loftq(
    weight: torch.Tensor,
    quantize: Callable[[torch.Tensor], QuantizedLayer],
    rank: int,
    *,
    iterations: int = LOFTQ_ITERATIONS,
    dtype: torch.dtype = torch.float16,
) -> tuple[QuantizedLayer, LoraPair]:
    """Return codes and pair by alternating minimisation of `||W - Q - B A||_F` (LoftQ, arXiv 2310.08659, Algorithm 1).

    `Q_t = q(W - B_{t-1} A_{t-1})` and `B_t A_t = SVD_r(W - Q_t)`, from `B_0 A_0 = 0`.

    Args:
        weight: W, (out, in) float32.
        quantize: q, from a weight to its codes on the grid.
        rank: 1 <= rank <= min(out, in).
        iterations: T, at least 1.
        dtype: of the stored pair; the iteration itself does not round the pair.

    Raises:
        ShapeError: rank is out of range.
        NonFiniteError: the pair does not fit float32.
    """
    product = torch.zeros_like(weight)
    for iteration in range(iterations):
        layer = quantize(weight - product)
        last = iteration + 1 == iterations
        pair = init_svd(weight, layer.dequantize(), rank, dtype=dtype if last else torch.float32)
        product = pair.product()
    return layer, pair


def init_lq_lora(
    weight: torch.Tensor,
    quantize: Callable[[torch.Tensor], QuantizedLayer],
    rank: int,
    *,
    iterations: int = LQ_LORA_ITERATIONS,
    dtype: torch.dtype = torch.float16,
) -> tuple[QuantizedLayer, LoraPair]:
    """Return codes and pair by the alternation of LQ-LoRA (arXiv 2311.12023, Algorithm 1), without its Fisher weights.

    `B_t A_t = SVD_r(W - Q_{t-1})` and `Q_t = q(W - B_t A_t)`, from `Q_0 = 0`, until `||W - Q_t - B_t A_t||_F` rises.

    Args:
        weight: W, (out, in) float32.
        quantize: q, from a weight to its codes on the grid.
        rank: 1 <= rank <= min(out, in).
        iterations: at most so many.
        dtype: of the stored pair; the iteration itself does not round the pair.

    Returns:
        The last codes and pair before the error rose.

    Raises:
        ShapeError: rank is out of range.
        NonFiniteError: the pair does not fit float32.
    """
    dequantized, smallest = torch.zeros_like(weight), float("inf")
    for _ in range(iterations):
        before = dequantized
        product = init_svd(weight, before, rank, dtype=torch.float32).product()
        found = quantize(weight - product)
        dequantized = found.dequantize()
        error = float((weight - dequantized - product).norm())
        if error >= smallest:
            break
        smallest, layer, origin = error, found, before
    return layer, init_svd(weight, origin, rank, dtype=dtype)
