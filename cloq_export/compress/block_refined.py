"""Refine what was solved: here the walk through the blocks meets the training of their layers."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from cloq_export.compress.plan import ModulePlan
from cloq_export.compress.solve import (
    ADAPTER_DTYPES,
    CLOQ,
    BestPair,
    LayerProblem,
    SolvedLayer,
    best_pair,
    finish_layer,
    served_weight,
)
from cloq_export.errors import RecipeError
from cloq_export.formats.registry import LAYOUTS
from cloq_export.models.lockstep import GroupInputs
from cloq_export.recipe import APIQ_PASSES, REFINE_STEPS, Recipe
from cloq_export.refine import (
    ClippedLayer,
    OutputObjective,
    Refinement,
    TrainableLayer,
    TrainedLayer,
    held_out_batches,
    held_out_error,
    relative_error,
    squared_error,
    train_layers,
)
from cloq_export.types import LoraPair, QuantizedLayer

# Schemes that make codes and a pair of their own.
APIQ = ("apiq-lw", "apiq-bw")
# Share of the steps over which rates rise: Adam's first steps know one gradient and no more.
WARMUP = 0.1

Forward = Callable[[int], torch.Tensor]


class BlockRefiner:
    """Refines the layers of one block at a time, as the recipe says.

    Args:
        recipe: every option of the run; `refine` is not "none".
        device: where to train.
        dtype: in which the forward pass multiplies weights.
        keeps_codes: only adapters may change.

    Raises:
        RecipeError: the scheme cannot keep codes, or makes a pair of its own.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        device: torch.device,
        dtype: torch.dtype,
        keeps_codes: bool,
    ) -> None:
        if recipe.refine in APIQ and recipe.init != CLOQ:
            raise RecipeError(
                f"refine is {recipe.refine!r}, which makes A and B of its own, and init is {recipe.init!r}; leave it "
                f"at {CLOQ}, or give --refine block, which starts from what init makes."
            )
        if keeps_codes and recipe.refine in APIQ:
            raise RecipeError(
                f"refine is {recipe.refine!r}, which makes codes of its own, and the codes are to be kept; give "
                "--refine block, which then trains the adapter alone, or --refine none."
            )
        self._recipe = recipe
        self._device = device
        self._dtype = dtype
        self._keeps_codes = keeps_codes

    def target_share(self, plans: Mapping[str, ModulePlan]) -> float:
        """Return which share of a block's target is what the float block gives on the float model's own inputs.

        The rest is what the float block gives on the inputs that the compressed block really meets. ApiQ takes the
        float model's outputs alone.
        """
        if self._recipe.refine == "apiq-bw":
            return 1.0
        return self._recipe.target_share(min(plan.spec.bits for plan in plans.values()))

    def refine_block(
        self,
        index: int,
        linears: Mapping[str, nn.Linear],
        solved: Mapping[str, SolvedLayer],
        forward: Forward,
        targets: Sequence[torch.Tensor],
    ) -> dict[str, SolvedLayer]:
        """Train the layers of a block together.

        Args:
            index: number of the block.
            linears: full module name -> layer of the block; their weights are left as they come out.
            solved: the layers to refine.
            forward: runs a batch, by number, through the block as its weights stand.
            targets: per batch, what its output should be.

        Returns:
            The layers as they are stored; those of `solved` where no step was better.
        """
        recipe = self._recipe
        for name, layer in solved.items():
            linears[name].weight.data = layer.weight.to(self._dtype)
        measure = relative_error if recipe.refine == "block" else squared_error
        trainable = {
            name: self._trainable(cast(nn.Parameter, linears[name].weight), layer)
            for name, layer in solved.items()
            if not self._keeps_codes or layer.lora is not None
        }
        if not trainable:
            return dict(solved)
        objective = OutputObjective(trainable, forward, targets, measure)
        steps = self._steps(objective.batches)
        found = train_layers(trainable, objective, steps=steps, seed=recipe.seed + index, warmup=WARMUP)
        refined = {name: (layer.quantized, layer.lora) for name, layer in solved.items()}
        refined |= found.layers or {}
        best = {name: _best_pair(layer, refined[name][0], recipe) for name, layer in solved.items()}
        error = found.error_after
        paired = any(layer.lora is not None for layer in solved.values())
        if recipe.refine == "block" and found.layers and paired and not self._keeps_codes:
            # The pair that is solved for the new codes and scales may beat the one that was trained along with them.
            for name, (quantized, _) in refined.items():
                weight = served_weight(quantized.to(self._device), best[name].pair)
                linears[name].weight.data = weight.to(self._dtype)
            of_solved = held_out_error(forward, targets)
            if of_solved < error:
                error = of_solved
                refined = {name: (quantized, best[name].pair) for name, (quantized, _) in refined.items()}
        return self._finished(solved, refined, best, found, error)

    def refine_group(
        self, solved: Mapping[str, SolvedLayer], inputs: GroupInputs, *, paired: bool
    ) -> dict[str, SolvedLayer]:
        """Train each layer of a group on its own output (ApiQ's layer-wise scheme).

        Args:
            solved: the layers as they start.
            inputs: per stream, the inputs of the batches that reached the layers.
            paired: both streams bring the same tokens. Those of an expert differ, and the float layer is asked about
                the inputs that are really met.

        Returns:
            The layers as they are stored.
        """
        floating, met = inputs
        asked, batches = (floating if paired else met), sorted(met)
        if not batches:
            return dict(solved)
        finished: dict[str, SolvedLayer] = {}
        for name, layer in solved.items():
            parameter = nn.Parameter(layer.weight.to(self._dtype), requires_grad=False)
            weight = _problem(layer).weight.to(self._device, self._dtype)
            seen = [met[b].to(self._dtype) for b in batches]
            targets = [nn.functional.linear(asked[b].to(self._dtype), weight) for b in batches]
            trainable = {name: self._trainable(parameter, layer)}
            objective = OutputObjective(trainable, _linear(seen, parameter), targets, squared_error)
            found = train_layers(trainable, objective, steps=self._steps(len(batches)), seed=self._recipe.seed)
            refined = {name: (found.layers or {name: (layer.quantized, layer.lora)})[name]}
            best = {name: _best_pair(layer, refined[name][0], self._recipe)}
            finished |= self._finished({name: layer}, refined, best, found, found.error_after)
        return finished

    def start_group(self, solved: Mapping[str, SolvedLayer]) -> dict[str, SolvedLayer]:
        """Return the layers of a group as ApiQ starts them: rounded on nearly their whole range, B zero."""
        started: dict[str, SolvedLayer] = {}
        for name, layer in solved.items():
            quantized, lora = self._clipped(nn.Parameter(torch.empty_like(layer.weight)), layer).result()
            best = _best_pair(layer, quantized, self._recipe)
            started[name] = _finish(layer, quantized, lora, best, self._recipe, {"method": self._recipe.refine})
        return started

    def _steps(self, batches: int) -> int:
        if self._recipe.refine not in APIQ:
            return self._recipe.refine_steps or REFINE_STEPS
        return self._recipe.refine_steps or APIQ_PASSES * max(1, batches - len(held_out_batches(batches)))

    def _trainable(self, parameter: nn.Parameter, layer: SolvedLayer) -> TrainableLayer:
        if self._recipe.refine in APIQ:
            return self._clipped(parameter, layer)
        # An adapter corrects what moved codes would, and with fewer numbers: beside it they only learn the windows.
        moves_codes = not self._keeps_codes and layer.lora is None
        return TrainedLayer(
            parameter,
            layer.quantized.to(self._device),
            layer.lora and layer.lora.to(self._device),
            dtype=self._dtype,
            scales=not self._keeps_codes,
            weight=_problem(layer).weight.to(self._device) if moves_codes else None,
        )

    def _clipped(self, parameter: nn.Parameter, layer: SolvedLayer) -> ClippedLayer:
        problem, recipe = _problem(layer), self._recipe
        plan = problem.plan
        return ClippedLayer(
            parameter,
            problem.weight.to(self._device),
            plan.spec,
            plan.rank,
            adapter_dtype=ADAPTER_DTYPES[recipe.adapter_dtype],
            dtype=self._dtype,
            seed=recipe.seed ^ zlib.crc32(plan.name.encode()),
            least_zero=LAYOUTS[recipe.format].least_zero,
        )

    def _finished(
        self,
        solved: Mapping[str, SolvedLayer],
        refined: Mapping[str, tuple[QuantizedLayer, LoraPair | None]],
        best: Mapping[str, BestPair],
        found: Refinement,
        error: float,
    ) -> dict[str, SolvedLayer]:
        """Return the refined layers with certificates; where nothing was better, the start with a note."""
        fields: dict[str, Any] = {
            "refined_error_before": finite(found.error_before),
            "refined_error_after": finite(error),
            "refined_step": found.best_step,
        }
        if self._recipe.refine in APIQ:
            fields["method"] = self._recipe.refine
        finished: dict[str, SolvedLayer] = {}
        for name, layer in solved.items():
            quantized, lora = refined[name]
            notes = () if found.layers else (kept_start(found),)
            finished[name] = _finish(layer, quantized, lora, best[name], self._recipe, fields, notes)
        return finished


def _linear(inputs: Sequence[torch.Tensor], weight: torch.Tensor) -> Forward:
    return lambda batch: nn.functional.linear(inputs[batch], weight)


def _problem(layer: SolvedLayer) -> LayerProblem:
    assert layer.problem is not None  # what is refined was solved here
    return layer.problem


def _best_pair(layer: SolvedLayer, quantized: QuantizedLayer, recipe: Recipe) -> BestPair:
    problem = _problem(layer)
    return best_pair(problem, quantized.to(problem.weight.device), recipe)


def _finish(
    layer: SolvedLayer,
    quantized: QuantizedLayer,
    lora: LoraPair | None,
    best: BestPair,
    recipe: Recipe,
    fields: Mapping[str, Any],
    notes: tuple[str, ...] = (),
) -> SolvedLayer:
    problem = _problem(layer)
    # Where the device had no memory for it the problem stands on the CPU.
    device = problem.weight.device
    return finish_layer(problem, quantized.to(device), lora and lora.to(device), best, recipe, fields, notes)


def finite(error: float) -> float | None:
    """Return an error as certificates hold it."""
    return error if math.isfinite(error) else None


def kept_start(found: Refinement) -> str:
    """Return the note of a layer whose refinement brought nothing."""
    how = "the error turned NaN or Inf" if found.diverged else "no step was better on the windows held out"
    return f"the refinement was given up after {found.steps} steps and the layer kept at its start: {how}"
