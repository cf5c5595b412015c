"""Triton kernels for GPUs: packed linears, dequantization, and the inner loops of calibration and quantization.

Nothing here is imported before the first tensor on a GPU asks for it, so that machines without Triton are as well
served as before: `usable_for` says whether these kernels compute, and everything falls back to torch where it says no.
The kernels that decide bytes on disk (`gram`, `optq`, `grid`, `prox`) have one fixed shape each, so that the same
inputs give the same bytes; those of `linear` and `dequantize` are tuned on the machine that they run on, once, and
the choice is kept in Triton's cache folder.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

# Below this compute capability Triton has no bfloat16 products.
_LEAST_CAPABILITY = (8, 0)
# Columns of a group up to which `grid` and `prox` hold one in registers.
MOST_COLUMNS = 1 << 15
# Where the kernels run. Tests add "cpu", which Triton's interpreter serves.
DEVICE_TYPES = {"cuda"}


@functools.cache
def available() -> bool:
    """Return whether Triton is installed; it comes with torch's CUDA builds for Linux."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capable(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


def usable_for(*tensors: torch.Tensor | None) -> bool:
    """Return whether the kernels compute with these tensors: plain memory of one GPU that Triton knows.

    Fake tensors and tensors of subclasses that only look like memory are left to torch; None is passed over.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        all(tensor.device.type in DEVICE_TYPES for tensor in given)
        and len({tensor.device for tensor in given}) == 1
        and all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in given)
        and available()
        and _capable(given[0].device)
    )


def describe() -> str:
    """Return one line: whether the GPU's kernels are used, or why not."""
    if not torch.cuda.is_available():
        return "GPU kernels: none, because torch sees no GPU."
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    if not available():
        return f"GPU kernels: the torch reference on {name}, because Triton is not installed; run pip install triton."
    if not _capable(device):
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"GPU kernels: the torch reference on {name}, because its compute capability {found} is below 8.0."
    import triton

    return f"GPU kernels: Triton {triton.__version__} on {name}."
