"""Share out a number of bytes among layers so that the estimated loss of the model is least."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Mapping, Sequence

from cloq_export.errors import UsageError
from cloq_export.types import QuantSpec


@dataclasses.dataclass(frozen=True)
class StorageChoice:
    """One way to store the layers that read one input.

    Args:
        spec: the grid that they share.
        ranks: full module name -> rank of its adapter.
        stored_bits: what all of it takes.
        loss: what it is estimated to cost the model.
    """

    spec: QuantSpec
    ranks: Mapping[str, int]
    stored_bits: int
    loss: float


@dataclasses.dataclass(frozen=True)
class RankedLayer:
    """What one layer costs with each rank, on one grid.

    Args:
        name: full module name.
        code_bits: what codes, scales and zeros take.
        ranks: candidates, ascending, 0 among them or not.
        adapter_bits: what the pair of each rank takes, ascending.
        losses: estimated loss with each rank, descending.
    """

    name: str
    code_bits: int
    ranks: Sequence[int]
    adapter_bits: Sequence[int]
    losses: Sequence[float]


def hull_of_group(layers_of_spec: Mapping[QuantSpec, Sequence[RankedLayer]]) -> list[StorageChoice]:
    """Return the choices of one group that are best for some price of a bit, from the smallest to the largest.

    For one grid the layers are independent, so their best ranks for a price are found layer by layer; the lower convex
    hull of all grids together is what is left.

    Args:
        layers_of_spec: grid -> the layers of the group on it.
    """
    choices = [choice for spec, layers in layers_of_spec.items() for choice in _along_prices(spec, layers)]
    return _lower_hull(choices)


def allocate(hulls: Sequence[Sequence[StorageChoice]], stored_bits: int) -> list[StorageChoice]:
    """Return one choice for each group with the least loss in all, within a number of bits.

    From the smallest choices on, the step that saves most loss for each bit is taken first. On the convex hull this is
    the optimum wherever a step ends exactly at the limit, and otherwise less than one step of one group from it;
    smaller steps then fill what is left.

    Args:
        hulls: of each group, from `hull_of_group`.
        stored_bits: the limit.

    Raises:
        UsageError: even the smallest choices take more.
    """
    place = [0] * len(hulls)
    left = stored_bits - sum(hull[0].stored_bits for hull in hulls)
    if left < 0:
        raise UsageError(f"the smallest choices take {stored_bits - left} bits, and {stored_bits} are allowed.")

    def step(group: int) -> tuple[float, int, int, int] | None:
        if place[group] + 1 == len(hulls[group]):
            return None
        now, after = hulls[group][place[group]], hulls[group][place[group] + 1]
        more = after.stored_bits - now.stored_bits
        return (after.loss - now.loss) / more, more, group, place[group]

    steps = [first for group in range(len(hulls)) if (first := step(group)) is not None]
    heapq.heapify(steps)
    while steps:
        _, more, group, _ = heapq.heappop(steps)
        if more > left:
            continue  # its later steps save less for each bit, but other groups have smaller ones
        left -= more
        place[group] += 1
        after = step(group)
        if after is not None:
            heapq.heappush(steps, after)
    return [hull[index] for hull, index in zip(hulls, place, strict=True)]


def _along_prices(spec: QuantSpec, layers: Sequence[RankedLayer]) -> Iterable[StorageChoice]:
    """Yield the choices on one grid: every layer's hull, its steps merged by what they save for each bit."""
    hulls = {layer.name: _hull_of_ranks(layer) for layer in layers}
    steps = []
    for layer in layers:
        for before, after in zip(hulls[layer.name], hulls[layer.name][1:], strict=False):
            more = layer.adapter_bits[after] - layer.adapter_bits[before]
            saved = layer.losses[before] - layer.losses[after]
            steps.append((-saved / more, layer.name, after, more, saved))
    index = {layer.name: hulls[layer.name][0] for layer in layers}
    ranks_of = {layer.name: layer.ranks for layer in layers}
    bits = sum(layer.code_bits + layer.adapter_bits[index[layer.name]] for layer in layers)
    loss = sum(layer.losses[index[layer.name]] for layer in layers)

    def choice() -> StorageChoice:
        return StorageChoice(spec, {name: ranks_of[name][at] for name, at in index.items()}, bits, loss)

    yield choice()
    for _, name, after, more, saved in sorted(steps):
        index[name], bits, loss = after, bits + more, loss - saved
        yield choice()


def _hull_of_ranks(layer: RankedLayer) -> list[int]:
    points = list(zip(layer.adapter_bits, layer.losses, strict=True))
    return _lower_hull_of(points)


def _lower_hull(choices: Iterable[StorageChoice]) -> list[StorageChoice]:
    ordered = sorted(choices, key=lambda choice: (choice.stored_bits, choice.loss))
    return [ordered[at] for at in _lower_hull_of([(choice.stored_bits, choice.loss) for choice in ordered])]


def _lower_hull_of(points: Sequence[tuple[int, float]]) -> list[int]:
    """Return which of some points, ascending in the first value, form the falling part of the lower convex hull."""
    hull: list[int] = []
    for at, (bits, loss) in enumerate(points):
        if hull and loss >= points[hull[-1]][1]:
            continue  # takes more and saves nothing
        while len(hull) > 1:
            (bits0, loss0), (bits1, loss1) = points[hull[-2]], points[hull[-1]]
            if (loss1 - loss0) * (bits - bits1) < (loss - loss1) * (bits1 - bits0):
                break
            hull.pop()
        hull.append(at)
    return hull
