"""Find which linear layers of a block read the very same tensor, so that they can share one Gram matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cloq_export.models.blocks import find_linears


def shared_inputs(block: nn.Module, run: Callable[[], object], prefix: str = "") -> list[list[str]]:
    """Return groups of linear layers that are fed by the very same tensor, in order of execution.

    Two layers share an input when they receive the same memory, not merely equal numbers: q, k and v of an attention
    layer do, and gate and up of a gated MLP. A layer that is called several times shares only with layers that
    receive the same sequence of tensors. Layers that `run` does not reach (experts without a token) stand each alone
    where they would be executed: beside their sibling experts, as these are defined.

    Args:
        block: one decoder block.
        run: runs the block forward once, e.g. `lambda: stream.forward_block(3, hidden[:1])`.
        prefix: dotted path of the block inside the model; it starts every returned name.

    Returns:
        list: groups of module names, as `find_linears` gives them.
    """
    linears = find_linears(block, prefix)
    received: dict[str, list[tuple[object, ...]]] = {}
    # Inputs are held until the end: memory that is freed and used again would look shared.
    held: list[torch.Tensor] = []

    def record(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            held.append(args[0])
            received.setdefault(name, []).append(_identity(args[0]))

        return hook

    handles = [linear.register_forward_pre_hook(record(name)) for name, linear in linears.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()

    groups: dict[tuple[tuple[object, ...], ...], list[str]] = {}
    for name, identities in received.items():
        groups.setdefault(tuple(identities), []).append(name)
    return _with_unreached(list(groups.values()), list(linears))


def _with_unreached(groups: list[list[str]], defined: list[str]) -> list[list[str]]:
    """Return groups in order of execution, the linears that are in none put next to the closest relative."""
    ordered = list(groups)
    place = {name: group for group in groups for name in group}
    for number, name in enumerate(defined):
        if name in place:
            continue
        before = defined[number - 1] if number else None
        after = next((other for other in defined[number:] if other in place), None)
        alone = [name]
        if after is not None and (before is None or _kinship(name, after) > _kinship(name, before)):
            ordered.insert(ordered.index(place[after]), alone)
        else:
            ordered.insert(ordered.index(place[before]) + 1 if before is not None else 0, alone)
        place[name] = alone
    return ordered


def _kinship(one: str, other: str) -> int:
    """Return how many leading parts two dotted paths share."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return next((count for count, (left, right) in enumerate(pairs) if left != right), len(one.split(".")))


def _identity(tensor: torch.Tensor) -> tuple[object, ...]:
    if tensor.numel() == 0:
        return (id(tensor),)
    # The version tells apart what stood in the same memory before and after an in-place change.
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, version
