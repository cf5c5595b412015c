"""What a run would take of a device and how long, shown before any work."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from cloq_export.compress.block_shape import BlockShape
from cloq_export.compress.cards import CARDS
from cloq_export.compress.device_memory import StageMemory, fitting_windows, largest_shape, walk_stages
from cloq_export.compress.device_time import CardTime, run_work
from cloq_export.compress.plan import ModelPlan
from cloq_export.compress.strategies import strategy_of
from cloq_export.kernels.gpu import cuda
from cloq_export.models.devices import device_of
from cloq_export.models.stream import BlockStream
from cloq_export.recipe import Recipe

# Without a device, hidden states are taken to stay in host memory, as they do where they are large.
_ANY = 0


@dataclasses.dataclass(frozen=True)
class DevicePlan:
    """What a run would take of a device.

    Args:
        device: its name, or "cpu".
        dtype: of the float weights that were counted; on a GPU they keep the one that they are stored in.
        total: bytes of the device; None without one.
        free: bytes of it that are free; None without one.
        windows_per_batch: windows of one forward pass that fit, 0 if none do; without a device, what is usual.
        stages: the most that each stage holds, with that many windows.
        times: the least that the walk over the blocks takes known cards; what comes before and after it is not counted.
        estimated: the forward pass was estimated, because it depends on numbers (experts).
    """

    device: str
    dtype: str
    total: int | None
    free: int | None
    windows_per_batch: int
    stages: tuple[StageMemory, ...]
    times: tuple[CardTime, ...]
    estimated: bool = False

    @classmethod
    def of(cls, model: nn.Module, plan: ModelPlan, recipe: Recipe, device: torch.device) -> DevicePlan:
        """Return what a run takes, on a device or, where that is the CPU, on any GPU that it would be given.

        Args:
            model: the float model.
            plan: what happens to its layers.
            recipe: every option of the run.
            device: where it would compute.
        """
        usual = min(recipe.samples, strategy_of(recipe).windows_per_batch(recipe))
        there = device.type == "cuda"
        name = cuda().name(device) if there else "cpu"
        total, free = (cuda().total_bytes(device), cuda().free_bytes(device)) if there else (None, None)
        shapes = block_shapes(model, plan, recipe)
        shape = largest_shape(shapes)
        batch = usual if free is None else fitting_windows(shape, recipe, usual, free)
        dtype = next(model.parameters()).dtype
        works = run_work(shapes, recipe, narrow=dtype != torch.float32)
        return cls(
            name,
            str(dtype).removeprefix("torch."),
            total,
            free,
            batch,
            walk_stages(shape, recipe, batch or 1, _ANY if free is None else free),
            tuple(CardTime.of(works, card) for card in CARDS),
            not shape.traced,
        )

    def to_json(self) -> dict[str, Any]:
        """Return what `cloq run --plan --json` prints of it."""
        return {
            **dataclasses.asdict(self),
            "stages": [stage.to_json() for stage in self.stages],
            "times": [time.to_json() for time in self.times],
        }


def block_shapes(model: nn.Module, plan: ModelPlan, recipe: Recipe) -> list[BlockShape]:
    """Return the shapes of the blocks of a model, each kind once, with how many there are of it.

    Args:
        model: the float model, in host memory or on disk.
        plan: what happens to its layers.
        recipe: its `seqlen` is the length of a window.
    """
    window = torch.zeros(1, recipe.seqlen, dtype=torch.int64)
    stream = BlockStream(model, plan.blocks, window, device=device_of(model))
    shapes: dict[tuple[object, ...], BlockShape] = {}
    alike = collections.Counter[tuple[object, ...]]()
    for index, block in enumerate(plan.blocks):
        ranks = _ranks(plan, index)
        kind = (type(block), *((name, tuple(tensor.shape)) for name, tensor in block.named_parameters()), *ranks)
        alike[kind] += 1
        if kind not in shapes and ranks:
            call, states = stream.arguments(index), stream.hidden[0]
            shapes[kind] = BlockShape.of(block, call, states, ranks, experts_per_token(model))
    return [dataclasses.replace(shape, alike=alike[kind]) for kind, shape in shapes.items()]


def experts_per_token(model: nn.Module) -> int:
    """Return to how many experts of a mixture a token goes, as the model's configuration says; 1 if it does not."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    return int(getattr(text, "num_experts_per_tok", None) or 1)


def _ranks(plan: ModelPlan, index: int) -> Mapping[str, int]:
    prefix = f"{plan.blocks.prefix(index)}."
    return {name.removeprefix(prefix): planned.rank for name, planned in plan.of_block(index).items()}
