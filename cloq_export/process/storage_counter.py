"""Count the memory that operations take, by the storages that they make; nothing need be in that memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class StorageCounter(TorchDispatchMode):
    """While it is active, counts the bytes that operations make and that are still held.

    It counts meta tensors as well, so that what a forward pass would take is known without the pass. What an operation
    takes inside of itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.in_use = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and enter what it has made."""
        result = func(*args, **(kwargs or {}))
        given = {each.untyped_storage()._cdata for each in tensors_in((*args, *(kwargs or {}).values()))}
        for made in tensors_in((result,)):
            storage = made.untyped_storage()
            if storage._cdata in given or storage._cdata in self._sizes:
                continue
            self._sizes[storage._cdata] = storage.nbytes()
            self.in_use += storage.nbytes()
            self.peak = max(self.peak, self.in_use)
            weakref.finalize(storage, self._forget, storage._cdata).atexit = False
        return result

    def _forget(self, key: int) -> None:
        self.in_use -= self._sizes.pop(key)


def tensors_in(values: Iterable[Any]) -> list[torch.Tensor]:
    """Return the tensors among the arguments or results of an operation, those in lists and tuples included."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found
