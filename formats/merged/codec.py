"""Merge codes and adapter into plain weights, and describe what that lost; the rules stand in SPEC.md."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from cloq_export.errors import FormatError
from cloq_export.files.safe_json import read_json
from cloq_export.types import LoraPair, QuantizedLayer

MERGED_NAME = "cloq_merged.json"
MERGED_FORMAT = "cloq-merged"
FORMAT_VERSION = 1
MERGED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Rows of a weight are merged a block at a time: the float64 numbers of a large layer would need four times its memory.
_BLOCK_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What storing one kind of tensors in a dtype lost, measured on every number of them.

    Args:
        tensors: how many there are.
        max_relative: the largest `|stored - exact| / |exact|` of a number that is not zero; 1 means that a number
            became zero.
        max_norm: the largest `||stored - exact||_F / ||exact||_F` of a tensor.
        worst: the tensor with that norm; None if nothing was lost.
    """

    tensors: int = 0
    max_relative: float = 0.0
    max_norm: float = 0.0
    worst: str | None = None


def merged_blocks(layer: QuantizedLayer, pair: LoraPair | None) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield `Q + (alpha / rank) B A` a few rows at a time, exact up to the rounding of float64.

    Args:
        layer: codes (out, in), scales and zeros; a float16 scale times a small integer is exact in float64.
        pair: A (rank, in), B (out, rank); None adds nothing.

    Returns:
        (rows, (rows, in) float64 on the CPU) pairs that cover all rows.
    """
    for rows in _row_blocks(layer.out_features, layer.in_features):
        part = QuantizedLayer(layer.codes[rows], layer.scales[rows], layer.zeros[rows], layer.spec)
        yield rows, _added(part.dequantize(torch.float64).to("cpu"), rows, pair)


def float_blocks(tensor: torch.Tensor, pair: LoraPair | None) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield a float tensor, with a pair's product added, a few rows at a time.

    Args:
        tensor: any shape; one without dimensions is one block.
        pair: as in `merged_blocks`.

    Returns:
        (rows, these rows in float64 on the CPU) pairs that cover the tensor.
    """
    if tensor.ndim == 0:
        yield slice(None), tensor.to("cpu", torch.float64).reshape(())
        return
    for rows in _row_blocks(tensor.shape[0], math.prod(tensor.shape[1:])):
        yield rows, _added(tensor[rows].to("cpu", torch.float64), rows, pair)


def merged_record(
    base_fingerprint: str,
    dtype: torch.dtype,
    modules: Mapping[str, Any],
    rounding: Mapping[str, Rounding],
    adapter: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the content of cloq_merged.json; SPEC.md section 3.

    Args:
        base_fingerprint: of the quantized layers that went in.
        dtype: of the float tensors.
        modules: the merged modules.
        rounding: kind of tensor -> what was lost.
        adapter: "name", "sha256" and "modules" of the adapter that went in; None without one.
    """
    return {
        "format": MERGED_FORMAT,
        "format_version": FORMAT_VERSION,
        "base_fingerprint": base_fingerprint,
        "adapter": adapter,
        "dtype": str(dtype).removeprefix("torch."),
        "modules": sorted(modules),
        "rounding": {kind: dataclasses.asdict(lost) for kind, lost in rounding.items()},
    }


def is_record(path: Path) -> bool:
    """Return whether a file is the record of a merged export, of whatever version."""
    try:
        return read_json(path).get("format") == MERGED_FORMAT
    except FormatError:
        return False


def _added(block: torch.Tensor, rows: slice, pair: LoraPair | None) -> torch.Tensor:
    if pair is None:
        return block
    lora_a, lora_b = pair.lora_A.to("cpu", torch.float64), pair.lora_B[rows].to("cpu", torch.float64)
    return block + (lora_b @ lora_a) * pair.scaling


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _BLOCK_BYTES // (8 * max(1, columns)))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
