"""What makes the layers of a run: open, plan, spend the budget, walk, refine, report."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.compress.budgeting import (
    BUDGET_REPORT,
    RECIPE_NAME,
    check_budget,
    has_chosen,
    measuring_recipe,
    spend,
)
from cloq_export.compress.model_refined import refine_model, refined_layers, refinement_batches
from cloq_export.compress.plan import Plan
from cloq_export.compress.session import Session, compute_dtype, device_of, open_planned, solvers_of
from cloq_export.compress.space import check_space
from cloq_export.compress.walk import BlockWalk, usual_windows_per_batch
from cloq_export.errors import UsageError
from cloq_export.files.atomic import write_bytes
from cloq_export.files.versions import environment
from cloq_export.models.context import context_length
from cloq_export.models.source import LoadedModel
from cloq_export.models.stream import BlockStream
from cloq_export.process.host_memory import MemoryWatch, keep_freed_memory
from cloq_export.recipe import Recipe
from cloq_export.texts.corpora import CalibrationText, calibration_windows
from cloq_export.texts.tokens import TextTokens
from cloq_export.types import LayerCertificate, QuantizedLayer


@contextlib.contextmanager
def started_run(path: Path, recipe: Recipe, fingerprint: str) -> Iterator[RunDirectory]:
    """Hold a run open; if it fails before its first layer, nothing stays that would refuse the corrected command."""
    with RunDirectory.create_or_resume(path, recipe.to_mapping(), fingerprint, environment()) as directory:
        try:
            yield directory
        except Exception:
            directory.discard_if_empty()
            raise


def budgeted_recipe(
    session: Session,
    directory: RunDirectory,
    calibration: CalibrationText,
    check: Callable[[LoadedModel], None] | None = None,
) -> Recipe:
    """Return the recipe with what its budget is spent on, measured in the run's work folder if it is not yet."""
    recipe = session.recipe
    if not recipe.budget or has_chosen(directory, recipe):
        return recipe
    check_budget(recipe)
    loaded, _ = open_planned(session, recipe)
    if check is not None:
        check(loaded)
    windows = windows_of(loaded, recipe, calibration)
    path = directory.path / "work" / "budget"
    with started_run(path, measuring_recipe(recipe), directory.source_fingerprint) as work:
        spent = session.timed("budget", lambda: spend(session, loaded, work, windows, recipe))
    directory.write_report(BUDGET_REPORT, spent.report())
    # The budget is spent: a copy that was edited by hand must not choose again.
    write_bytes(directory.path / RECIPE_NAME, spent.recipe.changed({"budget": 0.0}).to_yaml().encode("utf-8"))
    directory.set_overrides(spent.recipe.to_mapping()["overrides"])
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.parent.rmdir()
    session.say(
        f"{spent.stored_bits_per_weight:.3f} stored bits per weight; what they are spent on stands in "
        f"{directory.path / RECIPE_NAME}, and can be edited for another run with --recipe"
    )
    return spent.recipe


def compress_model(
    session: Session,
    directory: RunDirectory,
    recipe: Recipe,
    calibration: CalibrationText,
    check: Callable[[LoadedModel], None] | None = None,
) -> LoadedModel:
    loaded, plan = open_planned(session, recipe)
    if check is not None:
        check(loaded)
    check_space(directory, plan, loaded, recipe)
    codes = Checkpoint.open(recipe.codes_from).read_layer if recipe.codes_from else None
    finish_layers(session, loaded, plan, directory, recipe, calibration, codes)
    directory.write_report("layers", certificate_report(directory.certificates(), plan.unfit))
    return loaded


def finish_layers(
    session: Session,
    loaded: LoadedModel,
    plan: Plan,
    directory: RunDirectory,
    recipe: Recipe,
    calibration: CalibrationText,
    kept_codes: Callable[[str], QuantizedLayer] | None,
) -> None:
    for name in plan.modules:
        directory.layer_path(name)  # refuses a name that cannot be one of a file
    done = directory.completed_modules()
    if done.issuperset(plan.modules):
        session.say("all layers are finished already")
        return
    if done:
        session.notes.append(f"continued a run that had {len(done)} of {len(plan.modules)} layers")
    windows = windows_of(loaded, recipe, calibration)
    begin = TextTokens(loaded.tokenizer).window_begin(recipe.bos)
    begun = f", each window begun with {' '.join(loaded.tokenizer.convert_ids_to_tokens(begin))}" if begin else ""
    session.say(
        f"calibrating on {windows.numel()} tokens ({recipe.samples} x {recipe.seqlen}) of {calibration.origin}{begun}"
    )
    widest = max(loaded.model.get_submodule(name).in_features for name in plan.modules)
    if windows.numel() < widest:
        session.notes.append(
            f"{windows.numel()} calibration tokens are fewer than the {widest} inputs of the widest layer: damping "
            "decides what they leave open; raise --samples or --seqlen"
        )
    keep_freed_memory()
    watch = MemoryWatch()
    if recipe.refine == "model":
        refine_whole_model(session, loaded, plan, directory, recipe, calibration, windows, kept_codes)
    else:
        walk_blocks(session, loaded, plan, directory, recipe, windows, kept_codes)
    session.memory = watch.stop()


def walk_blocks(
    session: Session,
    loaded: LoadedModel,
    plan: Plan,
    directory: RunDirectory,
    recipe: Recipe,
    windows: torch.Tensor,
    kept_codes: Callable[[str], QuantizedLayer] | None,
) -> None:
    """Solve what is not yet in the directory, with fewer windows in a forward pass where memory runs out."""
    device = device_of(recipe)
    solvers = solvers_of(recipe, device)
    windows_at_once = min(len(windows), usual_windows_per_batch(recipe))
    while True:
        walk = None
        try:
            walk = BlockWalk(
                loaded.model,
                plan,
                recipe,
                directory,
                windows,
                device=device,
                compute=compute_dtype(recipe, device),
                kept_codes=kept_codes,
                console=session.console,
                solvers=solvers,
                windows_per_batch=windows_at_once,
            )
            walk.run()
            break
        except torch.OutOfMemoryError:
            if windows_at_once == 1:
                raise UsageError(
                    "memory ran out with one calibration window in a forward pass; what is finished is kept. Choose "
                    f"a smaller --seqlen than {recipe.seqlen}, --device cpu, or a larger device."
                ) from None
        # Finished layers are kept, so the walk only catches up.
        windows_at_once //= 2
        session.notes.append(
            f"memory ran out: from there on {windows_at_once} calibration windows went into a forward pass, so sums "
            "came in another order than with more memory"
        )
        session.say(session.notes[-1])
    for stage, seconds in dataclasses.asdict(walk.seconds).items():
        if stage == "refine" and recipe.refine == "none":
            continue
        session.seconds[stage.replace("_", " ")] = seconds


def windows_of(loaded: LoadedModel, recipe: Recipe, calibration: CalibrationText) -> torch.Tensor:
    """Return the token ids to calibrate on, (samples, seqlen)."""
    limit = context_length(loaded.model)
    if limit is not None and recipe.seqlen > limit:
        raise UsageError(
            f"a calibration window has {recipe.seqlen} tokens, but this model reads at most {limit}; choose --seqlen "
            f"{limit} or less."
        )
    return calibration_windows(loaded.tokenizer, calibration, recipe.samples, recipe.seqlen, recipe.seed, recipe.bos)


def refine_whole_model(
    session: Session,
    loaded: LoadedModel,
    plan: Plan,
    directory: RunDirectory,
    recipe: Recipe,
    calibration: CalibrationText,
    windows: torch.Tensor,
    kept_codes: Callable[[str], QuantizedLayer] | None,
) -> None:
    """Solve all layers and refine their blocks beside the run, then all together, and only then store them in it."""
    work = directory.path / "work" / "solved"
    with started_run(work, recipe.changed({"refine": "block"}), directory.source_fingerprint) as solved:
        already = solved.completed_modules()
        if already:
            session.notes.append(f"continued a refinement that had {len(already)} of {len(plan.modules)} layers solved")
        if not already.issuperset(plan.modules):
            walk_blocks(session, loaded, plan, solved, Recipe.from_mapping(solved.recipe), windows, kept_codes)
        device = device_of(recipe)
        batch = usual_windows_per_batch(recipe)
        # Windows that the layers were solved on would flatter the start: its errors on those are mended already.
        other = recipe.changed({"samples": batch * refinement_batches(recipe), "seed": recipe.seed + 1})
        fresh = windows_of(loaded, other, calibration)
        started = time.perf_counter()
        try:
            stream = BlockStream(
                loaded.model, plan.blocks, fresh, device=device, compute=compute_dtype(recipe, device), batch=batch
            )
            with session.progress("refine the model") as progress:
                found = refine_model(
                    stream,
                    plan,
                    recipe,
                    solved,
                    folder=work.parent / "refinement",
                    keeps_codes=kept_codes is not None,
                    progress=progress,
                )
        except torch.OutOfMemoryError:
            raise UsageError(
                f"memory ran out in the refinement of the model, {batch} windows of {recipe.seqlen} tokens at a time; "
                "the solved layers are kept. Choose --device cpu, a larger device, or another run with a smaller "
                "--seqlen or with --refine block."
            ) from None
        session.seconds["refine the model"] = time.perf_counter() - started
        for name, stored in refined_layers(found, plan, solved).items():
            directory.write_layer(name, stored.quantized, stored.lora, stored.certificate)
    for done in (work, work.parent / "refinement"):
        shutil.rmtree(done, ignore_errors=True)
    with contextlib.suppress(OSError):  # another adapter may be in the making there
        work.parent.rmdir()


def certificate_report(certificates: list[LayerCertificate], unfit: Mapping[str, str] | None = None) -> dict[str, Any]:
    report: dict[str, Any] = {"layers": [dataclasses.asdict(certificate) for certificate in certificates]}
    return {**report, "stays_float": dict(unfit)} if unfit else report
