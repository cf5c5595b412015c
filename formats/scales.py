"""Scales as files hold them: in float16, or in another float dtype as other writers have them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cloq_export.errors import FormatError
from cloq_export.files.safe_tensors import require_tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def read_scales(
    tensors: Mapping[str, torch.Tensor], part: str, shape: tuple[int, ...], *, name: str = "layer"
) -> torch.Tensor:
    """Return the scales of one layer in float16, converted without loss or not at all.

    Args:
        tensors: of the layer.
        part: the tensor that holds scales.
        shape: the only one allowed.
        name: the layer, for messages.

    Returns:
        Tensor: float16 of that shape, every entry positive and finite.

    Raises:
        FormatError: the tensor is missing, has another shape or no float dtype; a scale is no positive number, or no
            float16 number.
    """
    scales = require_tensor(tensors, part, source=name, shape=shape)
    if scales.dtype not in _DTYPES:
        raise FormatError(f"{name}: {part} is {scales.dtype}; expected {_DTYPES[0]}.")
    if not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise FormatError(f"{name}: a scale is NaN, Inf, zero or negative; every scale must be a positive number.")
    half = scales.to(torch.float16)
    changed = half.to(torch.float32) != scales.to(torch.float32)
    if bool(changed.any()):
        raise FormatError(
            f"{name}: {int(changed.sum())} of {scales.numel()} scales, which are {scales.dtype}, are no float16 "
            f"numbers (the first is {float(scales[changed][0])!r}); scales are kept in float16 and converted without "
            "loss or not at all: quantize again with float16 scales."
        )
    return half
