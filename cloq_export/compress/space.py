"""What a run will write, counted before it starts, so that a full disk does not end it after hours of work."""

from __future__ import annotations

import math
import shutil
from typing import Any, cast

import torch

from cloq_export.artifact.checkpoint_writer import float_tensors
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.compress.plan import ModelPlan
from cloq_export.compress.problem import ADAPTER_DTYPES
from cloq_export.errors import RunDirectoryError
from cloq_export.files.tensor_writer import header_bytes
from cloq_export.formats.registry import LAYOUTS
from cloq_export.models.source import LoadedModel
from cloq_export.recipe import Recipe


def check_space(directory: RunDirectory, plan: ModelPlan, loaded: LoadedModel, recipe: Recipe) -> None:
    """Refuse a run whose files do not fit on the disk.

    Args:
        directory: the run; its finished layers are not written again.
        plan: what happens to each layer.
        loaded: the float model.
        recipe: every option of the run.

    Raises:
        RunDirectoryError: they do not; the message says how much is missing.
    """
    needed = _needed_bytes(directory, plan, loaded, recipe)
    free = shutil.disk_usage(directory.path).free
    if free < needed:
        raise RunDirectoryError(
            f"{directory.path} has room for {_size(free)}, and this run writes at least {_size(needed)} there (layers, "
            f"checkpoint, adapter); free {_size(needed - free)}, or choose an `out` on another disk."
        )


def _needed_bytes(directory: RunDirectory, plan: ModelPlan, loaded: LoadedModel, recipe: Recipe) -> int:
    """Return what is still to be written, without headers, reports and what comes and goes in between."""
    done, layout = directory.completed_modules(), LAYOUTS[recipe.format]
    of_factor = ADAPTER_DTYPES[recipe.adapter_dtype].itemsize
    layers = checkpoint = adapter = 0
    for name, planned in plan.modules.items():
        out_features, in_features = cast(torch.Tensor, loaded.model.get_submodule(name).weight).shape
        groups = planned.spec.group_count(in_features)
        pair = planned.rank * (out_features + in_features) * of_factor
        if name not in done:
            layers += out_features * in_features + out_features * groups * 3 + pair
        headers = layout.headers(out_features, in_features, planned.spec)
        checkpoint += sum(header_bytes(header) for header in headers.values())
        adapter += pair
    stored = loaded.source.dtype
    for _, tensor in float_tensors(cast(Any, loaded.model), plan.modules):
        width = tensor.element_size()
        if stored is not None and tensor.is_floating_point():
            width = min(width, stored.itemsize)
        checkpoint += math.prod(tensor.shape) * width
    return layers + checkpoint + adapter


def _size(count: int) -> str:
    return f"{count / 10**9:.2f} GB" if count >= 10**7 else f"{count / 10**6:.2f} MB"
