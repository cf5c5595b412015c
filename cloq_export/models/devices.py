"""Which device computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from cloq_export.errors import UsageError
from cloq_export.kernels.gpu import cuda


def chosen_device(asked: str) -> torch.device:
    """Return the device that an option `device` asks for.

    Args:
        asked: "cpu", "cuda", "cuda:N", or "auto", which takes CUDA where there is one.

    Raises:
        UsageError: CUDA is asked for and there is none.
    """
    if asked == "auto":
        return torch.device("cuda" if cuda().count() else "cpu")
    device = torch.device(asked)
    if device.type == "cuda" and not cuda().count():
        raise UsageError(
            f"`device={asked}` was asked for, but torch sees no CUDA device: {cuda().why_none()}; use `device=cpu`, or "
            "install a driver and a torch that fit each other."
        )
    if device.type == "cuda" and (device.index or 0) >= cuda().count():
        raise UsageError(
            f"`device={asked}` was asked for, but torch sees {cuda().count()} CUDA devices, from cuda:0 on; name one "
            "of these, or use `device=auto`."
        )
    return device


@contextlib.contextmanager
def limited(device: torch.device, most: int | None) -> Iterator[None]:
    """Take no more than so many bytes of a GPU's memory for a while; of each GPU, where the device is not numbered.

    Args:
        device: other kinds have no limit.
        most: bytes; None is all that is free.
    """
    if device.type != "cuda" or not most:
        yield
        return
    numbers = range(cuda().count()) if device.index is None else (device.index,)
    devices = [torch.device("cuda", number) for number in numbers]
    try:
        for each in devices:
            cuda().limit(each, most)
        yield
    finally:
        for each in devices:
            cuda().limit(each, None)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter, the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
