"""The matrices of a model's blocks stay in its files, and are read while their block is used.

A model that does not fit into memory is opened with placeholders for them: one number each, seen in the shape of the
matrix. Code that uses a block's weights holds it `in_memory`, and a call of the whole model does so by itself.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cloq_export.errors import FormatError, SourceError
from cloq_export.models.blocks import BlockList
from cloq_export.models.experts_on_disk import StoredMatrix
from cloq_export.models.loaded_weights import require_finite
from cloq_export.models.placeholders import placeholder

# Attributes that a model and its blocks are given.
_OF_MODEL, _OF_BLOCK = "_weights_on_disk", "_hold_weights"


class WeightsOnDisk:
    """Reads the matrices of a model's blocks, one block at a time, and the next one while a block is used.

    Args:
        source: name of the model, for messages.
        model: its matrices in blocks are placeholders; calls of its blocks read them from now on.
        blocks: its blocks.
        places: full name of each of these matrices -> where it lies in the files.
    """

    def __init__(self, source: str, model: nn.Module, blocks: BlockList, places: Mapping[str, StoredMatrix]) -> None:
        self.blocks = blocks
        self._source = source
        self._places = places
        self._states = {path: _state(path) for place in places.values() for path in place.paths}
        self._parameters = [
            {
                f"{blocks.prefix(index)}.{name}": parameter
                for name, parameter in block.named_parameters()
                if f"{blocks.prefix(index)}.{name}" in places
            }
            for index, block in enumerate(blocks)
        ]
        self._dtypes = {name: each.dtype for of_block in self._parameters for name, each in of_block.items()}
        self._factors: dict[str, list[torch.Tensor]] = {}
        self._users = [0] * len(blocks)
        self._reader = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._ahead: tuple[int, concurrent.futures.Future[dict[str, torch.Tensor]]] | None = None
        self._last = -1
        setattr(model, _OF_MODEL, self)
        for index, block in enumerate(blocks):
            vars(block)[_OF_BLOCK] = functools.partial(self._held, index)
            block.forward = _holding(block)

    def __contains__(self, name: str) -> bool:
        """Return whether a tensor of the model is one of these matrices."""
        return name in self._places

    def read(self, name: str) -> torch.Tensor:
        """Return one matrix as the model has it in memory while its block is used.

        Raises:
            SourceError: its file is gone, changed or damaged.
            NonFiniteError: it holds NaN or Inf.
        """
        place = self._places[name]
        try:
            for path in place.paths:
                if _state(path) != self._states[path]:
                    raise FormatError(f"{path} was changed since it was opened.")
            tensor = place.read(self._dtypes[name])
        except (FormatError, OSError) as error:
            raise SourceError(
                f"{name} of {self._source} cannot be read while the model is worked on: {error} Restore the model's "
                "files and run the same command again; finished layers are kept."
            ) from None
        require_finite(name, tensor)
        return functools.reduce(times, self._factors.get(name, ()), tensor)

    def multiply(self, name: str, factor: torch.Tensor) -> None:
        """Multiply a matrix by a factor for each row, (rows, 1), or each column, (columns), whenever it is read."""
        self._drop_ahead()
        self._factors.setdefault(name, []).append(factor)

    @contextlib.contextmanager
    def _held(self, index: int) -> Iterator[None]:
        if not self._users[index]:
            self._install(index)
        self._users[index] += 1
        try:
            yield
        finally:
            self._users[index] -= 1
            if not self._users[index]:
                for parameter in self._parameters[index].values():
                    parameter.data = placeholder(tuple(parameter.shape), parameter.dtype)

    def _install(self, index: int) -> None:
        if self._ahead is not None and self._ahead[0] == index:
            reading, self._ahead = self._ahead[1], None
            tensors = reading.result()
        else:
            self._drop_ahead()
            tensors = self._read_block(index)
        for name, parameter in self._parameters[index].items():
            parameter.data = tensors[name]
        following = index - 1 if index < self._last else index + 1
        self._last = index
        if 0 <= following < len(self._parameters):
            self._read_ahead(following)

    def _read_ahead(self, index: int) -> None:
        self._ahead = (index, self._reader.submit(self._read_block, index))

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            concurrent.futures.wait([self._ahead[1]])
            self._ahead = None

    def _read_block(self, index: int) -> dict[str, torch.Tensor]:
        return {name: self.read(name) for name in self._parameters[index]}


def weights_on_disk(model: nn.Module) -> WeightsOnDisk | None:
    """Return what reads the matrices of a model's blocks; None if they are in memory."""
    return getattr(model, _OF_MODEL, None)


def tensor_of(model: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of a model's state with its numbers, read from disk if they are not in memory."""
    weights = weights_on_disk(model)
    return tensor if weights is None or name not in weights else weights.read(name)


def in_memory(block: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Hold the weights of a block in memory for a while; nothing is to be done where they are.

    What is put in their place meanwhile is gone afterwards.
    """
    hold: Callable[[], contextlib.AbstractContextManager[None]] = vars(block).get(_OF_BLOCK, contextlib.nullcontext)
    return hold()


def times(weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return a weight times a factor, which is multiplied in float64, in the weight's dtype."""
    return (weight.to(torch.float64) * factor).to(weight.dtype)


def _holding(block: nn.Module) -> Callable[..., Any]:
    forward = block.forward

    @functools.wraps(forward)
    def hold_and_run(*args: Any, **kwargs: Any) -> Any:
        with in_memory(block):
            return forward(*args, **kwargs)

    return hold_and_run


def _state(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns
