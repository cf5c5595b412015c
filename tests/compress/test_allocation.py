"""What a budget is spent on, against trying everything."""

from __future__ import annotations

import itertools
import random

import pytest

from cloq_export.compress.allocation import RankedLayer, StorageChoice, allocate, hull_of_group
from cloq_export.errors import UsageError
from cloq_export.types import QuantSpec

_RANKS = (0, 8, 16)
_SPECS = (QuantSpec(2, 64), QuantSpec(2, 32), QuantSpec(4, 64))


def _groups(seed: int) -> list[dict[QuantSpec, list[RankedLayer]]]:
    draw = random.Random(seed)
    groups = []
    for group in range(3):
        layers: dict[QuantSpec, list[RankedLayer]] = {}
        for number, spec in enumerate(_SPECS):
            layers[spec] = []
            for name in ("q", "v")[: 1 + group % 2]:
                losses = sorted((draw.uniform(0, 10 / (number + 1)) for _ in _RANKS), reverse=True)
                pairs = [0, draw.randint(5, 20), draw.randint(21, 60)]
                layers[spec].append(RankedLayer(f"{group}.{name}", 100 + 40 * number, _RANKS, pairs, losses))
        groups.append(layers)
    return groups


def _all_choices(layers_of_spec: dict[QuantSpec, list[RankedLayer]]) -> list[StorageChoice]:
    found = []
    for spec, layers in layers_of_spec.items():
        for picks in itertools.product(range(len(_RANKS)), repeat=len(layers)):
            found.append(
                StorageChoice(
                    spec,
                    {layer.name: layer.ranks[at] for layer, at in zip(layers, picks, strict=True)},
                    sum(layer.code_bits + layer.adapter_bits[at] for layer, at in zip(layers, picks, strict=True)),
                    sum(layer.losses[at] for layer, at in zip(layers, picks, strict=True)),
                )
            )
    return found


@pytest.mark.parametrize("seed", range(8))
def test_each_choice_of_a_hull_is_best_for_some_price(seed: int) -> None:
    for group in _groups(seed):
        hull, every = hull_of_group(group), _all_choices(group)
        assert {(c.stored_bits, round(c.loss, 9)) for c in hull} <= {(c.stored_bits, round(c.loss, 9)) for c in every}
        assert hull[0].stored_bits == min(choice.stored_bits for choice in every)
        assert hull[-1].loss == pytest.approx(min(choice.loss for choice in every))
        for price in (0.0, 1e-3, 1e-2, 0.03, 0.1, 0.3):
            best = min(choice.loss + price * choice.stored_bits for choice in every)
            assert min(choice.loss + price * choice.stored_bits for choice in hull) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(8))
def test_no_other_choices_within_the_limit_are_better_by_more_than_a_step(seed: int) -> None:
    groups = _groups(seed)
    hulls = [hull_of_group(group) for group in groups]
    largest_step = max(one.loss - other.loss for hull in hulls for one, other in itertools.pairwise(hull))
    smallest = sum(hull[0].stored_bits for hull in hulls)
    reached = []
    for limit in range(smallest, sum(hull[-1].stored_bits for hull in hulls) + 10, 7):
        chosen = allocate(hulls, limit)
        assert sum(choice.stored_bits for choice in chosen) <= limit
        best = min(
            sum(choice.loss for choice in choices)
            for choices in itertools.product(*map(_all_choices, groups))
            if sum(choice.stored_bits for choice in choices) <= limit
        )
        reached.append(sum(choice.loss for choice in chosen))
        assert best - 1e-9 <= reached[-1] <= best + largest_step
    assert reached[-1] == pytest.approx(sum(hull[-1].loss for hull in hulls))


def test_a_step_that_ends_at_the_limit_is_optimal() -> None:
    groups = _groups(3)
    hulls = [hull_of_group(group) for group in groups]
    steps = sorted(
        ((after.loss - before.loss) / (after.stored_bits - before.stored_bits), after.stored_bits - before.stored_bits)
        for hull in hulls
        for before, after in itertools.pairwise(hull)
    )
    limit = sum(hull[0].stored_bits for hull in hulls) + sum(more for _, more in steps[: len(steps) // 2])
    best = min(
        sum(choice.loss for choice in choices)
        for choices in itertools.product(*map(_all_choices, groups))
        if sum(choice.stored_bits for choice in choices) <= limit
    )
    assert sum(choice.loss for choice in allocate(hulls, limit)) == pytest.approx(best)


def test_too_little_is_refused() -> None:
    hulls = [hull_of_group(group) for group in _groups(0)]
    with pytest.raises(UsageError, match=r"the smallest choices take \d+ bits, and 99 are allowed"):
        allocate(hulls, 99)
