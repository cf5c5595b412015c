"""Bring a model's blocks to a device one at a time, the next one while the current one computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from cloq_export.kernels.gpu import cuda
from cloq_export.models.blocks import BlockList
from cloq_export.models.placeholders import is_placeholder


class BlockMover:
    """Lends blocks to a device: their tensors are copied there, and put back afterwards.

    On a GPU the copies of the next block run on a stream of their own, from page-locked memory, during the work of the
    current block. What a borrower changed (a parameter's data put in the place of others, or written into through the
    parameter) is copied back; what it left alone is not, because the original still stands in host memory.

    Args:
        blocks: the model's blocks.
        device: where they are lent to.
    """

    def __init__(self, blocks: BlockList, device: torch.device) -> None:
        self._blocks = blocks
        self._device = device
        self._stream = cuda().make_stream(device) if device.type == "cuda" else None
        self._ahead: tuple[int, dict[str, torch.Tensor]] | None = None

    @contextlib.contextmanager
    def lent(self, index: int) -> Iterator[None]:
        """Hold one block on the device, and begin to copy the next one."""
        tensors = _tensors_of(self._blocks.modules[index])
        if self._ahead is None or self._ahead[0] != index:
            self._ahead = (index, self._copy(tensors))
        copies = self._ahead[1]
        self._ahead = None
        if self._stream is not None:
            current = cuda().current_stream(self._device)
            current.wait_stream(self._stream)
            for copy in copies.values():
                # Made on the other stream: its memory must not be given away while this one still reads it.
                copy.record_stream(current)
        home = {name: tensor.data for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            tensor.data = copies[name]
        versions = {name: tensor._version for name, tensor in tensors.items()}
        if self._stream is not None and index + 1 < len(self._blocks):
            following = _tensors_of(self._blocks.modules[index + 1])
            # A block that is still on disk is read by the code that holds this one.
            if not any(map(is_placeholder, following.values())):
                self._ahead = (index + 1, self._copy(following))
        try:
            yield
        finally:
            for name, tensor in tensors.items():
                same = tensor.data.data_ptr() == copies[name].data_ptr()
                untouched = same and tensor._version == versions[name]
                tensor.data = home[name] if untouched else tensor.data.to(home[name].device)

    def _copy(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self._stream is None:
            return {name: tensor.data.to(self._device, copy=True) for name, tensor in tensors.items()}
        with cuda().on_stream(self._stream):
            return {
                name: (tensor.data if tensor.data.is_pinned() or tensor.data.is_cuda else tensor.data.pin_memory()).to(
                    self._device, non_blocking=True, copy=True
                )
                for name, tensor in tensors.items()
            }


def _tensors_of(block: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by name; one that stands in two places comes once."""
    return {**dict(block.named_parameters()), **dict(block.named_buffers())}
