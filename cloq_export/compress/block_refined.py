"""Refine the layers of one block together: here the walk through the blocks meets the training of their layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from cloq_export.compress.problem import Dequantized, LayerProblem, Solution, SolvedLayer
from cloq_export.compress.solve import finish_layer
from cloq_export.models.lockstep import GroupInputs
from cloq_export.models.stream import BlockStream
from cloq_export.recipe import REFINE_STEPS
from cloq_export.refine import (
    OutputObjective,
    Refinement,
    Schedule,
    TrainableLayer,
    TrainedLayer,
    mean_error,
    relative_error,
    train_layers,
)
from cloq_export.types import LoraPair, QuantizedLayer

if TYPE_CHECKING:
    from cloq_export.compress.job import CompressJob

# Share of the steps over which the rate rises: Adam's first steps follow a single gradient.
WARMUP = 0.1


@dataclasses.dataclass(frozen=True)
class SolvedBlock:
    """A block whose layers are solved, with its inputs and the outputs it should have.

    Args:
        index: number of the block.
        linears: full module name -> layer of the block, with its float weight.
        solved: the layers to refine.
        stream: runs the block as its weights stand.
        inputs: per batch, what comes out of the compressed blocks before it.
        float_outputs: per batch, what the float block gives on the float model's inputs.
        judging: the batches that judge; no layer was solved on them.
    """

    index: int
    linears: Mapping[str, nn.Linear]
    solved: Mapping[str, SolvedLayer]
    stream: BlockStream
    inputs: Sequence[torch.Tensor]
    float_outputs: Sequence[torch.Tensor]
    judging: Sequence[int]

    def forward(self, batch: int) -> torch.Tensor:
        """Run a batch through the block as its weights stand."""
        return self.stream.differentiable_batch(self.index, batch, self.inputs[batch])


class BlockRefiner:
    """Trains scales and pairs of a block's layers, or codes where there is no pair, on the block's output.

    Args:
        job: what is compressed; where it keeps codes, only pairs change.
        dtype: in which the forward pass multiplies weights.
    """

    def __init__(self, job: CompressJob, dtype: torch.dtype) -> None:
        self._job = job
        self._recipe = job.recipe
        self._device = job.device
        self._dtype = dtype
        self._keeps_codes = job.kept_codes is not None
        self._initialisation = job.strategy.initialisation(job.recipe)

    def refine_group(
        self, solved: dict[str, SolvedLayer], inputs: GroupInputs, judging: Sequence[int], *, paired: bool
    ) -> dict[str, SolvedLayer]:
        """Return the layers of a group as the next groups of the block meet them: here as they were solved.

        Args:
            solved: the layers as they start.
            inputs: per stream, the inputs of the batches that reached the layers.
            judging: the batches that judge.
            paired: both streams bring the same tokens.
        """
        return dict(solved)

    def refine(self, block: SolvedBlock) -> dict[str, SolvedLayer]:
        """Return the layers of a block as they are stored.

        A block's target is in part what the float block gives on the float model's own inputs. The rest is what the
        float block gives on the inputs that the compressed block really meets.
        """
        share = self._recipe.target_share(min(layer.certificate.bits for layer in block.solved.values()))
        targets = list(block.float_outputs)
        if share < 1.0:
            own = block.stream.forward_block(block.index, block.inputs)
            targets = [torch.lerp(mine, floats, share) for mine, floats in zip(own, targets, strict=True)]
        return self.refine_block(block, targets)

    def refine_block(self, block: SolvedBlock, targets: Sequence[torch.Tensor]) -> dict[str, SolvedLayer]:
        """Train the layers of a block together.

        Args:
            block: its weights are left as they come out.
            targets: per batch, what its output should be.

        Returns:
            The layers as they are stored; those of `block.solved` where no step was better.
        """
        trainable = self._install(block)
        if not trainable:
            return dict(block.solved)
        refinement = self._train(block, trainable, targets)
        candidates = self._candidates(block.solved, refinement)
        error = refinement.error_after
        paired = any(layer.lora is not None for layer in block.solved.values())
        if refinement.layers and paired and not self._keeps_codes:
            # The pair that is solved for the new codes and scales may beat the one that was trained along with them.
            for name, candidate in candidates.items():
                weight = candidate.codes.served(candidate.best.pair)
                block.linears[name].weight.data = weight.to(self._device, self._dtype)
            of_solved = mean_error(block.forward, targets, block.judging)
            if of_solved < error:
                error = of_solved
                candidates = {
                    name: dataclasses.replace(candidate, pair=candidate.best.pair)
                    for name, candidate in candidates.items()
                }
        return self._finished(candidates, refinement, error)

    def _install(self, block: SolvedBlock) -> dict[str, TrainableLayer]:
        """Put the start of each layer into the block; return those that can be trained."""
        for name, layer in block.solved.items():
            block.linears[name].weight.data = layer.weight.to(self._dtype)
        return {
            name: self._trainable(cast(nn.Parameter, block.linears[name].weight), layer)
            for name, layer in block.solved.items()
            if not self._keeps_codes or layer.lora is not None
        }

    def _train(
        self, block: SolvedBlock, trainable: Mapping[str, TrainableLayer], targets: Sequence[torch.Tensor]
    ) -> Refinement:
        objective = OutputObjective(trainable, block.forward, targets, block.judging, self._measure)
        steps, seed = self._steps(len(objective.trained)), self._recipe.seed + block.index
        return train_layers(trainable, objective, Schedule(steps, seed, warmup=WARMUP))

    @staticmethod
    def _measure(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return relative_error(output, target)

    def _steps(self, trained: int) -> int:
        return self._recipe.refine_steps or REFINE_STEPS

    def _trainable(self, parameter: nn.Parameter, layer: SolvedLayer) -> TrainableLayer:
        # An adapter corrects the same errors with fewer numbers; codes trained beside it would overfit the windows.
        moves_codes = not self._keeps_codes and layer.lora is None
        return TrainedLayer(
            parameter,
            (layer.quantized.to(self._device), layer.lora and layer.lora.to(self._device)),
            dtype=self._dtype,
            scales=not self._keeps_codes,
            weight=solved_problem(layer).weight.to(self._device) if moves_codes else None,
        )

    def _candidates(self, solved: Mapping[str, SolvedLayer], refinement: Refinement) -> dict[str, Solution]:
        """Return the layers as training left them, or as they were solved where it brought nothing."""
        trained = refinement.layers or {}
        return {
            name: self._solution(layer, *trained.get(name, (layer.quantized, layer.lora)))
            for name, layer in solved.items()
        }

    def _solution(self, layer: SolvedLayer, quantized: QuantizedLayer, pair: LoraPair | None) -> Solution:
        problem = solved_problem(layer)
        # If the device ran out of memory, the problem is on the CPU.
        device = problem.weight.device
        codes = Dequantized.of(quantized, device)
        best = self._initialisation.best_pair(problem, codes, self._recipe)
        return Solution(problem, codes, pair and pair.to(device), best)

    def _finished(
        self, candidates: Mapping[str, Solution], refinement: Refinement, error: float
    ) -> dict[str, SolvedLayer]:
        """Return the refined layers with certificates; where nothing was better, the start with a note."""
        notes = () if refinement.layers else (kept_start(refinement),)
        finished = {}
        for name, candidate in candidates.items():
            layer = finish_layer(candidate, self._recipe, self._initialisation, notes)
            certificate = dataclasses.replace(
                layer.certificate,
                refined_error_before=finite(refinement.error_before),
                refined_error_after=finite(error),
                refined_step=refinement.best_step,
            )
            finished[name] = dataclasses.replace(layer, certificate=certificate)
        return finished


def solved_problem(layer: SolvedLayer) -> LayerProblem:
    """Return what a layer that was solved in this process was solved for."""
    assert layer.problem is not None
    return layer.problem


def finite(error: float) -> float | None:
    """Return an error as certificates hold it."""
    return error if math.isfinite(error) else None


def kept_start(refinement: Refinement) -> str:
    """Return the note of a layer whose refinement brought nothing."""
    how = "the error turned NaN or Inf" if refinement.diverged else "no step was better on the windows that judge"
    if not refinement.diverged and math.isnan(refinement.error_before):
        how = "too few tokens reached it to hold any out"
    return f"the refinement was given up after {refinement.steps} steps and the layer kept at its start: {how}"
