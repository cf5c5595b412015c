"""What a run takes of a device's memory, counted before the work from the shapes of its layers.

The counts follow the code: `test_device_memory.py` holds them against the book-keeping of a pretended GPU. What a GPU's
libraries take inside one operation is not counted.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cloq_export.adapt.cloq import EXACT_SIDE, OVERSAMPLING
from cloq_export.compress.block_shape import BlockShape, InputGroup
from cloq_export.models.lending import STORAGE_SHARE
from cloq_export.quantize.optq import BLOCK_COLUMNS
from cloq_export.recipe import Recipe

_HALF, _SINGLE, _DOUBLE = 2, 4, 8
# Of what is free on a device, the share that batches which wait there may fill the walk up to; libraries and gaps
# between tensors take what is left.
_FILLED_SHARE = 0.75


@dataclasses.dataclass(frozen=True)
class StageMemory:
    """The most that one stage of a run holds on a device.

    Args:
        stage: its name, for people.
        parts: what -> bytes, of what is held at the same time.
    """

    stage: str
    parts: Mapping[str, int]

    @property
    def bytes(self) -> int:
        """Return the sum of the parts."""
        return sum(self.parts.values())

    def to_json(self) -> dict[str, Any]:
        """Return what `cloq run --plan --json` prints of it."""
        return {"stage": self.stage, "bytes": self.bytes, "parts": dict(self.parts)}


def solve_bytes(group: InputGroup, recipe: Recipe) -> int:
    """Return what the solve of layers that read one input takes besides their weights and H, in bytes.

    n is the number of inputs, M that of all outputs, m that of the widest layer. The damped H and its factor stand in
    float64; the walk over the columns holds its numbers in float32, and the closed form in float64.
    """
    n, outs = group.in_features, group.outs
    every, widest = sum(outs), max(outs)
    moved, several = recipe.error_aware > 0.0, len(outs) > 1
    # Damped H and its factor; then weights and targets.
    entry = 2 * _DOUBLE * n * n + _SINGLE * n * every * (1 + moved)
    stacked = _SINGLE * n * every * (several + (recipe.method == "magr"))
    grids = 2 * _SINGLE * n * every
    if recipe.method == "rtn":
        columns = 2 * _SINGLE * n * every + n * every
    else:
        block = _SINGLE * min(n, BLOCK_COLUMNS) * every
        columns = max(2 * _DOUBLE * n * n, _SINGLE * n * n + (4 * _SINGLE + 1) * n * every + block)
    codes = entry + stacked + grids + columns
    # Codes of all layers, Q of this one and of the one before, what the ones before serve.
    pairs = entry + n * every + _SINGLE * n * (widest * (1 + several) + every - widest)
    rank, side = group.rank, min(n, widest)
    if not rank:
        return max(codes, pairs + 5 * _SINGLE * n * widest)
    factor = _DOUBLE * n * widest
    if recipe.svd == "full":
        return max(codes, pairs + 2 * factor + _DOUBLE * side * (n + widest))
    if side <= EXACT_SIDE:
        return max(codes, pairs + 2 * factor + max(factor, 3 * _DOUBLE * side * side))
    width = min(rank + OVERSAMPLING, side)
    return max(codes, pairs + 3 * factor + 2 * _DOUBLE * width * (n + widest) + 3 * _DOUBLE * rank * n)


def walk_stages(
    shape: BlockShape, recipe: Recipe, windows_per_batch: int, free: int, *, parks: bool
) -> tuple[StageMemory, ...]:
    """Return what the walk over the blocks holds on a device while it runs them forward, and while it solves.

    Args:
        shape: of the blocks; of the largest, where they differ.
        recipe: every option of the run.
        windows_per_batch: windows of one forward pass.
        free: bytes of the device that are free; hidden states are kept there while they take a small share.
        parks: batches that wait for each other inside of a block hold nothing on the device.
    """
    windows, batch = recipe.samples, min(windows_per_batch, recipe.samples)
    refines = recipe.refine != "none"
    paired = recipe.error_aware > 0.0 or refines
    share = 1.0 if refines else recipe.float_share
    batches = math.ceil(windows / batch)
    streams = windows + min(windows, math.ceil(share * batches) * batch) if paired else windows
    inside = 4 * windows * shape.hidden < STORAGE_SHARE * free
    held: dict[str, int] = {
        # The next block is copied while one computes; behind the compressed prefix a block stands in two forms.
        "blocks": 2 * shape.weights + shape.linears * paired,
        # Those before the block; a walk that does not wait inside of it has those behind it too when it solves.
        "hidden states": (1 if paired else 2) * streams * shape.hidden if inside else 0,
    }
    sums = [_SINGLE * group.in_features**2 for group in shape.groups]
    forward = {"activations": batch * (shape.activations + (0 if inside else shape.hidden))}
    largest: list[StageMemory] = []
    for number, (group, gram) in enumerate(zip(shape.groups, sums, strict=True)):
        if paired:
            # All batches wait where the group's input is, with what a forward pass holds there; parked, one of each
            # stream is there while its input is summed.
            there = 0 if parks else streams
            waiting = {"batches that wait": there * (group.held + (0 if inside else shape.hidden))}
            tokens = {"H and D": gram * (2 + (recipe.float_share < 1.0))}
        else:
            waiting, tokens = {}, {"H of inputs not yet solved": sum(sums[number:])}
        largest.append(StageMemory("solve", {**held, **waiting, **tokens, "solve": solve_bytes(group, recipe)}))
    # A batch that ends still holds what it held at the last group.
    waiting_batches = 0 if parks else streams - batch
    waited = max((group.held for group in shape.groups), default=0) * waiting_batches if paired else sum(sums)
    behind = 2 * streams * shape.hidden if inside else 0
    what = "batches that wait" if paired else "H of all inputs"
    return (
        StageMemory("forward and statistics", {**held, "hidden states": behind, what: waited, **forward}),
        max(largest, key=lambda stage: stage.bytes),
    )


@dataclasses.dataclass(frozen=True)
class Placement:
    """How the walk over the blocks is laid out so that it fits a device.

    Args:
        windows_per_batch: windows of one forward pass; 0 if not even one fits.
        parks: batches that wait for each other inside of a block hold nothing on the device, but lie in host memory.
        stages: the most that each stage holds; with one window, if none fits.
    """

    windows_per_batch: int
    parks: bool
    stages: tuple[StageMemory, ...]

    @classmethod
    def of(cls, shape: BlockShape, recipe: Recipe, most: int, free: int | None) -> Placement:
        """Return the layout that fits with the most windows; rather than take fewer, batches wait in host memory.

        Where batches wait does not change what is computed; with fewer windows sums come in another order.

        Args:
            shape: of the blocks; of the largest, where they differ.
            recipe: every option of the run.
            most: windows of one forward pass, at most.
            free: bytes of the device that are free; None asks for nothing, as if the device had all that is needed.
        """
        if free is None:
            return cls(most, False, walk_stages(shape, recipe, most, 0, parks=False))
        may_park = recipe.error_aware > 0.0 and recipe.refine == "none"
        counts = itertools.accumulate(itertools.repeat(2), lambda now, _: now // 2, initial=most)
        for count in itertools.takewhile(bool, counts):
            for parks, share in ((False, _FILLED_SHARE if may_park else 1.0), (True, 1.0))[: 1 + may_park]:
                stages = walk_stages(shape, recipe, count, free, parks=parks)
                if all(stage.bytes <= share * free for stage in stages):
                    return cls(count, parks, stages)
        return cls(0, may_park, walk_stages(shape, recipe, 1, free, parks=may_park))


def largest_shape(shapes: Sequence[BlockShape]) -> BlockShape:
    """Return the shape of the block that takes most."""
    return max(shapes, key=lambda shape: shape.weights)
