"""Open what a recipe names, and refuse what does not belong together."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.checkpoint_writer import LayerSource, check_target, linears_beside
from cloq_export.artifact.empty_model import refuse_lost_biases
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.artifact.run_layers import natural_order
from cloq_export.compress.ends import plan_ends
from cloq_export.compress.left_float import describe_left_float
from cloq_export.compress.plan import ModelPlan, make_plan, plan_for_codes
from cloq_export.compress.rescaling import rescale_neighbours
from cloq_export.compress.session import Session
from cloq_export.errors import RecipeError, RunDirectoryError
from cloq_export.files.versions import environment
from cloq_export.formats.registry import LAYOUTS
from cloq_export.models.blocks import find_blocks
from cloq_export.models.devices import chosen_device
from cloq_export.models.precision import has_fast_bfloat16
from cloq_export.models.source import LoadedModel, open_model
from cloq_export.models.tied_head import embeddings_in
from cloq_export.recipe import Recipe, is_expert

# Notes about layers that stay float; the rest is counted.
_SHOWN_UNFIT = 5


@contextlib.contextmanager
def started_run(path: Path, recipe: Recipe, fingerprint: str) -> Iterator[RunDirectory]:
    """Hold a run open; if it fails before its first layer, nothing stays that would refuse the corrected command."""
    with RunDirectory.create_or_resume(path, recipe.to_mapping(), fingerprint, environment()) as directory:
        try:
            yield directory
        except Exception:
            directory.discard_if_empty()
            raise


def compute_dtype(recipe: Recipe, device: torch.device) -> torch.dtype | None:
    """Return the precision of the calibration's forward passes; None is the model's own."""
    fast = device.type == "cpu" and has_fast_bfloat16(device)
    return torch.bfloat16 if recipe.precision == "bfloat16" or (recipe.precision == "auto" and fast) else None


def source_fingerprint(recipe: Recipe, model: str) -> str:
    """Return the fingerprint of all that a run is made from: the model, and the codes that it keeps."""
    if not recipe.codes_from:
        return model
    return f"{model}+{Checkpoint.open(recipe.codes_from).computed_fingerprint()}"


def plan_model(model: nn.Module, recipe: Recipe) -> tuple[ModelPlan, list[str]]:
    """Decide what happens to each layer of a model, and bring weights that codes cannot hold into their range.

    Args:
        model: the float model; where factors move between neighbours its weights change, and its function does not.
        recipe: every option of the run.

    Returns:
        The plan, and what the numbers of the model asked for, in plain words.

    Raises:
        RecipeError, ShapeError: as `make_plan`, or every layer stays float.
    """
    blocks = find_blocks(model, recipe.blocks)
    ends = plan_ends(model, recipe)
    plan = make_plan(blocks, recipe)
    notes = rescale_neighbours(model, blocks, plan.asked)
    if notes:
        plan = make_plan(blocks, recipe)
    bare = sum(is_expert(name) and not planned.rank for name, planned in plan.modules.items())
    if bare and recipe.rank:
        notes.append(f"{bare} linear layers of experts get no adapter; `expert_rank` gives them one")
    unfit = list(plan.unfit.items())
    if not plan.modules:
        raise RecipeError(f"no linear layer can be quantized; of {unfit[0][0]}, {unfit[0][1]}. Rescale the weights.")
    plan = dataclasses.replace(plan, modules={**plan.modules, **ends})
    notes += describe_left_float(plan)
    for name, fault in unfit[:_SHOWN_UNFIT]:
        notes.append(f"{name} stays float: {fault}")
    if len(unfit) > _SHOWN_UNFIT:
        notes.append(f"{len(unfit) - _SHOWN_UNFIT} more layers stay float for such reasons, e.g. {unfit[-1][0]}")
    return plan, notes


def open_planned(session: Session, recipe: Recipe) -> tuple[LoadedModel, ModelPlan]:
    """Open the float model of a recipe, and decide what happens to each of its layers."""
    # On an accelerator the model keeps its stored dtype, which is its native arithmetic there.
    dtype: Any = torch.float32 if chosen_device(recipe.device).type == "cpu" else "auto"
    loaded = session.timed(
        "read model", lambda: open_model(recipe.model, dtype=dtype, stream=recipe.stream, blocks=recipe.blocks)
    )
    session.notes.extend(note for note in (*loaded.notes, *loaded.reading) if note not in session.notes)
    if not recipe.codes_from:
        plan, notes = plan_model(loaded.model, recipe)
        for note in notes:
            if note not in session.notes:
                session.say(note)
                session.notes.append(note)
    else:
        checkpoint = Checkpoint.open(recipe.codes_from)
        session.notes.extend(note for note in checkpoint.notes if note not in session.notes)
        for module, shape in LayerSource.of_checkpoint(checkpoint).shapes.items():
            check_target(loaded.model, module, shape)
        refuse_lost_biases(checkpoint, loaded.model)
        plan = plan_for_codes(find_blocks(loaded.model, recipe.blocks), checkpoint.specs, recipe)
        _check_values(checkpoint, recipe)
    specs = {name: planned.spec for name, planned in plan.modules.items()}
    # The configuration is written at the end of the run; a name that the layout cannot hold is refused now.
    LAYOUTS[recipe.format].quantization_config(
        specs,
        base_fingerprint="",
        skipped=linears_beside(loaded.model, plan.modules),
        embeddings=embeddings_in(loaded.model, plan.modules),
    )
    return loaded, plan


def _check_values(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Refuse codes that the recipe's layout cannot hold, e.g. for a zero that it has no room for."""
    layout = LAYOUTS[recipe.format]
    if layout.name == checkpoint.layout_name:
        return
    for name, layer in checkpoint.read_layers():
        layout.pack_layer(layer, name=name)


def refuse_unfinished(directory: RunDirectory, plan: ModelPlan) -> None:
    """Refuse a run that lacks a layer of its plan."""
    missing = sorted(set(plan.modules) - directory.completed_modules(), key=natural_order)
    if missing:
        raise RunDirectoryError(
            f"{directory.path} lacks {len(missing)} of {len(plan.modules)} layers, the first {missing[0]}; finish it "
            f"with the command that started it, e.g. cloq run {directory.recipe.model} --out {directory.path}"
        )


def refuse_other_source(loaded: LoadedModel, directory: RunDirectory) -> None:
    """Refuse a model that is not the one that a run was made from."""
    # For a run that keeps foreign codes, their fingerprint follows the model's; the run has its own copy of them.
    model = directory.source_fingerprint.partition("+")[0]
    if loaded.source.fingerprint != model:
        raise RunDirectoryError(
            f"{loaded.source.name} has changed since {directory.path} was made (now {loaded.source.fingerprint}, then "
            f"{model}); restore the model's files, or start a new run."
        )
