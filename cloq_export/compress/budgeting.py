"""Choose bits, group size and rank of every layer within a budget of stored bits, from measured sensitivities."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.compress.allocation import RankedLayer, StorageChoice, allocate, hull_of_group
from cloq_export.compress.costs import (
    CostMeter,
    GroupCosts,
    candidate_grids,
    candidate_ranks,
    divergences_of,
    report_of,
    stored_bits,
)
from cloq_export.compress.initialisations import CLOQ
from cloq_export.compress.job import CalibrationWindows, CompressJob
from cloq_export.compress.opening import open_planned, started_run
from cloq_export.compress.plan import ModelPlan, make_plan
from cloq_export.compress.session import Session
from cloq_export.compress.strategies import strategy_of
from cloq_export.compress.walk import BlockWalk
from cloq_export.errors import UsageError
from cloq_export.files.atomic import write_bytes
from cloq_export.models.blocks import find_blocks, find_linears
from cloq_export.models.source import LoadedModel
from cloq_export.models.stream import BlockStream
from cloq_export.recipe import Recipe
from cloq_export.texts.corpora import CalibrationText
from cloq_export.types import QuantSpec

BUDGET_REPORT = "budget"
# The recipe with the choice in it, for editing by hand.
RECIPE_NAME = "recipe.yaml"
# Tokens on which a layer's sensitivity is measured.
_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class Budgeted:
    """What a budget was spent on.

    Args:
        recipe: the recipe with an override for each layer.
        stored_bits_per_weight: codes, scales, zeros and adapters, over the weights that are quantized.
        smallest: what the smallest choices would take.
        choices: one for each group of layers that read one input.
    """

    recipe: Recipe
    stored_bits_per_weight: float
    smallest: float
    choices: tuple[StorageChoice, ...]

    def report(self) -> dict[str, Any]:
        """Return what a run keeps of it."""
        layers = [
            {"module": name, "bits": choice.spec.bits, "group_size": choice.spec.group_size, "rank": rank}
            for choice in self.choices
            for name, rank in choice.ranks.items()
        ]
        return {
            "budget": self.recipe.budget,
            "stored_bits_per_weight": self.stored_bits_per_weight,
            "smallest_budget": self.smallest,
            "estimated_divergence": sum(choice.loss for choice in self.choices),
            "layers": layers,
            "overrides": self.recipe.to_mapping()["overrides"],
        }


def check_budget(recipe: Recipe) -> None:
    """Refuse options that a budget cannot go with.

    Raises:
        UsageError: codes are kept, or A and B are not CLoQ's.
    """
    if recipe.codes_from:
        raise UsageError("a budget chooses the codes, and codes_from keeps them; leave one of the two out.")
    if recipe.init != CLOQ:
        raise UsageError(f"a budget weighs what CLoQ's closed form leaves, and init is {recipe.init}; take init cloq.")


def with_choices_of(out: Path, recipe: Recipe) -> Recipe:
    """Return the recipe with what a run has chosen already for the same budget, so that the run can be continued."""
    if not recipe.budget or not RunDirectory.is_run(out):
        return recipe
    held = RunDirectory.open(out).recipe
    given = list(recipe.overrides.items())
    if held.budget != recipe.budget or list(held.overrides.items())[: len(given)] != given:
        return recipe
    return recipe.changed({"overrides": held.overrides})


def has_chosen(directory: RunDirectory, recipe: Recipe) -> bool:
    """Return whether the overrides of a run's recipe are what its budget was spent on."""
    if BUDGET_REPORT not in directory.reports():
        return False
    return bool(directory.read_report(BUDGET_REPORT)["overrides"] == recipe.to_mapping()["overrides"])


def budgeted_recipe(
    session: Session,
    directory: RunDirectory,
    recipe: Recipe,
    calibration: CalibrationText,
    check: Callable[[LoadedModel], None] | None = None,
) -> Recipe:
    """Return the recipe with what its budget is spent on, measured in the run's work folder if it is not yet.

    Args:
        session: the call.
        directory: the run.
        recipe: every option of it; returned as it is without a budget.
        calibration: what to calibrate on.
        check: called with the model before any work.

    Raises:
        UsageError: as `spend`, or the recipe holds what a budget cannot go with.
        CloqError: as a run.
    """
    if not recipe.budget or has_chosen(directory, recipe):
        return recipe
    check_budget(recipe)
    loaded, _ = open_planned(session, recipe)
    if check is not None:
        check(loaded)
    path = directory.path / "work" / "budget"
    with started_run(path, measuring_recipe(recipe), directory.source_fingerprint) as work:
        spent = session.timed("budget", lambda: spend(session, loaded, work, recipe, calibration))
    directory.write_report(BUDGET_REPORT, spent.report())
    # The budget is spent: a copy of the recipe that was edited by hand must not choose again.
    write_bytes(directory.path / RECIPE_NAME, spent.recipe.changed({"budget": 0.0}).to_yaml().encode("utf-8"))
    directory.set_overrides(spent.recipe.to_mapping()["overrides"])
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.parent.rmdir()
    session.say(
        f"{spent.stored_bits_per_weight:.3f} stored bits per weight; what they are spent on stands in "
        f"{directory.path / RECIPE_NAME}, and can be edited as the recipe of another run"
    )
    return spent.recipe


def spend(
    session: Session, loaded: LoadedModel, work: RunDirectory, recipe: Recipe, calibration: CalibrationText
) -> Budgeted:
    """Measure what every grid and rank of every layer would cost the model, and choose within the budget.

    A layer's loss is its share of a measured divergence: the layers that read one input are put on their cheapest
    grid, without adapters, in the float model, and the Kullback-Leibler divergence of its next-token distribution is
    measured; it scales with the squared error that another grid or rank leaves under H.

    Args:
        session: the call.
        loaded: the float model.
        work: where figures go, from which an interrupted call continues; its recipe is `measuring_recipe`.
        recipe: every option of the run; layers that its overrides concern stay as these say.
        calibration: what to calibrate on.

    Returns:
        Budgeted.

    Raises:
        UsageError: the budget cannot be met, the smallest that can is named; or nothing is left to choose. Both before
            anything is measured.
        CloqError: as a run.
    """
    plan = _cheapest_plan(loaded.model, recipe)
    if all(recipe.override_for(name) for name in plan.modules):
        raise UsageError("an override concerns every layer, so nothing is left for the budget to choose.")
    shapes = _shapes(loaded.model, plan)
    _check_smallest(recipe, _planned_bits(recipe, plan, shapes, plan.modules) / _weights(shapes))
    job = CompressJob.of(loaded, plan, measuring_recipe(recipe), work, calibration)
    # On the windows that the run is solved on: those that judge the run take no part in the choice.
    counts = strategy_of(recipe).window_counts(recipe)
    job = dataclasses.replace(job, windows=CalibrationWindows.of(loaded, recipe, calibration, counts))
    session.say("measuring what bits, groups and ranks of each layer are worth")
    BlockWalk(job, session.console, workers=CostMeter(recipe, job.device, work)).run()
    reports = set(work.reports())
    groups = [GroupCosts.read(work, name) for name in plan.modules if report_of(name) in reports]
    kept = max(1, _TOKENS // recipe.seqlen)
    windows = job.windows.solving[:kept, :_TOKENS]
    stream = BlockStream(loaded.model, plan.blocks, windows, device=job.device, compute=job.compute, batch=kept)
    divergences = divergences_of(session, stream, windows.numel(), groups, work)
    return choose(recipe, loaded.model, groups, divergences)


def measuring_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe under which costs are measured: layers on their own, nothing trained, no adapters."""
    return recipe.changed({"error_aware": 0.0, "refine": "none", "rank": 0, "low_rank_rounds": 0, "solvers": "local"})


def _cheapest_plan(model: nn.Module, recipe: Recipe) -> ModelPlan:
    """Return the plan with every layer that is free to choose on its smallest grid, without an adapter."""
    blocks = find_blocks(model, recipe.blocks)
    overrides = {**recipe.overrides}
    for index, block in enumerate(blocks):
        for name, linear in find_linears(block, blocks.prefix(index)).items():
            if not recipe.override_for(name):
                shape = (linear.out_features, linear.in_features)
                spec = min(candidate_grids(recipe, [shape]), key=lambda spec: stored_bits(recipe, shape, spec, 0))
                overrides[name] = {"bits": spec.bits, "group_size": spec.group_size, "rank": 0}
    return make_plan(blocks, recipe.changed({"overrides": overrides}))


def _ranked(
    recipe: Recipe,
    group: GroupCosts,
    shapes: Mapping[str, tuple[int, ...]],
    divergences: Mapping[str, float],
) -> dict[QuantSpec, list[RankedLayer]]:
    """Return the layers of a group on every grid, their losses in parts of the measured divergence."""
    whole = group.left_by_cheapest
    factor = divergences[group.names[0]] / whole if whole else 0.0
    of_grid = {}
    for grid in group.grids:
        spec = QuantSpec(grid.bits, grid.group_size, recipe.symmetric)
        layers = []
        for name in group.names:
            ranks, none = candidate_ranks(recipe, name, shapes[name]), stored_bits(recipe, shapes[name], spec, 0)
            adapters = [stored_bits(recipe, shapes[name], spec, rank) - none for rank in ranks]
            losses = [factor * left for left in grid.left[name]]
            layers.append(RankedLayer(name, none, ranks, adapters, losses))
        of_grid[spec] = layers
    return of_grid


def choose(
    recipe: Recipe, model: nn.Module, groups: Sequence[GroupCosts], divergences: Mapping[str, float]
) -> Budgeted:
    """Return what the budget is spent on.

    Args:
        recipe: every option; `budget` is in bits per weight.
        model: the float model.
        groups: the costs of each group of layers.
        divergences: first layer of a group -> divergence with the group on its cheapest grid.

    Raises:
        UsageError: the budget cannot be met.
    """
    plan = make_plan(find_blocks(model, recipe.blocks), recipe)
    shapes = _shapes(model, plan)
    free = {name for group in groups for name in group.names}
    taken = _planned_bits(recipe, plan, shapes, plan.modules.keys() - free)
    hulls = [hull_of_group(_ranked(recipe, group, shapes, divergences)) for group in groups]
    weights = _weights(shapes)
    smallest = (taken + sum(hull[0].stored_bits for hull in hulls)) / weights
    _check_smallest(recipe, smallest)
    choices = allocate(hulls, math.floor(recipe.budget * weights) - taken)
    settings = {
        name: {"bits": choice.spec.bits, "group_size": choice.spec.group_size, "rank": rank}
        for choice in choices
        for name, rank in choice.ranks.items()
    }
    overrides = {**recipe.overrides, **{name: settings[name] for name in plan.modules if name in settings}}
    spent = (taken + sum(choice.stored_bits for choice in choices)) / weights
    return Budgeted(recipe.changed({"overrides": overrides}), spent, smallest, tuple(choices))


def _check_smallest(recipe: Recipe, smallest: float) -> None:
    if recipe.budget < smallest:
        raise UsageError(
            f"a budget of {recipe.budget:g} bits per weight cannot be met: the smallest that these layers can take is "
            f"{math.ceil(smallest * 1000) / 1000:g}; choose that or more as `budget`."
        )


def _shapes(model: nn.Module, plan: ModelPlan) -> dict[str, tuple[int, ...]]:
    return {name: tuple(cast(torch.Tensor, model.get_submodule(name).weight).shape) for name in plan.modules}


def _weights(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _planned_bits(recipe: Recipe, plan: ModelPlan, shapes: Mapping[str, tuple[int, ...]], names: Iterable[str]) -> int:
    """Return what some layers of a plan take, as they are planned."""
    return sum(stored_bits(recipe, shapes[name], plan.modules[name].spec, plan.modules[name].rank) for name in names)
