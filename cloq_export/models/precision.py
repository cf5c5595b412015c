"""The arithmetic of forward passes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch

from cloq_export.errors import UsageError

Precision = Literal["float32", "bfloat16"]


@contextlib.contextmanager
def forward_precision(precision: Precision, device: torch.device | str) -> Iterator[None]:
    """Set the arithmetic of forward passes for a while, regardless of the settings outside.

    "float32" computes in the model's own dtype, with full-precision products. "bfloat16" lets a float32 model multiply
    in bfloat16 by torch's autocast: the residual stream and the norms stay float32. It costs some accuracy in every
    product and, with AMX, far less time.

    Args:
        precision: "float32" or "bfloat16".
        device: where the forward pass runs.
    """
    kind = torch.device(device).type
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        # No cache: it would keep the rounded copy of a weight that has been exchanged since.
        with torch.autocast(kind, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def has_fast_bfloat16(device: torch.device | str) -> bool:
    """Return whether `forward_precision("bfloat16")` saves time on a device (AMX or AVX-512 BF16, or a GPU)."""
    if torch.device(device).type != "cpu":
        return True
    probes = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(bool(probe()) for probe in probes if probe is not None)


def resolve_precision(model_dtype: torch.dtype, compute: torch.dtype | None) -> Precision:
    """Return the precision of a model's forward passes.

    Args:
        model_dtype: of its weights.
        compute: what its products are asked to be in; None is the model's own dtype.

    Raises:
        UsageError: a model of this dtype cannot compute so.
    """
    if compute in (None, model_dtype):
        return "float32"
    if model_dtype == torch.float32 and compute == torch.bfloat16:
        return "bfloat16"
    raise UsageError(
        f"the model is in {model_dtype}, so its forward pass cannot run in {compute}; allowed are `precision=auto`, "
        "float32 (load the model in float32) or bfloat16 (a float32 or bfloat16 model)."
    )
