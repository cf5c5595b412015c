"""What a run would take of a device and how long, shown before any work."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from cloq_export.compress.block_shape import block_shapes
from cloq_export.compress.cards import CARDS
from cloq_export.compress.device_memory import Placement, StageMemory, largest_shape
from cloq_export.compress.device_time import CardTime, run_work
from cloq_export.compress.plan import ModelPlan
from cloq_export.compress.strategies import strategy_of
from cloq_export.kernels.gpu import cuda
from cloq_export.recipe import Recipe


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
        parks: batches that wait for each other lie in host memory, because the device has no room for them.
        estimated: the forward pass was estimated, because it depends on numbers (experts).
    """

    device: str
    dtype: str
    total: int | None
    free: int | None
    windows_per_batch: int
    stages: tuple[StageMemory, ...]
    times: tuple[CardTime, ...]
    parks: bool = False
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
        # Without a device, hidden states are taken to stay in host memory, as they do where they are large.
        placement = Placement.of(shape, recipe, usual, free)
        dtype = next(model.parameters()).dtype
        works = run_work(shapes, recipe, narrow=dtype != torch.float32)
        return cls(
            name,
            str(dtype).removeprefix("torch."),
            total,
            free,
            placement.windows_per_batch,
            placement.stages,
            tuple(CardTime.of(works, card) for card in CARDS),
            placement.parks,
            not shape.traced,
        )

    def to_json(self) -> dict[str, Any]:
        """Return what `cloq run --plan --json` prints of it."""
        return {
            **dataclasses.asdict(self),
            "stages": [stage.to_json() for stage in self.stages],
            "times": [time.to_json() for time in self.times],
        }
