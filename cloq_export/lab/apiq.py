"""ApiQ's two schemes as strategies: ranges and pairs are trained from the float weight instead of being solved."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from cloq_export.compress.block_refined import BlockRefiner, SolvedBlock, solved_problem
from cloq_export.compress.initialisations import CLOQ, ClosedForm
from cloq_export.compress.job import CompressJob
from cloq_export.compress.problem import ADAPTER_DTYPES, Dequantized, LayerProblem, Solution, SolvedLayer
from cloq_export.compress.strategies import BlockRefined
from cloq_export.errors import NonFiniteError, RecipeError
from cloq_export.formats.registry import LAYOUTS
from cloq_export.lab.clipped_layer import ClippedLayer, StoredForm
from cloq_export.models.lockstep import GroupInputs
from cloq_export.recipe import Recipe
from cloq_export.refine import (
    OutputObjective,
    Refinement,
    Schedule,
    TrainableLayer,
    judging_batches,
    squared_error,
    train_layers,
)

# What ApiQ's authors make of the windows where a recipe says 0 steps.
PASSES = 20


class ApiqStart(ClosedForm):
    """Codes rounded on nearly their whole range, and a pair whose B is zero; CLoQ's closed form is the bound.

    Args:
        name: of the scheme, as recipes and certificates name it.
    """

    makes_codes = True

    def __init__(self, name: str) -> None:
        self._name = name

    def solve(self, problems: Sequence[LayerProblem], recipe: Recipe) -> Iterator[Solution]:
        """Yield codes and pairs of layers that read one input, in their order."""
        for problem in problems:
            if not bool(problem.weight.isfinite().all()):
                raise NonFiniteError(f"{problem.plan.name}: the weight holds NaN or Inf; repair the model first.")
            parameter = nn.Parameter(torch.empty_like(problem.weight), requires_grad=False)
            layer, pair = clipped(parameter, problem, recipe, problem.weight.dtype).result()
            codes = Dequantized(layer, layer.dequantize())
            yield Solution(problem, codes, pair, self.best_pair(problem, codes, recipe))

    def method(self, problem: LayerProblem, recipe: Recipe) -> str:
        """Return what a certificate says of how the codes were made."""
        return self._name


def clipped(parameter: nn.Parameter, problem: LayerProblem, recipe: Recipe, dtype: torch.dtype) -> ClippedLayer:
    """Return a layer as ApiQ trains it, at its start.

    Args:
        parameter: where its weight is put; it is trained on that device.
        problem: the layer.
        recipe: every option of the run.
        dtype: in which the forward pass multiplies weights.
    """
    plan, least_zero = problem.plan, LAYOUTS[recipe.format].least_zero
    form = StoredForm(plan.spec, plan.rank, ADAPTER_DTYPES[recipe.adapter_dtype], least_zero)
    seed = recipe.seed ^ zlib.crc32(plan.name.encode())
    return ClippedLayer(parameter, problem.weight.to(parameter.device), form, dtype=dtype, seed=seed)


class BlockWiseRefiner(BlockRefiner):
    """Trains ranges and pairs of a block together on what the float model's block puts out."""

    def refine(self, block: SolvedBlock) -> dict[str, SolvedLayer]:
        """Return the layers of a block as they are stored."""
        return self.refine_block(block, block.float_outputs)

    def refine_block(self, block: SolvedBlock, targets: Sequence[torch.Tensor]) -> dict[str, SolvedLayer]:
        """Train the layers of a block together, and keep the pairs that were trained."""
        refinement = self._train(block, self._install(block), targets)
        return self._finished(self._candidates(block.solved, refinement), refinement, refinement.error_after)

    @staticmethod
    def _measure(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return squared_error(output, target)

    def _steps(self, trained: int) -> int:
        return self._recipe.refine_steps or PASSES * max(1, trained)

    def _trainable(self, parameter: nn.Parameter, layer: SolvedLayer) -> TrainableLayer:
        return clipped(parameter, solved_problem(layer), self._recipe, self._dtype)


class LayerWiseRefiner(BlockWiseRefiner):
    """Trains the range and pair of each layer alone, on its own output."""

    def refine_group(
        self, solved: Mapping[str, SolvedLayer], inputs: GroupInputs, judging: Sequence[int], *, paired: bool
    ) -> dict[str, SolvedLayer]:
        """Return the layers of a group, each trained on its own output.

        Args:
            solved: the layers as they start.
            inputs: per stream, the inputs of the batches that reached the layers.
            judging: the batches that judge.
            paired: both streams bring the same tokens. Those of an expert differ, and the float layer is asked about
                the inputs that are really met.
        """
        floating, met = inputs
        asked, batches = (floating if paired else met), sorted(met)
        if not batches:
            return dict(solved)
        # Of an expert's tokens none may stand in what judges; then the last windows that reached it judge.
        held_out = [place for place, batch in enumerate(batches) if batch in judging]
        if not held_out and len(batches) > 1:
            held_out = list(range(len(batches) - judging_batches(len(batches) - 1), len(batches)))
        finished: dict[str, SolvedLayer] = {}
        for name, layer in solved.items():
            parameter = nn.Parameter(layer.weight.to(self._dtype), requires_grad=False)
            weight = solved_problem(layer).weight.to(self._device, self._dtype)
            seen = [met[b].to(self._dtype) for b in batches]
            targets = [nn.functional.linear(asked[b].to(self._dtype), weight) for b in batches]
            trainable = {name: self._trainable(parameter, layer)}

            def forward(batch: int, seen: Sequence[torch.Tensor] = seen, own: nn.Parameter = parameter) -> torch.Tensor:
                return nn.functional.linear(seen[batch], own)

            objective = OutputObjective(trainable, forward, targets, held_out, self._measure)
            if objective.trained and held_out:
                schedule = Schedule(self._steps(len(objective.trained)), self._recipe.seed)
                refinement = train_layers(trainable, objective, schedule)
            else:
                refinement = Refinement(None, math.nan, math.nan, 0, 0, diverged=False)
            finished |= self._finished(self._candidates({name: layer}, refinement), refinement, refinement.error_after)
        return finished

    def refine(self, block: SolvedBlock) -> dict[str, SolvedLayer]:
        """Return the layers of a block as they are: each was trained when its group met its inputs."""
        return dict(block.solved)


class Apiq(BlockRefined):
    """One of ApiQ's schemes.

    Args:
        name: as recipes name it.
        refiner: trains the layers of a block, or of a group.
    """

    def __init__(self, name: str, refiner: type[BlockRefiner]) -> None:
        self._name = name
        self._refiner = refiner
        self._start = ApiqStart(name)

    def check(self, recipe: Recipe, *, keeps_codes: bool) -> None:
        """Refuse another initialisation than the default, and codes that are to be kept.

        Raises:
            RecipeError: the recipe names one of the two.
        """
        if recipe.init != CLOQ:
            raise RecipeError(
                f"refine is {self._name!r}, which makes A and B of its own, and init is {recipe.init!r}; leave it "
                f"at {CLOQ}, or give `refine=block`, which starts from what init makes."
            )
        if keeps_codes:
            raise RecipeError(
                f"refine is {self._name!r}, which makes codes of its own, and the codes are to be kept; give "
                "`refine=block`, which then trains the adapter alone, or `refine=none`."
            )

    def initialisation(self, recipe: Recipe) -> ApiqStart:
        """Return what makes the first codes and pairs."""
        return self._start

    def refiner(self, job: CompressJob, dtype: torch.dtype) -> BlockRefiner:
        """Return what trains the layers, whose weights are multiplied in `dtype`."""
        return self._refiner(job, dtype)


LAYER_WISE = Apiq("apiq-lw", LayerWiseRefiner)
BLOCK_WISE = Apiq("apiq-bw", BlockWiseRefiner)
