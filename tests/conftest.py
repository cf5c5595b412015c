"""Triton decides on import whether its kernels are compiled or interpreted: without a GPU, all of it is interpreted."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
