"""What a model passes to its blocks and gets from them, besides the hidden states."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from cloq_export.errors import UnsupportedModelError


class BlockArguments:
    """What a block receives besides the hidden states."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], keyword: str | None) -> None:
        self.args = args
        self.kwargs = kwargs
        self.keyword = keyword

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, BlockArguments]:
        """Return (hidden states, the other arguments) of a call."""
        if args:
            return args[0], cls(args[1:], kwargs, None)
        rest = dict(kwargs)
        return rest.pop("hidden_states"), cls((), rest, "hidden_states")

    def map(
        self,
        change: Callable[[torch.Tensor], torch.Tensor],
        beside: WrittenBeside | None = None,
    ) -> BlockArguments:
        """Return the arguments with every tensor changed.

        Args:
            change: what is done to a tensor.
            beside: what the block before wrote, which takes the place of the shared dictionary and of what stands for
                values handed on; None empties the dictionary and leaves the others.
        """
        args, kwargs = _map_tensors((self.args, self.kwargs), change, beside)
        return BlockArguments(args, kwargs, self.keyword)

    def invoke(self, block: Callable[..., Any], states: torch.Tensor) -> Any:
        """Call a block with hidden states and these arguments."""
        if self.keyword is None:
            return block(states, *self.args, **self.kwargs)
        return block(**{self.keyword: states}, **self.kwargs)

    def holds(self, kind: type | tuple[type, ...]) -> bool:
        """Return whether an argument is of a type, or of one of several."""
        return any(isinstance(value, kind) for value in (*self.args, *self.kwargs.values()))

    def equals(self, other: BlockArguments) -> bool:
        """Return whether two calls have the same arguments, tensors by their numbers."""
        return _equal((self.args, self.kwargs), (other.args, other.kwargs))


class TensorPool:
    """Replaces a tensor by an equal one that is already kept, on the device where it is used."""

    def __init__(self, kept: list[torch.Tensor], place: OnDevice, *, grows: bool) -> None:
        self._kept = kept
        self._place = place
        self._grows = grows
        # Blocks of one call mostly receive the same object; this spares comparing it again. The tensors stand in the
        # values so that their ids are not given to others meanwhile.
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor that is kept for one, itself if there is none, on the device."""
        if id(tensor) in self._seen:
            return self._seen[id(tensor)][1]
        shared = next((kept for kept in self._kept if _equal(kept, tensor)), None)
        if shared is None:
            shared = tensor
            if self._grows:
                self._kept.append(tensor)
        self._seen[id(tensor)] = (tensor, self._place.put(shared))
        return self._seen[id(tensor)][1]


class OnDevice:
    """Copies tensors to a device, one that is given several times once.

    Args:
        device: where to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # As in `TensorPool`.
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor on the device, itself if it lies there."""
        if tensor.device == self._device:
            return tensor
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = (tensor, tensor.to(self._device))
        return self._copies[id(tensor)][1]


@dataclasses.dataclass(frozen=True)
class WrittenBeside:
    """What blocks wrote for later ones besides the hidden states.

    Args:
        shared: the dictionary that some models hand to every block (keys and values that layers share).
        returned: what the last block returned behind its hidden states, which some models hand to the next one.
    """

    shared: collections.UserDict[Any, Any]
    returned: tuple[Any, ...] = ()

    def copied(self) -> WrittenBeside:
        """Return the same for another block to write into."""
        return WrittenBeside(collections.UserDict(self.shared.data), self.returned)


@dataclasses.dataclass(frozen=True)
class HandedOn:
    """Stands for a value that a block returns besides its hidden states, to see whether the model passes it on.

    Args:
        position: among the values behind the hidden states.
    """

    position: int


def returned_beside(output: Any, name: str) -> tuple[Any, ...] | None:
    """Return placeholders for what a block gives besides the hidden states, None if it gives the bare tensor."""
    if isinstance(output, torch.Tensor):
        return None
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], torch.Tensor):
        return tuple(None if value is None else HandedOn(place) for place, value in enumerate(output[1:]))
    raise UnsupportedModelError(
        f"block {name} returns a {type(output).__name__}; a decoder block must return its hidden states, alone or "
        "first in a tuple. Name the list of decoder blocks with `blocks`, e.g. `blocks=model.layers`."
    )


def _map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor], beside: WrittenBeside | None) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, HandedOn) and beside is not None:
        return _map_tensors(beside.returned[value.position], change, None)
    if isinstance(value, collections.UserDict):
        return collections.UserDict() if beside is None else beside.shared
    if isinstance(value, dict):
        return {key: _map_tensors(item, change, beside) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_map_tensors(item, change, beside) for item in value)
    return value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one is other:
            return True
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if type(one) in (tuple, list) and type(other) is type(one):
        return len(one) == len(other) and all(map(_equal, one, other))
    return isinstance(one, torch.Tensor) == isinstance(other, torch.Tensor)
