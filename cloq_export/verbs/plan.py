"""What a run would do and take, without doing it."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from cloq_export.compress.opening import open_planned
from cloq_export.compress.planned import DevicePlan
from cloq_export.compress.session import Session
from cloq_export.models.devices import chosen_device, limited
from cloq_export.recipe import Recipe, bytes_of_size


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """What a run would do.

    Args:
        model: what it reads.
        grids: bits, group size and rank, for people -> number of layers.
        layers: how many are quantized.
        device: what it would take of a device.
        notes: what does not go the ordinary way.
    """

    model: str
    grids: Mapping[str, int]
    layers: int
    device: DevicePlan
    notes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Return what `cloq run --plan --json` prints."""
        return {**dataclasses.asdict(self), "device": self.device.to_json()}


def plan_run(recipe: Recipe, *, console: Console | None = None) -> RunPlan:
    """Open the model of a recipe, and say what happens to its layers and what that takes of the device.

    Args:
        recipe: every option; a budget is not spent, so its layers stand with the recipe's own grid.
        console: where progress goes; None is standard error.

    Returns:
        RunPlan.

    Raises:
        CloqError: what a run would be refused for before its work.
    """
    session = Session(console or Console(stderr=True))
    loaded, plan = open_planned(session, recipe)
    kinds = collections.Counter(
        f"{planned.spec.bits} bits, groups of {planned.spec.group_size}, rank {planned.rank}"
        for planned in plan.modules.values()
    )
    if recipe.budget:
        session.notes.append("a budget chooses bits, groups and ranks after measuring; the plan has the recipe's own")
    there = chosen_device(recipe.device)
    with limited(there, bytes_of_size(recipe.device_memory)):
        device = DevicePlan.of(loaded.model, plan, recipe, there)
    return RunPlan(recipe.model, dict(kinds), len(plan.modules), device, tuple(session.notes))
