"""Run one block over all batches, pausing together wherever a group of linear layers meets its input.

A layer that comes later in a block should be calibrated on what the layers before it, already compressed, really put
out. Doing that by running the block again and again up to each layer costs a multiple of the forward pass. Here every
batch runs in a coroutine of its own that stops at the first linear of each group; when all batches wait, the caller
collects the inputs, exchanges the weights and lets them go on. One forward pass per stream serves all groups.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import greenlet
import torch
from torch import nn

from cloq_export.models.parking import Parking
from cloq_export.models.stream import BlockStream


@dataclasses.dataclass
class _Waiting:
    """A batch that stands before a group: which group, and the input that it brings."""

    group: int
    inputs: torch.Tensor


@dataclasses.dataclass(frozen=True)
class _Arithmetic:
    """The settings of the thread and the process that a forward pass changes for itself only."""

    device: str
    autocast: bool
    autocast_dtype: torch.dtype
    autocast_cache: bool
    matmul_precision: str
    gradients: bool

    @classmethod
    def now(cls, device: str) -> _Arithmetic:
        return cls(
            device,
            torch.is_autocast_enabled(device),
            torch.get_autocast_dtype(device),
            torch.is_autocast_cache_enabled(),
            torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(),
        )

    def restore(self) -> None:
        torch.set_autocast_enabled(self.device, self.autocast)
        torch.set_autocast_dtype(self.device, self.autocast_dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        torch.set_float32_matmul_precision(self.matmul_precision)
        torch.set_grad_enabled(self.gradients)


class _BatchRun(greenlet.greenlet):
    """One batch of one stream on its way through the block."""

    def __init__(
        self, stream: BlockStream, block_index: int, batch_index: int, hidden: torch.Tensor, outside: _Arithmetic
    ) -> None:
        super().__init__()
        self._stream = stream
        self._block_index = block_index
        self._batch_index = batch_index
        self._hidden: torch.Tensor | None = hidden
        self._outside = outside
        self.waiting: _Waiting | None = None
        self.output: torch.Tensor | None = None

    def run(self) -> None:
        hidden, self._hidden = self._hidden, None
        assert hidden is not None
        self.output = self._stream.forward_batch(self._block_index, self._batch_index, hidden)

    def proceed(self, parking: Parking | None) -> None:
        """Go on to the next pause or to the end.

        Args:
            parking: where it waits; None leaves it where it is.
        """
        self.waiting = None
        if parking is None:
            self.switch()
            return
        parking.resume(id(self), self._batch_index)
        try:
            self.switch()
        finally:
            parking.pause(id(self), ended=self.dead)

    def pause(self, group: int, inputs: torch.Tensor) -> None:
        """Called from inside the block: hand the input over and wait."""
        self.waiting = _Waiting(group, inputs)
        assert self.parent is not None
        # Forward passes that overlap in time would each take the other's settings for what stood there before.
        inside = _Arithmetic.now(self._outside.device)
        self._outside.restore()
        try:
            self.parent.switch()
        finally:
            inside.restore()


class BatchInputs(Mapping[int, torch.Tensor]):
    """The inputs of the batches that wait, by number of the batch.

    Where they are parked, those of one batch at a time come to the device: what was asked for before is parked again.

    Args:
        inputs: number of the batch -> what it brings.
        parking: where batches wait; None leaves them on the device.
    """

    def __init__(self, inputs: Mapping[int, torch.Tensor], parking: Parking | None) -> None:
        self._inputs = inputs
        self._parking = parking

    def __getitem__(self, batch: int) -> torch.Tensor:
        if self._parking is not None:
            self._parking.settle(batch)
        return self._inputs[batch]

    def outside(self, batches: range) -> BatchInputs:
        """Return the inputs of all batches but those."""
        kept = {batch: given for batch, given in self._inputs.items() if batch not in batches}
        return BatchInputs(kept, self._parking)

    def __iter__(self) -> Iterator[int]:
        return iter(self._inputs)

    def __len__(self) -> int:
        return len(self._inputs)


GroupInputs = Sequence[BatchInputs]


def run_in_lockstep(
    stream: BlockStream,
    block_index: int,
    hidden: Sequence[Sequence[torch.Tensor]],
    groups: Sequence[Sequence[nn.Module]],
    install: Callable[[int], None],
    visit: Callable[[int, GroupInputs], None],
) -> list[list[torch.Tensor]]:
    """Run one block over several streams of hidden states, stopping before each group of linear layers.

    Where the stream says so, what batches hold while they wait is in host memory; their inputs come to the device one
    batch at a time, as `visit` asks for them.

    Args:
        stream: the block's surroundings (masks, positions, device).
        block_index: number of the block.
        hidden: per stream, per batch, hidden states (batch, seqlen, hidden).
        groups: linear layers that read the same tensor, in order of execution.
        install: puts the weights of a stream into the block; called before that stream goes on.
        visit: called once per group with, per stream, the inputs (..., in) of the batches that reached it, by number
            of the batch; afterwards `install` may bring other weights for the group's layers.

    Returns:
        Per stream, per batch, the hidden states after the block.
    """
    visited: set[int] = set()

    def watch(group: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            run = greenlet.getcurrent()
            if isinstance(run, _BatchRun) and group not in visited:
                run.pause(group, args[0])

        return hook

    handles = []
    outside = _Arithmetic.now(stream.device.type)
    runs = [
        [_BatchRun(stream, block_index, batch_index, states, outside) for batch_index, states in enumerate(batches)]
        for batches in hidden
    ]
    parking = Parking(stream.device) if stream.parks_waiting else None
    try:
        for group, linears in enumerate(groups):
            handles += [linear.register_forward_pre_hook(watch(group)) for linear in linears]
        with stream.block_on_device(block_index), parking or contextlib.nullcontext():
            going = runs
            while True:
                for stream_index, batch_runs in enumerate(going):
                    if batch_runs:
                        install(stream_index)
                    for run in batch_runs:
                        run.proceed(parking)
                waiting = [[run for run in batch_runs if run.waiting is not None] for batch_runs in runs]
                reached = [run.waiting.group for batch_runs in waiting for run in batch_runs if run.waiting]
                if not reached:
                    break
                group = min(reached)
                # Experts are reached by some batches only: those that wait elsewhere stay where they are.
                going = [[r for r in batch_runs if r.waiting and r.waiting.group == group] for batch_runs in waiting]
                inputs = [
                    BatchInputs(
                        {r._batch_index: r.waiting.inputs for r in batch_runs if r.waiting is not None}, parking
                    )
                    for batch_runs in going
                ]
                visit(group, inputs)
                if parking is not None:
                    parking.settle()
                visited.add(group)
            stream.refuse_overflow()
    finally:
        for handle in handles:
            handle.remove()
        for started in (run for batch_runs in runs for run in batch_runs if not run.dead):
            started.throw()  # ends it where it waits; after an exception it would otherwise live as long as that does
        outside.restore()
    return [[run.output for run in batch_runs if run.output is not None] for batch_runs in runs]
