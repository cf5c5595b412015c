"""The one place that chooses what computes: the native CPU library, Triton's kernels on a GPU, or torch.

Every question takes the tensors that would be computed with. Fake tensors and tensors of subclasses that only look like
memory are left to torch, as is everything on other devices.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util

import torch

from cloq_export.kernels.cpu import library
from cloq_export.kernels.gpu import cuda

# Where Triton's kernels run. Tests add "cpu", which its interpreter serves.
TRITON_DEVICES = {"cuda"}
# Below this compute capability Triton has no bfloat16 products.
_LEAST_CAPABILITY = (8, 0)
# Columns of a group up to which the kernels of `grid` and `prox` hold one in registers.
_MOST_COLUMNS = 1 << 15
_WIDTHS = (2, 3, 4, 8)
# Tokens that Triton's packed linears compute straight from the codes; for more, Q is made.
MOST_TOKENS = 64
# Triton's packed linears read whole units of so many inputs.
_UNIT = 32


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


def native_library(*tensors: torch.Tensor) -> ctypes.CDLL | None:
    """Return the native library if all tensors lie in plain CPU memory, else None.

    Raises:
        ValueError: the environment variable CLOQ_EXPORT_CPU_ISA names an instruction set that cannot be used.
    """
    if all(tensor.device.type == "cpu" and _is_plain(tensor) for tensor in tensors):
        return library.load()
    return None


def native_takes_layer(scales: torch.Tensor, *tensors: torch.Tensor) -> bool:
    """Return whether the native library computes a layer; its layout holds float16 scales.

    Args:
        scales: of the layer.
        tensors: its other tensors.

    Raises:
        ValueError: as `native_library`.
    """
    return scales.dtype == torch.float16 and native_library(scales, *tensors) is not None


@functools.cache
def has_triton() -> bool:
    """Return whether Triton is installed; it comes with torch's CUDA builds for Linux."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _is_capable(device: torch.device) -> bool:
    return device.type != "cuda" or cuda().capability(device) >= _LEAST_CAPABILITY


def triton_takes(*tensors: torch.Tensor | None) -> bool:
    """Return whether Triton's kernels compute with these tensors of one GPU; None is passed over."""
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        all(tensor.device.type in TRITON_DEVICES and _is_plain(tensor) for tensor in given)
        and len({tensor.device for tensor in given}) == 1
        and has_triton()
        and _is_capable(given[0].device)
    )


def triton_takes_groups(columns: int, *tensors: torch.Tensor) -> bool:
    """Return whether Triton's kernels of `grid` and `prox` compute with groups of so many columns."""
    return columns <= _MOST_COLUMNS and triton_takes(*tensors)


def triton_takes_layer(bits: int, in_features: int, groups: int, *tensors: torch.Tensor | None) -> bool:
    """Return whether Triton's kernels compute a layer; a group that is no multiple of 32 inputs is left to torch."""
    return bits in _WIDTHS and in_features // groups % _UNIT == 0 and triton_takes(*tensors)


def describe_gpu() -> str:
    """Return one line: whether the GPU's kernels are used, or why not; `kernels.cpu.describe` says it of the CPU."""
    if not cuda().count():
        return f"GPU kernels: none, because torch sees no GPU ({cuda().why_none()})."
    device = cuda().current_device()
    name = cuda().name(device)
    if not has_triton():
        return f"GPU kernels: the torch reference on {name}, because Triton is not installed; run pip install triton."
    if not _is_capable(device):
        found = ".".join(map(str, cuda().capability(device)))
        return f"GPU kernels: the torch reference on {name}, because its compute capability {found} is below 8.0."
    import triton

    return f"GPU kernels: Triton {triton.__version__} on {name}."
