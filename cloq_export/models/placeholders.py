"""What stands in a model for a matrix that is not in memory: one number, seen in the shape of the matrix."""

from __future__ import annotations

import torch


def placeholder(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return what stands for a matrix that is not in memory: NaN, so that no figure comes of it unnoticed."""
    return torch.full((), torch.nan, dtype=dtype).expand(shape)


def is_placeholder(tensor: torch.Tensor) -> bool:
    """Return whether a tensor stands for a matrix that is not in memory."""
    return tensor.ndim > 1 and tensor.numel() > 1 and not any(tensor.stride())
