"""What is held on a device besides the block that computes: a whole model for a while, or hidden states."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from cloq_export.kernels.gpu import cuda

# Hidden states stay on an accelerator while they take less than this share of its free memory.
STORAGE_SHARE = 0.25


def place_of_states(device: torch.device, needed: int) -> torch.device:
    """Return where hidden states of so many bytes are kept: on a GPU that has much more, else in host memory."""
    if device.type == "cuda" and needed < STORAGE_SHARE * cuda().free_bytes(device):
        return device
    return device if device.type == "cpu" else torch.device("cpu")


def model_bytes(model: nn.Module) -> int:
    """Return what the parameters and buffers of a model take, in bytes, those that are shared once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors_of(model))


@contextlib.contextmanager
def lent(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Hold a model on a device for a while; its tensors in host memory stay, and are its own again afterwards.

    Args:
        model: it is only read meanwhile.
        device: where it is held.
    """
    tensors = _tensors_of(model)
    home = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, data in zip(tensors, home, strict=True):
            tensor.data = data


def _tensors_of(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
