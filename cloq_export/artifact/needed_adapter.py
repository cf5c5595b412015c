"""Codes that were made for what an adapter leaves of the weights: what is said of them, and where they are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from cloq_export.errors import UsageError


class CodedBase(Protocol):
    """Quantized layers in a folder: a checkpoint or an ONNX export."""

    @property
    def folder(self) -> Path: ...

    @property
    def needs_adapter(self) -> bool: ...


# Completes a sentence on a base.
WHY = "its codes were made for what its adapter leaves of the weights (low rank first), so alone they say nothing"
NOTE = f"this base needs its adapter: {WHY}"


def refuse_alone(base: CodedBase, remedy: str) -> None:
    """Refuse a base that needs its adapter where it would answer, or be learned over, without it.

    Args:
        base: that is to be used alone.
        remedy: what to do instead, for the message.

    Raises:
        UsageError: it needs its adapter.
    """
    if base.needs_adapter:
        raise UsageError(f"{base.folder} needs its adapter: {WHY}; {remedy}.")
