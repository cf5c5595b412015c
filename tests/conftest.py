"""Where kernels and engines compute: Triton decides it on import, the engines of tests/vllm by an option."""

from __future__ import annotations

import gc
import os
import sys

import pytest
import torch

pytest_plugins = ("quantized_checkpoints", "tiny_causal_models", "tiny_runs")

# Without a GPU, all of Triton is interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Processes that test beside each other share the cores, and so do the ones that they start.
_beside = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _beside > 1:
    torch.set_num_threads(max(1, torch.get_num_threads() // _beside))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))

# No test pulls the plug of a machine, and waiting for a disk is a tenth of a run's time here.
os.fsync = lambda descriptor: None


# Modules that were imported when what they hold was last left out of collections.
_left_out = 0


def pytest_runtest_setup() -> None:
    """Leave what is imported by now out of later collections, which every run asks for; libraries import much late."""
    global _left_out
    if len(sys.modules) - _left_out > 100:
        gc.collect()
        gc.freeze()
        _left_out = len(sys.modules)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--device`, which says what the engines of tests/vllm compute on."""
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="what the engines of tests/vllm compute on; with cuda their environment needs a vLLM for NVIDIA GPUs",
    )
