"""Choose bits, group size and rank of every layer within a budget of stored bits, from measured sensitivities."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.artifact.stored_sizes import bytes_of
from cloq_export.compress.allocation import Choice, RankedLayer, allocate, hull_of_group
from cloq_export.compress.plan import Plan, make_plan
from cloq_export.compress.session import Session, compute_dtype, device_of
from cloq_export.compress.solve import ADAPTER_DTYPES, CLOQ, SolvedLayer
from cloq_export.compress.solvers import LocalSolvers, SolveJob
from cloq_export.compress.walk import BlockWalk
from cloq_export.errors import CloqError, ShapeError, UsageError
from cloq_export.formats.registry import LAYOUTS
from cloq_export.models.blocks import find_blocks, find_linears
from cloq_export.models.source import LoadedModel
from cloq_export.models.stream import BlockStream
from cloq_export.quantize import DampedGram, QuantizeOptions, damp_gram, quantize_group
from cloq_export.recipe import Recipe
from cloq_export.types import QuantSpec

BUDGET_REPORT = "budget"
# The recipe with the choice in it, for editing by hand.
RECIPE_NAME = "recipe.yaml"
_DIVERGENCES = "divergences"

BITS = (2, 3, 4)
GROUP_SIZES = (32, 64, 128)
RANKS = (0, 8, 16, 32, 64, 128)
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
    choices: tuple[Choice, ...]

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
    held = Recipe.from_mapping(RunDirectory.open(out).recipe)
    given = list(recipe.overrides.items())
    if held.budget != recipe.budget or list(held.overrides.items())[: len(given)] != given:
        return recipe
    return recipe.changed({"overrides": held.overrides})


def has_chosen(directory: RunDirectory, recipe: Recipe) -> bool:
    """Return whether the overrides of a run's recipe are what its budget was spent on."""
    if BUDGET_REPORT not in directory.reports():
        return False
    return bool(directory.read_report(BUDGET_REPORT)["overrides"] == recipe.to_mapping()["overrides"])


class CostMeter:
    """Solves nothing but the cheapest grid, and notes what every other one would leave with every rank.

    The loss of a layer is `sum_{k > r} s_k^2`, s the singular values of `(Q - W) R^T`, `R^T R = H`: what the closed
    form of rank r leaves (CLoQ Theorem 3.1).

    Args:
        recipe: every option of the run.
        device: where to solve.
        directory: where the figures go, under a report of its own for each group.
    """

    def __init__(self, recipe: Recipe, device: torch.device, directory: RunDirectory) -> None:
        self._recipe = recipe
        self._device = device
        self._directory = directory
        self._cheapest = LocalSolvers([device])

    def solve(self, jobs: Iterable[SolveJob]) -> Iterator[dict[str, SolvedLayer]]:
        """Yield the layers of each job on its cheapest grid, after the costs of all grids were written."""
        for job in jobs:
            free = [plan.name for plan in job.plans if not self._recipe.override_for(plan.name)]
            for solved in self._cheapest.solve([job]):
                if free:
                    self._directory.write_report(_report_of(job.plans[0].name), self._measure(job, free, solved))
                yield solved

    @torch.no_grad()
    def _measure(self, job: SolveJob, names: Sequence[str], cheapest: Mapping[str, SolvedLayer]) -> dict[str, Any]:
        gram = job.stats.gram.to(self._device)
        empty = job.stats.tokens == 0 or float(gram.diagonal().sum()) == 0.0
        damped = None if empty else damp_gram(gram, self._recipe.damping)
        recipe = self._recipe
        options = QuantizeOptions(recipe.method, recipe.grid, recipe.magr_alpha, recipe.sweeps, recipe.refit)
        weights = [job.weights[name].to(self._device, torch.float32) for name in names]
        shapes = [tuple(weight.shape) for weight in weights]
        grids = []
        for spec in candidate_grids(recipe, shapes):
            layers = quantize_group(weights, spec, damped, options).layers
            left = {
                name: _left_by_rank(weight - layer.dequantize(), damped, candidate_ranks(recipe, shape))
                for name, weight, layer, shape in zip(names, weights, layers, shapes, strict=True)
            }
            grids.append({"bits": spec.bits, "group_size": spec.group_size, "left": left})
        stored = (weight - cheapest[name].weight for name, weight in zip(names, weights, strict=True))
        return {"grids": grids, "left_by_cheapest": sum(_left_by_rank(error, damped, [0])[0] for error in stored)}


def spend(session: Session, loaded: LoadedModel, work: RunDirectory, windows: torch.Tensor, recipe: Recipe) -> Budgeted:
    """Measure what every grid and rank of every layer would cost the model, and choose within the budget.

    A layer's loss is its share of a measured divergence: the layers that read one input are put on their cheapest
    grid, without adapters, in the float model, and the Kullback-Leibler divergence of its next-token distribution is
    measured; it scales with the squared error that another grid or rank leaves under H.

    Args:
        session: the call.
        loaded: the float model.
        work: where figures go, from which an interrupted call continues; its recipe is `measuring_recipe`.
        windows: calibration token ids, (samples, seqlen).
        recipe: every option of the run; layers that its overrides concern stay as these say.

    Returns:
        Budgeted.

    Raises:
        UsageError: the budget cannot be met, the smallest that can is named; or nothing is left to choose. Both before
            anything is measured.
        CloqError: as a run.
    """
    device = device_of(recipe)
    plan = _cheapest_plan(loaded.model, recipe)
    if all(recipe.override_for(name) for name in plan.modules):
        raise UsageError("an override concerns every layer, so nothing is left for the budget to choose.")
    shapes = _shapes(loaded.model, plan)
    _check_smallest(recipe, _planned_bits(recipe, plan, shapes, plan.modules) / _weights(shapes))
    measuring = measuring_recipe(recipe)
    compute = compute_dtype(recipe, device)
    session.say("measuring what bits, groups and ranks of each layer are worth")
    walk = BlockWalk(
        loaded.model,
        plan,
        measuring,
        work,
        windows,
        device=device,
        compute=compute,
        kept_codes=None,
        console=session.console,
        solvers=CostMeter(recipe, device, work),
    )
    walk.run()
    reports = set(work.reports())
    groups = [work.read_report(_report_of(name)) for name in plan.modules if _report_of(name) in reports]
    kept = max(1, _TOKENS // windows.shape[1])
    stream = BlockStream(
        loaded.model, plan.blocks, windows[:kept, :_TOKENS], device=device, compute=compute, batch=kept
    )
    divergences = _divergences(session, stream, windows[:kept, :_TOKENS].numel(), groups, work)
    return choose(recipe, loaded.model, groups, divergences)


def measuring_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe under which costs are measured: layers on their own, nothing trained, no adapters."""
    return recipe.changed({"error_aware": 0.0, "refine": "none", "rank": 0, "solvers": "local"})


def candidate_grids(recipe: Recipe, shapes: Sequence[tuple[int, ...]]) -> list[QuantSpec]:
    """Return the grids that layers of some shapes, (out, in), can take in the recipe's layout.

    Raises:
        ShapeError: there is none.
    """
    sizes = dict.fromkeys((*GROUP_SIZES, recipe.group_size))
    found = []
    for bits in BITS:
        for size in sizes:
            spec = QuantSpec(bits, size, recipe.symmetric)
            with contextlib.suppress(CloqError):
                for out_features, in_features in shapes:
                    spec.group_count(in_features)
                    LAYOUTS[recipe.format].check_packable(out_features, in_features, spec)
                found.append(spec)
    if not found:
        raise ShapeError(
            f"no grid of {', '.join(map(str, BITS))} bits with groups of {', '.join(map(str, sizes))} fits layers of "
            f"{' and '.join(f'{out} x {into}' for out, into in shapes)}; leave them in float with --override."
        )
    return found


def candidate_ranks(recipe: Recipe, shape: tuple[int, ...]) -> list[int]:
    """Return the ranks that a layer of a shape, (out, in), can take: at most the recipe's."""
    largest = min(recipe.rank, *shape)
    return sorted({*(rank for rank in RANKS if rank <= largest), largest})


def _cheapest_plan(model: nn.Module, recipe: Recipe) -> Plan:
    """Return the plan with every layer that is free to choose on its smallest grid, without an adapter."""
    blocks = find_blocks(model, recipe.blocks)
    overrides = {**recipe.overrides}
    for index, block in enumerate(blocks):
        for name, linear in find_linears(block, blocks.prefix(index)).items():
            if not recipe.override_for(name):
                shape = (linear.out_features, linear.in_features)
                spec = min(candidate_grids(recipe, [shape]), key=lambda spec: _stored_bits(recipe, shape, spec, 0))
                overrides[name] = {"bits": spec.bits, "group_size": spec.group_size, "rank": 0}
    return make_plan(blocks, recipe.changed({"overrides": overrides}))


def _divergences(
    session: Session,
    stream: BlockStream,
    tokens: int,
    groups: Sequence[Mapping[str, Any]],
    work: RunDirectory,
) -> dict[str, float]:
    """Return the divergence of the model with each group of layers as `work` holds it, by the group's first layer."""
    found: dict[str, float] = dict(work.read_report(_DIVERGENCES)) if _DIVERGENCES in work.reports() else {}
    of_group = [list(group["grids"][0]["left"]) for group in groups]
    missing = [names for names in of_group if names[0] not in found]
    if not missing:
        return found
    hidden = stream.hidden[0]
    with torch.no_grad(), session.progress("measure each layer's weight in the whole") as progress:
        expected = _log_probabilities(stream, _through(stream, 0, hidden))
        for index, block in enumerate(stream.blocks):
            linears = find_linears(block, stream.blocks.prefix(index))
            for names in (names for names in missing if names[0] in linears):
                with stream.block_on_device(index), _replaced(linears, names, work):
                    after = stream.forward_batch(index, 0, hidden)
                reached = _log_probabilities(stream, _through(stream, index + 1, after))
                divergence = nn.functional.kl_div(reached, expected, reduction="sum", log_target=True)
                # Rounding can leave a sum of almost nothing below zero.
                found[names[0]] = max(0.0, float(divergence) / tokens)
                work.write_report(_DIVERGENCES, found)
                progress(len(found), len(of_group))
            hidden = stream.forward_batch(index, 0, hidden)
    return found


def _through(stream: BlockStream, start: int, hidden: torch.Tensor) -> torch.Tensor:
    for index in range(start, len(stream.blocks)):
        hidden = stream.forward_batch(index, 0, hidden)
    return hidden


def _log_probabilities(stream: BlockStream, hidden: torch.Tensor) -> torch.Tensor:
    return stream.differentiable_logits(0, hidden, slice(None)).float().log_softmax(dim=-1)


@contextlib.contextmanager
def _replaced(linears: Mapping[str, nn.Linear], names: Sequence[str], work: RunDirectory) -> Iterator[None]:
    """Put the codes of a run into some linears for a while."""
    kept = {name: linears[name].weight.data for name in names}
    try:
        for name, weight in kept.items():
            linears[name].weight.data = work.read_codes(name).dequantize().to(weight)
        yield
    finally:
        for name, weight in kept.items():
            linears[name].weight.data = weight


def _left_by_rank(error: torch.Tensor, damped: DampedGram | None, ranks: Sequence[int]) -> list[float]:
    """Return `sum_{k > r} s_k^2` of an error (out, in) under H for each rank r."""
    weighted = (error if damped is None else damped.weighted(error)).to(torch.float64)
    gram = weighted @ weighted.t() if weighted.shape[0] <= weighted.shape[1] else weighted.t() @ weighted
    squares = torch.linalg.eigvalsh(gram).clamp_min(0.0)  # ascending
    return [float(squares[: len(squares) - rank].sum()) for rank in ranks]


def _ranked(
    recipe: Recipe,
    group: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    divergences: Mapping[str, float],
) -> dict[QuantSpec, list[RankedLayer]]:
    """Return the layers of a group on every grid, their losses in parts of the measured divergence."""
    names = list(group["grids"][0]["left"])
    whole = group["left_by_cheapest"]
    factor = divergences[names[0]] / whole if whole else 0.0
    found = {}
    for grid in group["grids"]:
        spec = QuantSpec(grid["bits"], grid["group_size"], recipe.symmetric)
        layers = []
        for name in names:
            ranks, none = candidate_ranks(recipe, shapes[name]), _stored_bits(recipe, shapes[name], spec, 0)
            adapters = [_stored_bits(recipe, shapes[name], spec, rank) - none for rank in ranks]
            losses = [factor * left for left in grid["left"][name]]
            layers.append(RankedLayer(name, none, ranks, adapters, losses))
        found[spec] = layers
    return found


def _stored_bits(recipe: Recipe, shape: tuple[int, ...], spec: QuantSpec, rank: int) -> int:
    """Return the bits of codes, scales, zeros and adapter of a layer, as `cloq inspect` counts them."""
    layout = LAYOUTS[recipe.format]
    parts = layout.headers(shape[0], shape[1], spec)
    coded = bytes_of(header for part, header in parts.items() if layout.roles[part] != "index")
    return 8 * (coded + rank * sum(shape) * ADAPTER_DTYPES[recipe.adapter_dtype].itemsize)


def _report_of(module: str) -> str:
    return f"costs-{module}"


def choose(
    recipe: Recipe, model: nn.Module, groups: Sequence[Mapping[str, Any]], divergences: Mapping[str, float]
) -> Budgeted:
    """Return what the budget is spent on.

    Args:
        recipe: every option; `budget` is in bits per weight.
        model: the float model.
        groups: what `CostMeter` wrote of each group of layers.
        divergences: first layer of a group -> divergence with the group on its cheapest grid.

    Raises:
        UsageError: the budget cannot be met.
    """
    plan = make_plan(find_blocks(model, recipe.blocks), recipe)
    shapes = _shapes(model, plan)
    free = {name for group in groups for name in group["grids"][0]["left"]}
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
            f"{math.ceil(smallest * 1000) / 1000:g}; choose that or more with --budget."
        )


def _shapes(model: nn.Module, plan: Plan) -> dict[str, tuple[int, ...]]:
    return {name: tuple(cast(torch.Tensor, model.get_submodule(name).weight).shape) for name in plan.modules}


def _weights(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _planned_bits(recipe: Recipe, plan: Plan, shapes: Mapping[str, tuple[int, ...]], names: Iterable[str]) -> int:
    """Return what some layers of a plan take, as they are planned."""
    return sum(_stored_bits(recipe, shapes[name], plan.modules[name].spec, plan.modules[name].rank) for name in names)
