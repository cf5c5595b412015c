"""Where a training computes, and what its processes share when a launcher such as accelerate starts several."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import torch

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.errors import UsageError
from cloq_export.kernels.gpu import cuda
from cloq_export.models.devices import chosen_device
from cloq_export.models.precision import has_fast_bfloat16
from cloq_export.recipe import FineTuneRecipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a training computes, and in which precision.

    Args:
        device: CPU or CUDA; a launcher with several processes gives each of them its own.
        dtype: arithmetic of the activations; A and B are trained in float32.
    """

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, recipe: FineTuneRecipe) -> Placement:
        """Return what a recipe asks for; "auto" takes CUDA where there is one, and the fastest safe precision.

        Raises:
            UsageError: CUDA is asked for and there is none, or bfloat16 of a GPU that does not multiply it.
        """
        device = chosen_device(recipe.device)
        if device.type == "cuda" and recipe.precision == "bfloat16" and not cuda().has_bfloat16():
            raise UsageError(
                f"`precision=bfloat16` was asked for, and {cuda().name(device)} does not multiply bfloat16; use "
                "`precision=float16` or `precision=float32`."
            )
        if recipe.precision != "auto":
            return cls(device, DTYPES[recipe.precision])
        if device.type == "cuda":
            return cls(device, torch.bfloat16 if cuda().has_bfloat16() else torch.float16)
        return cls(device, torch.bfloat16 if has_fast_bfloat16(device) else torch.float32)

    @property
    def precision(self) -> str:
        """Return the name of the precision."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def own_device(self) -> torch.device:
        """Return the device of this process among those of a launcher."""
        if self.device.type == "cuda" and "LOCAL_RANK" in os.environ:
            return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        return self.device


@contextlib.contextmanager
def held_by_first(directory: RunDirectory) -> Iterator[bool]:
    """Hold the run's lock in the first process of a launcher; give whether this is that process."""
    if int(os.environ.get("RANK", "0")) == 0:
        with directory:
            directory.lock()
            yield True
    else:
        yield False


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Let the first process of a launcher prepare the files, and the others read them afterwards."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    from accelerate import PartialState

    state = PartialState(cpu=not cuda().count())
    with state.main_process_first():
        yield
