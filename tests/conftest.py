"""Where kernels and engines compute: Triton decides it on import, the engines of tests/vllm by an option."""

from __future__ import annotations

import os

import pytest
import torch

# Without a GPU, all of Triton is interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--device`, which says what the engines of tests/vllm compute on."""
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="what the engines of tests/vllm compute on; with cuda their environment needs a vLLM for NVIDIA GPUs",
    )
