"""How float32 matrices are multiplied for a while: as they are, or with operands rounded where that is fast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch

# "highest" rounds nothing; "high" allows TF32 on GPUs; "medium" allows bfloat16 on CPUs that are quick at it too.
Precision = Literal["highest", "high", "medium"]


@contextlib.contextmanager
def float32_products(precision: Precision) -> Iterator[None]:
    """Multiply float32 matrices at a precision, process-wide for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
