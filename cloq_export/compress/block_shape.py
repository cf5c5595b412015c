"""The shapes that the memory and the time of a block's work follow from, found without computing anything."""

from __future__ import annotations

import collections
import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cloq_export.compress.plan import ModelPlan
from cloq_export.models.block_arguments import BlockArguments
from cloq_export.models.blocks import find_linears
from cloq_export.models.devices import device_of
from cloq_export.models.experts import Expert
from cloq_export.models.lending import model_bytes
from cloq_export.models.stream import BlockStream
from cloq_export.process.storage_counter import StorageCounter
from cloq_export.process.traffic_counter import TrafficCounter
from cloq_export.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class InputGroup:
    """The layers of a block that read one input.

    Args:
        in_features: width of the input.
        outs: number of outputs of each layer.
        rank: of the adapter of each, the largest.
        held: bytes that a forward pass of one window holds where it reaches the group, the input included.
        share: of the tokens that reach it.
    """

    in_features: int
    outs: tuple[int, ...]
    rank: int
    held: int = 0
    share: float = 1.0


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """All that the memory and the time of one block's work follow from.

    Args:
        groups: in order of execution.
        weights: bytes of the block's tensors.
        linears: bytes of its linear weights.
        hidden: bytes of the hidden states of one window.
        activations: bytes that a forward pass of one window takes at most, besides the hidden states.
        traced: False if the forward pass was only estimated.
        operations: of the matrix products of one window's forward pass; a multiplication and an addition are two.
        traffic: bytes that its operations read and write.
        launches: how many operations it has.
        alike: how many blocks of the model are built so.
    """

    groups: tuple[InputGroup, ...]
    weights: int
    linears: int
    hidden: int
    activations: int
    traced: bool = True
    operations: float = 0.0
    traffic: float = 0.0
    launches: float = 0.0
    alike: int = 1

    @classmethod
    def of(
        cls,
        block: nn.Module,
        call: BlockArguments,
        states: torch.Tensor,
        ranks: Mapping[str, int],
        experts_per_token: int = 1,
    ) -> BlockShape:
        """Return the shape of a block; `trace` and `estimate` say how, the second where the first cannot.

        Args:
            block: a decoder block.
            call: what it is given besides the hidden states, for one window.
            states: hidden states of one window, (1, seqlen, hidden).
            ranks: layer inside the block -> rank of its adapter, of the layers that are quantized.
            experts_per_token: to how many experts of a mixture a token goes.
        """
        try:
            return cls.trace(block, call, states, ranks)
        except (RuntimeError, NotImplementedError):
            return cls.estimate(block, states, ranks, experts_per_token)

    @classmethod
    def estimate(
        cls, block: nn.Module, states: torch.Tensor, ranks: Mapping[str, int], experts_per_token: int = 1
    ) -> BlockShape:
        """Return the shape of a block whose forward pass depends on numbers, as that of experts does.

        Layers of one module and one width are taken to read one input; at it a forward pass holds the residual, its
        normed form and the input of the widest layer that every token goes through. Of the operations only the
        linears' products are counted; every operation reads and writes about what a linear does.
        """
        linears = find_linears(block, "")
        together: dict[tuple[str, int], list[str]] = {}
        for name in ranks:
            together.setdefault((name.rpartition(".")[0], linears[name].in_features), []).append(name)
        hidden = states.numel() * states.element_size()
        width = hidden // states.shape[-1]
        tokens = states.numel() // states.shape[-1]
        shares = {name: _share(block, name, experts_per_token) for name in linears}
        groups = tuple(
            InputGroup(
                inputs,
                tuple(linears[name].out_features for name in names),
                max(ranks[name] for name in names),
                # Experts see a share of the tokens: about as many as stand in the hidden states, all together.
                2 * hidden + min(width * inputs, hidden),
                shares[names[0]],
            )
            for (_, inputs), names in together.items()
        )
        widest = max(sum(group.outs) + group.in_features for group in groups)
        of_linears = sum(linear.weight.numel() * linear.weight.element_size() for linear in linears.values())
        return cls(
            groups,
            model_bytes(block),
            of_linears,
            hidden,
            2 * hidden + width * widest,
            traced=False,
            operations=sum(2.0 * tokens * shares[name] * linear.weight.numel() for name, linear in linears.items()),
            traffic=of_linears
            + sum(width * shares[name] * sum(linear.weight.shape) for name, linear in linears.items()),
            launches=len(linears),
        )

    @classmethod
    def trace(
        cls, block: nn.Module, call: BlockArguments, states: torch.Tensor, ranks: Mapping[str, int]
    ) -> BlockShape:
        """Return the shape of a block, by running it on tensors that hold nothing.

        Args:
            block: a decoder block.
            call: what it is given besides the hidden states, for one window.
            states: hidden states of one window, (1, seqlen, hidden).
            ranks: layer inside the block -> rank of its adapter, of the layers that are quantized.
        """
        empty = {
            name: torch.empty_like(tensor, device="meta")
            for name, tensor in (*block.named_parameters(), *block.named_buffers())
        }
        counter, flops, traffic = StorageCounter(), FlopCounterMode(display=False), TrafficCounter()
        reached: list[_Reached] = []
        linears = find_linears(block, "")

        def reach(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
            def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                if not reached or reached[-1].inputs() is not args[0]:
                    reached.append(_Reached([], counter.in_use, weakref.ref(args[0])))
                reached[-1].names.append(name)

            return hook

        handles = [linear.register_forward_pre_hook(reach(name)) for name, linear in linears.items()]
        given, states = call.map(lambda tensor: tensor.to("meta")), states.to("meta")
        try:
            with torch.no_grad(), flops, traffic, counter:
                given.invoke(lambda *args, **kwargs: torch.func.functional_call(block, empty, args, kwargs), states)
        finally:
            for handle in handles:
                handle.remove()
        groups = tuple(
            InputGroup(
                linears[each.names[0]].in_features,
                tuple(linears[name].out_features for name in each.names if name in ranks),
                max(ranks[name] for name in each.names if name in ranks),
                each.held,
            )
            for each in reached
            if any(name in ranks for name in each.names)
        )
        of_linears = sum(linear.weight.numel() * linear.weight.element_size() for linear in linears.values())
        return cls(
            groups,
            model_bytes(block),
            of_linears,
            states.numel() * states.element_size(),
            counter.peak,
            operations=flops.get_total_flops(),
            traffic=traffic.bytes,
            launches=traffic.operations,
        )


def _share(block: nn.Module, name: str, experts_per_token: int) -> float:
    """Return the share of the tokens that a linear of a block is given, if experts are chosen equally often."""
    parent = name.rpartition(".")[0]
    if not isinstance(block.get_submodule(parent), Expert):
        return 1.0
    experts = sum(1 for _ in block.get_submodule(parent.rpartition(".")[0]).children())
    return min(1.0, experts_per_token / experts)


@dataclasses.dataclass(frozen=True)
class _Reached:
    """The layers that were reached with one input, which is not held: that would be counted."""

    names: list[str]
    held: int
    inputs: weakref.ref[torch.Tensor]


def block_shapes(model: nn.Module, plan: ModelPlan, recipe: Recipe) -> list[BlockShape]:
    """Return the shapes of the blocks of a model, each kind once, with how many there are of it.

    Args:
        model: the float model, in host memory or on disk.
        plan: what happens to its layers.
        recipe: its `seqlen` is the length of a window.
    """
    window = torch.zeros(1, recipe.seqlen, dtype=torch.int64)
    stream = BlockStream(model, plan.blocks, window, device=device_of(model))
    shapes: dict[tuple[object, ...], BlockShape] = {}
    alike = collections.Counter[tuple[object, ...]]()
    for index, block in enumerate(plan.blocks):
        ranks = _ranks(plan, index)
        kind = (type(block), *((name, tuple(tensor.shape)) for name, tensor in block.named_parameters()), *ranks)
        alike[kind] += 1
        if kind not in shapes and ranks:
            call, states = stream.arguments(index), stream.hidden[0]
            shapes[kind] = BlockShape.of(block, call, states, ranks, experts_per_token(model))
    return [dataclasses.replace(shape, alike=alike[kind]) for kind, shape in shapes.items()]


def experts_per_token(model: nn.Module) -> int:
    """Return to how many experts of a mixture a token goes, as the model's configuration says; 1 if it does not."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    return int(getattr(text, "num_experts_per_tok", None) or 1)


def _ranks(plan: ModelPlan, index: int) -> Mapping[str, int]:
    prefix = f"{plan.blocks.prefix(index)}."
    return {name.removeprefix(prefix): planned.rank for name, planned in plan.of_block(index).items()}
