"""Refine all layers of a model together on its next-token distribution, with one block in fast memory at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.artifact.run_layers import StoredLayer
from cloq_export.compress.block_refined import WARMUP, finite, kept_start
from cloq_export.compress.plan import ModelPlan
from cloq_export.files.safe_tensors import read_safetensors, read_safetensors_header
from cloq_export.files.tensor_writer import write_safetensors
from cloq_export.models.blocks import find_linears
from cloq_export.models.stream import BlockStream
from cloq_export.recipe import REFINE_STEPS
from cloq_export.refine import (
    JUDGEMENTS,
    MODEL_RATES,
    Refinement,
    Schedule,
    Standing,
    TrainedLayer,
    divergence,
    gradients_by,
    train_layers,
    zeros_for_none,
)

if TYPE_CHECKING:
    from cloq_export.compress.job import CompressJob

# Tokens whose logits are in memory at once: a vocabulary can be hundreds of times as wide as a model.
_TOKENS_AT_ONCE = 512


@dataclasses.dataclass(frozen=True)
class RefinementPlace:
    """Where a refinement keeps what it goes on from after a kill, and who is told how far it is.

    Args:
        folder: for its state.
        progress: is told how many steps are made, and of how many.
    """

    folder: Path
    progress: Callable[[int, int], None] | None = None


def refine_model(
    stream: BlockStream, job: CompressJob, solved: RunDirectory, judging: Sequence[int], place: RefinementPlace
) -> Refinement:
    """Train scales, A and B of all layers to lower the divergence of the model's next tokens from the float model's.

    Args:
        stream: the float model on windows: those that are trained on, then those that judge.
        job: which layers; their weights in the model are the float ones, and stay so. Where it keeps codes, the
            adapters alone are trained, and no scales.
        solved: holds the start of every layer.
        judging: the batches that judge.
        place: where its state is kept.

    Returns:
        Refinement: its errors are nats per token, on text that nothing was trained on.
    """
    recipe, plan = job.recipe, job.plan
    dtype = torch.bfloat16 if stream.rounds_inputs else next(plan.blocks.modules[0].parameters()).dtype
    layers: list[dict[str, TrainedLayer]] = []
    for index, block in enumerate(plan.blocks):
        linears = find_linears(block, plan.blocks.prefix(index))
        of_block: dict[str, TrainedLayer] = {}
        for name in plan.of_block(index):
            start = solved.read_layer(name)
            of_block[name] = TrainedLayer(
                cast(nn.Parameter, linears[name].weight),
                (start.quantized.to(stream.device), start.lora and start.lora.to(stream.device)),
                dtype=dtype,
                scales=job.kept_codes is None,
                rates=MODEL_RATES,
            )
        layers.append(of_block)
    everything = {name: layer for of_block in layers for name, layer in of_block.items()}
    with stream.head_on_device():
        objective = ModelObjective(stream, layers, judging)
        return train_layers(
            everything,
            objective,
            Schedule(recipe.refine_steps or REFINE_STEPS, recipe.seed, warmup=WARMUP, patience=JUDGEMENTS),
            record=RefinementRecord(place.folder, everything),
            progress=place.progress,
        )


class RefinementRecord:
    """The state of the trained layers on disk: `now.safetensors`, and `best-STEP.safetensors` where they differ.

    Args:
        folder: where the files are, made if need be.
        layers: module name -> layer.
    """

    def __init__(self, folder: Path, layers: Mapping[str, TrainedLayer]) -> None:
        self._folder = folder
        self._layers = layers
        self._now = folder / "now.safetensors"

    def save(self, standing: Standing) -> None:
        """Keep all that the layers hold now."""
        self._folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{module}/{part}": tensor
            for module, layer in self._layers.items()
            for part, tensor in layer.state().items()
        }
        best = self._best(standing)
        if standing.best_step == standing.step:
            write_safetensors(best, tensors)
        # The best is written first: a kill between the two leaves the previous state with its own best.
        write_safetensors(self._now, tensors, {"standing": json.dumps(dataclasses.asdict(standing))})
        for path in self._folder.glob("best-*.safetensors"):
            if path != best:
                path.unlink()

    def load(self) -> Standing | None:
        """Return where training stood at the last `save`."""
        if not self._now.exists():
            return None
        return Standing(**json.loads(read_safetensors_header(self._now)[1]["standing"]))

    def restore(self, *, best: bool) -> None:
        """Put back into the layers what they held at the best judgement, or else at the last one."""
        standing = self.load()
        assert standing is not None
        tensors, _ = read_safetensors(self._best(standing) if best else self._now)
        for module, layer in self._layers.items():
            layer.restore({part: tensors[f"{module}/{part}"] for part in layer.state()})

    def _best(self, standing: Standing) -> Path:
        return self._folder / f"best-{standing.best_step}.safetensors"


def refined_layers(refinement: Refinement, plan: ModelPlan, solved: RunDirectory) -> dict[str, StoredLayer]:
    """Return all layers as they are stored: refined, or as they were solved if no step was better.

    Args:
        refinement: what training brought.
        plan: which layers.
        solved: holds the start of every layer.

    Returns:
        Full module name -> layer. Of its certificate the errors of the layer stay those of the start.
    """
    layers: dict[str, StoredLayer] = {}
    for name in plan.modules:
        start = solved.read_layer(name)
        quantized, lora = (refinement.layers or {}).get(name, (start.quantized, start.lora))
        certificate = start.certificate
        if certificate is not None:
            certificate = dataclasses.replace(
                certificate,
                refined_error_before=finite(refinement.error_before),
                refined_error_after=finite(refinement.error_after),
                refined_step=refinement.best_step,
                notes=certificate.notes if refinement.layers else (*certificate.notes, kept_start(refinement)),
            )
        host = torch.device("cpu")
        layers[name] = StoredLayer(quantized.to(host), lora and lora.to(host), certificate)
    return layers


class ModelObjective:
    """The divergence of a model with refined layers from the float model, in nats per token.

    The backward pass goes block by block: only the states between blocks are kept, and each block runs again for its
    own derivatives (Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174). So one block at a
    time is in fast memory, together with the head.

    Args:
        stream: the float model on windows; its weights are float again after every call.
        layers: per block, module name -> layer, whose parameters are the model's own.
        judging: the batches that judge, and are not trained on.
    """

    def __init__(
        self, stream: BlockStream, layers: Sequence[Mapping[str, TrainedLayer]], judging: Sequence[int]
    ) -> None:
        self._stream = stream
        self._judging = tuple(judging)
        self._layers = layers
        self._start = list(stream.hidden)
        self._wanted = self._start
        for index, of_block in enumerate(layers):
            with stream.block_on_device(index), _restored(of_block):
                if stream.rounds_inputs:
                    # Once for all batches, where autocast would do so for every one.
                    for layer in of_block.values():
                        layer.parameter.data = layer.parameter.data.to(torch.bfloat16)
                self._wanted = stream.forward_block(index, self._wanted)

    @property
    def trained(self) -> Sequence[int]:
        """Return the batches that are trained on."""
        return [batch for batch in range(len(self._start)) if batch not in self._judging]

    @property
    def judging(self) -> Sequence[int]:
        """Return the batches that judge."""
        return self._judging

    def error(self, batches: Sequence[int]) -> float:
        """Return the mean divergence on some batches."""
        states = {batch: self._start[batch] for batch in batches}
        with torch.no_grad():
            for index in range(len(self._layers)):
                with self._served(index):
                    states = {batch: self._forward(index, batch, given) for batch, given in states.items()}
            errors = [sum(float(loss) for loss in self._losses(batch, given)) for batch, given in states.items()]
        return sum(errors) / len(errors)

    def gradients(self, batch: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each layer's name and the derivative of one batch's divergence by its weight, last block first."""
        states = [self._start[batch]]
        with torch.no_grad():
            for index in range(len(self._layers)):
                with self._served(index):
                    states.append(self._forward(index, batch, states[-1]))
        by_state = self._by_last_state(batch, states.pop())
        for index in reversed(range(len(self._layers))):
            by_weight, by_state = self._by_block(index, batch, states.pop(), by_state)
            yield from by_weight.items()

    def _by_last_state(self, batch: int, states: torch.Tensor) -> torch.Tensor:
        """Return the derivative by the states behind the last block."""
        leaf = states.to(self._stream.device).requires_grad_()
        total = torch.zeros_like(leaf)
        with torch.enable_grad():
            for loss in self._losses(batch, leaf):
                total += torch.autograd.grad(loss, leaf)[0]
        return total

    def _by_block(
        self, index: int, batch: int, states: torch.Tensor, by_after: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the derivatives by the weights of a block and by the states before it."""
        of_block = self._layers[index]
        leaf = states.detach().to(self._stream.device).requires_grad_()
        with self._served(index):
            parameters = [layer.parameter for layer in of_block.values()]
            with gradients_by(parameters):
                after = self._stream.differentiable_batch(index, batch, leaf)
                by_state, *by_weights = torch.autograd.grad(
                    after, [leaf, *parameters], by_after.to(after.dtype), allow_unused=True
                )
            assert by_state is not None  # blocks pass their input on
            return dict(zip(of_block, zeros_for_none(by_weights, parameters), strict=True)), by_state

    def _forward(self, index: int, batch: int, states: torch.Tensor) -> torch.Tensor:
        return self._stream.differentiable_batch(index, batch, states).to(self._stream.storage)

    def _losses(self, batch: int, states: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the parts of a batch's mean divergence, a stretch of positions at a time."""
        length = states.shape[1]
        tokens = states.shape[0] * length
        stretch = max(1, _TOKENS_AT_ONCE // states.shape[0])
        for first in range(0, length, stretch):
            positions = slice(first, min(first + stretch, length))
            with torch.no_grad():
                wanted = self._stream.differentiable_logits(batch, self._wanted[batch][:, positions], positions)
            logits = self._stream.differentiable_logits(batch, states[:, positions], positions)
            yield divergence(logits, wanted) / tokens

    @contextlib.contextmanager
    def _served(self, index: int) -> Iterator[None]:
        """Hold one block on the device with the weights that its layers would serve now."""
        of_block = self._layers[index]
        with self._stream.block_on_device(index), _restored(of_block):
            for layer in of_block.values():
                layer.install()
            yield


@contextlib.contextmanager
def _restored(layers: Mapping[str, TrainedLayer]) -> Iterator[None]:
    """Put back the weights that were there before, whatever is installed meanwhile."""
    before = [layer.parameter.data for layer in layers.values()]
    try:
        yield
    finally:
        for layer, weight in zip(layers.values(), before, strict=True):
            layer.parameter.data = weight
