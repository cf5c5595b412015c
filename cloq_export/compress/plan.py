"""Decide, before anything is computed, what happens to every linear layer of a model, and refuse what cannot work."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import nn

from cloq_export.compress.left_float import (
    MOST_UNFIT,
    SHARED,
    adapter_fault,
    layout_fault,
    short_reason,
    spared_reason,
)
from cloq_export.errors import RecipeError, ShapeError, UnsupportedModelError
from cloq_export.formats.registry import LAYOUTS
from cloq_export.models.blocks import BlockList, find_linears
from cloq_export.models.weights_on_disk import in_memory
from cloq_export.quantize import reach_fault
from cloq_export.recipe import Recipe
from cloq_export.types import QuantSpec

_SHOWN_FAULTS = 3
# Options of an override that choose how the codes of a layer are made.
_GRID = {"bits", "group_size"}


@dataclasses.dataclass(frozen=True)
class ModulePlan:
    """What happens to one linear layer.

    Args:
        name: full module name.
        spec: its grid.
        rank: rank of its adapter, 0 for none.
    """

    name: str
    spec: QuantSpec
    rank: int


@dataclasses.dataclass(frozen=True)
class ModelPlan:
    """What happens to every linear layer of a model's blocks.

    Args:
        blocks: the decoder blocks.
        modules: full module name -> plan, in order of blocks; layers that stay float are absent.
        unfit: full module name -> why its numbers cannot be stored as codes; these stay float without being asked to.
        asked: `modules` and those that are unfit.
        spared: full module name -> why it stays float in any run that does not name it, such as gates.
        unadapted: full module name -> why it has no adapter though the recipe's rank is not 0.
        sizes: full module name -> number of weights, of all linear layers of the blocks, each weight once.
        copies: full module name -> the layer of an earlier block whose weight it shares; that one is planned for both.
    """

    blocks: BlockList
    modules: dict[str, ModulePlan]
    unfit: Mapping[str, str] = dataclasses.field(default_factory=dict)
    asked: Mapping[str, ModulePlan] = dataclasses.field(default_factory=dict)
    spared: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unadapted: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def ends(self) -> list[str]:
        """Return the planned modules outside of the blocks: head and embeddings."""
        inside = f"{self.blocks.name}."
        return [name for name in self.modules if not name.startswith(inside)]

    def of_block(self, index: int) -> dict[str, ModulePlan]:
        """Return the plans of one block's layers."""
        prefix = self.blocks.prefix(index) + "."
        return {name: plan for name, plan in self.modules.items() if name.startswith(prefix)}


def make_plan(blocks: BlockList, recipe: Recipe) -> ModelPlan:
    """Return the plan of a recipe for a model.

    Args:
        blocks: the model's decoder blocks.
        recipe: every option of the run.

    Returns:
        ModelPlan.

    Raises:
        RecipeError: a pattern of `overrides` matches no layer, or every layer stays float.
        ShapeError: a group size, a width or a rank does not fit a layer; the first few are named.
    """
    linears, copies = _distinct_linears(blocks)
    shared = set(copies.values())
    sizes = {name: linear.weight.numel() for name, linear in linears.items()}
    modules: dict[str, ModulePlan] = {}
    skipped: list[str] = []
    spared: dict[str, str] = {}
    unadapted: dict[str, str] = {}
    faults: dict[str, str] = {}
    ranks: dict[str, str] = {}
    for name, linear in linears.items():
        settings = recipe.override_for(name)
        if settings.get("skip", False):
            skipped.append(name)
            continue
        if not _GRID.intersection(settings) and (reason := spared_reason(name, linear, blocks)):
            spared[name] = reason
            continue
        spec = QuantSpec(
            settings.get("bits", recipe.bits), settings.get("group_size", recipe.group_size), recipe.symmetric
        )
        plan = ModulePlan(name, spec, recipe.rank_for(name))
        if plan.rank and (reason := SHARED if name in shared else adapter_fault(name, blocks)):
            plan, unadapted[name] = dataclasses.replace(plan, rank=0), reason
        if fault := layout_fault(name, linear, spec, recipe.format):
            faults[name] = fault
        elif fault := _rank_fault(linear, plan):
            ranks[name] = fault
        modules[name] = plan
    _check_patterns(recipe, [*modules, *skipped, *spared])
    for refused, of_override in ((faults, _GRID), (ranks, {"rank"})):
        large = sum(sizes[name] for name in refused) > MOST_UNFIT * sum(sizes.values())
        if large or any(of_override.intersection(recipe.override_for(name)) for name in refused):
            _refuse_unfit([*faults.values(), *ranks.values()])
    for name, fault in faults.items():
        spared[name] = short_reason(name, fault)
        del modules[name]
        unadapted.pop(name, None)
    for name in ranks:
        modules[name] = dataclasses.replace(modules[name], rank=min(linears[name].weight.shape))
    if not modules:
        raise RecipeError("every linear layer is skipped by `overrides`; leave at least one to quantize.")
    unfit = _unfit(blocks, linears, modules)
    return ModelPlan(
        blocks,
        {name: plan for name, plan in modules.items() if name not in unfit},
        unfit,
        modules,
        spared,
        unadapted,
        sizes,
        copies,
    )


def _refuse_unfit(faults: list[str]) -> None:
    hidden = len(faults) - _SHOWN_FAULTS
    more = f" Layers that do not fit either: {hidden} more." if hidden > 0 else ""
    raise ShapeError(" ".join(faults[:_SHOWN_FAULTS]) + more)


def plan_for_codes(blocks: BlockList, specs: Mapping[str, QuantSpec], recipe: Recipe) -> ModelPlan:
    """Return the plan that keeps the codes of a checkpoint and only gives its layers adapters.

    Args:
        blocks: the model's decoder blocks.
        specs: quantized module of the checkpoint -> its grid.
        recipe: every option of the run; its grid is not looked at.

    Returns:
        ModelPlan.

    Raises:
        RecipeError: the checkpoint quantizes what is no linear layer of the blocks, or an override would change codes.
        ShapeError: a rank does not fit a layer, or the layout of the recipe cannot hold the checkpoint's layers.
    """
    linears, copies = _distinct_linears(blocks)
    shared = set(copies.values())
    strange = sorted(set(specs) - set(linears))
    if strange:
        raise RecipeError(
            f"the checkpoint of codes_from quantizes {strange[0]}, which is no linear layer of the model's decoder "
            "blocks; it belongs to another model, or its head or embeddings are quantized, which is not supported."
        )
    modules: dict[str, ModulePlan] = {}
    unadapted: dict[str, str] = {}
    for name in (name for name in linears if name in specs):
        settings = recipe.override_for(name)
        frozen = sorted(set(settings) - {"rank"})
        if frozen:
            raise RecipeError(
                f"the override of {frozen[0]} for {name} would change the codes, and codes_from keeps them; only rank "
                "can be overridden."
            )
        modules[name] = ModulePlan(name, specs[name], settings.get("rank", recipe.rank))
        if modules[name].rank and (reason := SHARED if name in shared else adapter_fault(name, blocks)):
            modules[name], unadapted[name] = dataclasses.replace(modules[name], rank=0), reason
        linear = linears[name]
        try:
            LAYOUTS[recipe.format].check_packable(linear.out_features, linear.in_features, specs[name], name=name)
        except ShapeError as error:
            reason = str(error).partition(" Give this layer")[0]
            raise ShapeError(
                f"{reason} The codes are kept as they are, so choose a layout that holds them: "
                "`format=compressed_tensors`."
            ) from None
        if fault := _rank_fault(linear, modules[name]):
            raise ShapeError(fault)
    _check_patterns(recipe, list(modules))
    return ModelPlan(blocks, modules, unadapted=unadapted, copies=copies)


def _unfit(blocks: BlockList, linears: Mapping[str, nn.Linear], modules: Mapping[str, ModulePlan]) -> dict[str, str]:
    """Return why the numbers of some planned layers cannot be stored as codes."""
    unfit: dict[str, str] = {}
    for index, block in enumerate(blocks):
        inside = [name for name in modules if name.startswith(f"{blocks.prefix(index)}.")]
        with in_memory(block):
            faults = {name: reach_fault(linears[name].weight.detach(), modules[name].spec) for name in inside}
        unfit |= {name: fault for name, fault in faults.items() if fault is not None}
    return unfit


def _distinct_linears(blocks: BlockList) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """Return the linears of all blocks, each weight under its first name, and further names -> the first.

    Raises:
        UnsupportedModelError: two layers of one block share a weight.
    """
    linears: dict[str, nn.Linear] = {}
    copies: dict[str, str] = {}
    first_names: dict[torch.Tensor, str] = {}
    for index, block in enumerate(blocks):
        for name, linear in find_linears(block, blocks.prefix(index)).items():
            first = first_names.setdefault(linear.weight, name)
            if first == name:
                linears[name] = linear
                continue
            if first.startswith(f"{blocks.prefix(index)}."):
                raise UnsupportedModelError(
                    f"{first} and {name} share one weight within a block, where it cannot be quantized for both. "
                    "Choose another architecture."
                )
            copies[name] = first
    return linears, copies


def _rank_fault(linear: nn.Linear, plan: ModulePlan) -> str:
    largest = min(linear.in_features, linear.out_features)
    if plan.rank <= largest:
        return ""
    return (
        f"{plan.name}: rank {plan.rank} is above {largest}, the smaller side of this {linear.out_features} x "
        f"{linear.in_features} layer; lower it with `rank`, or for this layer with "
        f"`overrides='{plan.name}:rank={largest}'`."
    )


def _check_patterns(recipe: Recipe, names: list[str]) -> None:
    for pattern in recipe.overrides:
        alone = recipe.changed({"overrides": {pattern: {"skip": True}}})
        if not any(alone.override_for(name) for name in names):
            raise RecipeError(
                f"the override pattern {pattern!r} matches no linear layer; names look like {names[0]!r}, and * stands "
                "for any characters."
            )
