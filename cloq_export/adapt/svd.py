"""LoRA pairs from the singular vectors of the weight error, without any calibration."""

from __future__ import annotations

import torch

from cloq_export.adapt.cloq import split_factors, truncated_svd
from cloq_export.adapt.stored import stored_pair
from cloq_export.errors import ShapeError
from cloq_export.types import LoraPair


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
            f"{min(weight.shape)} with `rank`."
        )
    factors = truncated_svd(weight.to(torch.float64) - quantized.to(torch.float64), rank)
    lora_b, right = split_factors(factors, "balanced")
    return stored_pair(right.t(), lora_b, dtype)
