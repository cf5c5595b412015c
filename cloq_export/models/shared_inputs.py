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
    receive the same sequence of tensors. Layers that `run` does not reach (experts without a token) follow at the end,
    each alone.

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
    return [*groups.values(), *([name] for name in linears if name not in received)]


def _identity(tensor: torch.Tensor) -> tuple[object, ...]:
    if tensor.numel() == 0:
        return (id(tensor),)
    # The version tells apart what stood in the same memory before and after an in-place change.
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, version
