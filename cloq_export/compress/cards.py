"""GPUs by what their makers publish: the rates that a count of operations is held against."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

# How a kernel multiplies: operands of 16 bits on the matrix units, float32 rounded to TF32 on them, float32 as it is,
# and float64, on the matrix units where a card has them for it.
Arithmetic = Literal["half", "tf32", "float32", "float64"]


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU and its published peaks, without sparsity.

    Args:
        name: as people call it.
        operations: arithmetic -> operations per second; a multiplication and an addition are two.
        memory: bytes per second of its memory.
        link: bytes per second from the host, one way.
        source: where the figures stand.
    """

    name: str
    operations: Mapping[Arithmetic, float]
    memory: float
    link: float
    source: str


_HOPPER: dict[Arithmetic, float] = {"half": 989e12, "tf32": 494e12, "float32": 67e12, "float64": 67e12}
CARDS = (
    Card("H100", _HOPPER, 3.35e12, 64e9, "NVIDIA H100 datasheet, SXM"),
    Card("H200", _HOPPER, 4.8e12, 64e9, "NVIDIA H200 datasheet, SXM"),
    Card(
        "A100",
        {"half": 312e12, "tf32": 156e12, "float32": 19.5e12, "float64": 19.5e12},
        2.04e12,
        32e9,
        "NVIDIA A100 datasheet, 80 GB, SXM",
    ),
    Card(
        "RTX 4090",
        {"half": 165e12, "tf32": 82.6e12, "float32": 82.6e12, "float64": 1.29e12},
        1.008e12,
        32e9,
        "NVIDIA Ada GPU architecture, appendix A; float64 at 1/64 of float32",
    ),
)
