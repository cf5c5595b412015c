"""Decide, before anything is computed, what happens to every linear layer of a model, and refuse what cannot work."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Container, Mapping

import torch
from torch import nn

from cloq_export.errors import CloqError, RecipeError, ShapeError, UnsupportedModelError
from cloq_export.formats.registry import LAYOUTS
from cloq_export.models.blocks import BlockList, find_linears
from cloq_export.models.weights_on_disk import in_memory
from cloq_export.quantize import reach_fault
from cloq_export.recipe import Recipe
from cloq_export.types import QuantSpec

_SHOWN_FAULTS = 3


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
class Plan:
    """What happens to every linear layer of a model's blocks.

    Args:
        blocks: the decoder blocks.
        modules: full module name -> plan, in order of blocks; layers that stay float are absent.
        unfit: full module name -> why its numbers cannot be stored as codes; these stay float though nobody asked.
        asked: `modules` and those that are unfit.
    """

    blocks: BlockList
    modules: dict[str, ModulePlan]
    unfit: Mapping[str, str] = dataclasses.field(default_factory=dict)
    asked: Mapping[str, ModulePlan] = dataclasses.field(default_factory=dict)

    def of_block(self, index: int) -> dict[str, ModulePlan]:
        """Return the plans of one block's layers."""
        prefix = self.blocks.prefix(index) + "."
        return {name: plan for name, plan in self.modules.items() if name.startswith(prefix)}


def make_plan(blocks: BlockList, recipe: Recipe) -> Plan:
    """Return the plan of a recipe for a model.

    Args:
        blocks: the model's decoder blocks.
        recipe: every option of the run.

    Returns:
        Plan.

    Raises:
        RecipeError: a pattern of `overrides` matches no layer, or every layer stays float.
        ShapeError: a group size, a width or a rank does not fit a layer; the first few are named.
    """
    modules: dict[str, ModulePlan] = {}
    skipped: list[str] = []
    faults: list[str] = []
    for index, block in enumerate(blocks):
        for name, linear in find_linears(block, blocks.prefix(index)).items():
            settings = recipe.override_for(name)
            if settings.get("skip", False):
                skipped.append(name)
                continue
            spec = QuantSpec(
                settings.get("bits", recipe.bits), settings.get("group_size", recipe.group_size), recipe.symmetric
            )
            plan = ModulePlan(name, spec, recipe.rank_for(name))
            try:
                _check_fit(linear, plan, recipe.format)
            except CloqError as error:
                faults.append(str(error))
            modules[name] = plan
    if faults:
        hidden = len(faults) - _SHOWN_FAULTS
        more = f" Layers that do not fit either: {hidden} more." if hidden > 0 else ""
        raise ShapeError(" ".join(faults[:_SHOWN_FAULTS]) + more)
    _check_patterns(recipe, [*modules, *skipped])
    _refuse_shared(blocks, modules)
    if not modules:
        raise RecipeError("every linear layer is skipped by --override; leave at least one to quantize.")
    unfit = _unfit(blocks, modules)
    return Plan(blocks, {name: plan for name, plan in modules.items() if name not in unfit}, unfit, modules)


def plan_for_codes(blocks: BlockList, specs: Mapping[str, QuantSpec], recipe: Recipe) -> Plan:
    """Return the plan that keeps the codes of a checkpoint and only gives its layers adapters.

    Args:
        blocks: the model's decoder blocks.
        specs: quantized module of the checkpoint -> its grid.
        recipe: every option of the run; its grid is not looked at.

    Returns:
        Plan.

    Raises:
        RecipeError: the checkpoint quantizes what is no linear layer of the blocks, or an override would change codes.
        ShapeError: a rank does not fit a layer, or the layout of the recipe cannot hold the checkpoint's layers.
    """
    linears = {
        name: linear
        for index, block in enumerate(blocks)
        for name, linear in find_linears(block, blocks.prefix(index)).items()
    }
    strange = sorted(set(specs) - set(linears))
    if strange:
        raise RecipeError(
            f"the checkpoint of codes_from quantizes {strange[0]}, which is no linear layer of the model's decoder "
            "blocks; it belongs to another model, or its head or embeddings are quantized, which is not supported."
        )
    modules: dict[str, ModulePlan] = {}
    for name in (name for name in linears if name in specs):
        settings = recipe.override_for(name)
        frozen = sorted(set(settings) - {"rank"})
        if frozen:
            raise RecipeError(
                f"the override of {frozen[0]} for {name} would change the codes, and codes_from keeps them; only rank "
                "can be overridden."
            )
        modules[name] = ModulePlan(name, specs[name], recipe.rank_for(name))
        linear = linears[name]
        try:
            LAYOUTS[recipe.format].check_packable(linear.out_features, linear.in_features, specs[name], name=name)
        except ShapeError as error:
            reason = str(error).partition(" Give this layer")[0]
            raise ShapeError(
                f"{reason} The codes are kept as they are, so choose a layout that holds them: --set "
                "format=compressed_tensors."
            ) from None
        _check_rank(linear, modules[name])
    _check_patterns(recipe, list(modules))
    _refuse_shared(blocks, modules)
    return Plan(blocks, modules)


def _unfit(blocks: BlockList, modules: Mapping[str, ModulePlan]) -> dict[str, str]:
    """Return why the numbers of some planned layers cannot be stored as codes."""
    unfit: dict[str, str] = {}
    for index, block in enumerate(blocks):
        with in_memory(block):
            for name, linear in find_linears(block, blocks.prefix(index)).items():
                fault = reach_fault(linear.weight.detach(), modules[name].spec) if name in modules else None
                if fault is not None:
                    unfit[name] = fault
    return unfit


def _refuse_shared(blocks: BlockList, planned: Container[str]) -> None:
    """Refuse to quantize a weight that several layers share: each would be given codes of its own."""
    names: dict[torch.Tensor, list[str]] = collections.defaultdict(list)
    for index, block in enumerate(blocks):
        for name, linear in find_linears(block, blocks.prefix(index)).items():
            names[linear.weight].append(name)
    for sharing in names.values():
        if len(sharing) > 1 and any(name in planned for name in sharing):
            raise UnsupportedModelError(
                f"{sharing[0]} and {sharing[1]} share one weight, which cannot be quantized for each of them; "
                f"{' '.join(f'--override {chr(39)}{name}:skip=true{chr(39)}' for name in sharing[:4])}"
                f"{' ...' if len(sharing) > 4 else ''} leaves it in float."
            )


def _check_fit(linear: nn.Linear, plan: ModulePlan, format: str) -> None:
    try:
        plan.spec.group_count(linear.in_features)
    except ShapeError as error:
        raise ShapeError(f"{plan.name}: {error} --override '{plan.name}:skip=true' leaves it in float.") from None
    LAYOUTS[format].check_packable(linear.out_features, linear.in_features, plan.spec, name=plan.name)
    _check_rank(linear, plan)


def _check_rank(linear: nn.Linear, plan: ModulePlan) -> None:
    largest = min(linear.in_features, linear.out_features)
    if plan.rank > largest:
        raise ShapeError(
            f"{plan.name}: rank {plan.rank} is above {largest}, the smaller side of this {linear.out_features} x "
            f"{linear.in_features} layer; lower it with --rank, or for this layer with --override "
            f"'{plan.name}:rank={largest}'."
        )


def _check_patterns(recipe: Recipe, names: list[str]) -> None:
    for pattern in recipe.overrides:
        alone = recipe.changed({"overrides": {pattern: {"skip": True}}})
        if not any(alone.override_for(name) for name in names):
            raise RecipeError(
                f"the override pattern {pattern!r} matches no linear layer; names look like {names[0]!r}, and * stands "
                "for any characters."
            )
