"""One compression: what it works on, and its course from the opened model to the report on its layers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.checkpoint_writer import LayerSource
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.compress.batches import Batches
from cloq_export.compress.opening import compute_dtype, open_planned
from cloq_export.compress.plan import ModelPlan
from cloq_export.compress.session import Session
from cloq_export.compress.space import check_space
from cloq_export.compress.strategies import Strategy, strategy_of
from cloq_export.errors import UsageError
from cloq_export.models.context import context_length
from cloq_export.models.devices import chosen_device, limited
from cloq_export.models.source import LoadedModel
from cloq_export.models.stream import BlockStream
from cloq_export.process.host_memory import MemoryWatch, keep_freed_memory
from cloq_export.recipe import Recipe, bytes_of_size
from cloq_export.texts.corpora import CalibrationText
from cloq_export.texts.windows import DrawnWindows, WindowCounts, draw_windows
from cloq_export.types import LayerCertificate, QuantizedLayer

# The report of a run that says which tokens of which texts it was solved, trained and judged on.
WINDOWS_REPORT = "windows"


@dataclasses.dataclass(frozen=True)
class CalibrationWindows:
    """Draws the windows of a run from its calibration text.

    Args:
        tokenizer: the model's.
        text: what they are cut from.
        recipe: says how long they are, with which seed and begin token, and what is left out.
        counts: how many, and for what.
    """

    tokenizer: Any
    text: CalibrationText
    recipe: Recipe
    counts: WindowCounts

    @classmethod
    def of(cls, loaded: LoadedModel, recipe: Recipe, text: CalibrationText, counts: WindowCounts) -> CalibrationWindows:
        """Return what draws the windows of a recipe for a model.

        Raises:
            UsageError: a window is longer than what the model reads.
        """
        limit = context_length(loaded.model)
        if limit is not None and recipe.seqlen > limit:
            raise UsageError(
                f"a calibration window has {recipe.seqlen} tokens, but this model reads at most {limit}; choose "
                f"`seqlen={limit}` or less."
            )
        return cls(loaded.tokenizer, text, recipe, counts)

    @functools.cached_property
    def drawn(self) -> DrawnWindows:
        """Return all windows of the run."""
        return draw_windows(self.tokenizer, self.text, self.recipe, self.counts)

    @property
    def solving(self) -> torch.Tensor:
        """Return the token ids that layers are solved on, (samples, seqlen)."""
        return self.drawn.solving.ids

    def describe(self) -> str:
        """Return what is calibrated on, for people."""
        drawn, recipe = self.drawn, self.recipe
        begin = drawn.begin
        begun = f", each window begun with {' '.join(self.tokenizer.convert_ids_to_tokens(begin))}" if begin else ""
        others = "".join(
            f", {what} {self.drawn.distinct(kind)} others"
            for what, kind in (("refining the model on", drawn.refining), ("judging by", drawn.judging))
            if kind.places
        )
        return (
            f"calibrating on {self.solving.numel()} tokens ({recipe.samples} x {recipe.seqlen}, "
            f"{drawn.distinct(drawn.solving)} distinct) of {self.text.origin}{begun}{others}"
        )


@dataclasses.dataclass(frozen=True)
class KeptCodes:
    """Codes that are kept, so that only adapters are made.

    Args:
        read: gives those of a module.
        need_adapter: they were made for what another adapter leaves of the weights.
    """

    read: Callable[[str], QuantizedLayer]
    need_adapter: bool = False

    @classmethod
    def of_run(cls, run: RunDirectory) -> KeptCodes:
        """Return the codes of a run."""
        return cls(run.read_codes, LayerSource.of_run(run).needs_adapter)

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> KeptCodes:
        """Return the codes of a checkpoint."""
        return cls(checkpoint.read_layer, checkpoint.needs_adapter)


@dataclasses.dataclass(frozen=True)
class CompressJob:
    """The layers that are to be made: of which model, how, on what, and where they go.

    Args:
        model: the float model.
        plan: what happens to each layer.
        recipe: every option of the run.
        directory: where finished layers go.
        windows: draws calibration windows.
        strategy: makes the layers.
        device: where to compute.
        compute: precision of the forward passes, see `BlockStream`.
        kept_codes: the codes that modules keep; None makes codes.
    """

    model: nn.Module
    plan: ModelPlan
    recipe: Recipe
    directory: RunDirectory
    windows: CalibrationWindows
    strategy: Strategy
    device: torch.device
    compute: torch.dtype | None
    kept_codes: KeptCodes | None = None

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        plan: ModelPlan,
        recipe: Recipe,
        directory: RunDirectory,
        text: CalibrationText,
        kept_codes: KeptCodes | None = None,
    ) -> CompressJob:
        """Return the job of a recipe.

        Args:
            loaded: the float model.
            plan: what happens to each layer.
            recipe: every option of the run.
            directory: where finished layers go.
            text: what to calibrate on.
            kept_codes: as above.

        Raises:
            UsageError: a window is longer than what the model reads, or the device is not there.
            RecipeError: the strategy cannot do what the recipe says.
        """
        strategy, device = strategy_of(recipe), chosen_device(recipe.device)
        strategy.check(recipe, keeps_codes=kept_codes is not None)
        windows = CalibrationWindows.of(loaded, recipe, text, strategy.window_counts(recipe))
        compute = compute_dtype(recipe, device)
        return cls(loaded.model, plan, recipe, directory, windows, strategy, device, compute, kept_codes)

    def stream(self, batches: Batches) -> BlockStream:
        """Return a stream of the job's model over its calibration windows.

        Args:
            batches: of the windows.
        """
        return BlockStream(
            self.model,
            self.plan.blocks,
            batches.windows,
            device=self.device,
            compute=self.compute,
            batch=batches.sizes,
        )


def compress_model(
    session: Session,
    directory: RunDirectory,
    recipe: Recipe,
    calibration: CalibrationText,
    check: Callable[[LoadedModel], None] | None = None,
) -> LoadedModel:
    """Open the model of a recipe and make its layers.

    Args:
        session: the call.
        directory: where the layers go, and a report on them.
        recipe: every option of the run.
        calibration: what to calibrate on.
        check: called with the model before any work.

    Returns:
        The float model.

    Raises:
        CloqError: anything a user can mend.
    """
    loaded, plan = open_planned(session, recipe)
    if check is not None:
        check(loaded)
    check_space(directory, plan, loaded, recipe)
    codes = KeptCodes.of_checkpoint(Checkpoint.open(recipe.codes_from)) if recipe.codes_from else None
    make_layers(session, CompressJob.of(loaded, plan, recipe, directory, calibration, codes))
    directory.write_report("layers", layers_report(directory.certificates(), plan))
    return loaded


def make_layers(session: Session, job: CompressJob) -> None:
    """Make the layers of a job that are not yet in its directory.

    Args:
        session: the call.
        job: what to make.

    Raises:
        CloqError: anything a user can mend.
    """
    modules = job.plan.modules
    for name in modules:
        job.directory.layer_path(name)  # refuses a name that cannot be one of a file
    done = job.directory.completed_modules()
    if done.issuperset(modules):
        session.say("all layers are finished already")
        return
    if done:
        session.notes.append(f"continued a run that had {len(done)} of {len(modules)} layers")
    session.say(job.windows.describe())
    session.notes.extend(job.windows.drawn.notes)
    job.directory.write_report(WINDOWS_REPORT, {"bos": job.recipe.bos, **job.windows.drawn.to_json()})
    tokens = job.windows.solving.numel()
    weights = (cast(torch.Tensor, job.model.get_submodule(name).weight) for name in modules)
    widest = max(weight.shape[1] for weight in weights)
    if tokens < widest:
        session.notes.append(
            f"{tokens} calibration tokens are fewer than the {widest} inputs of the widest layer: damping "
            "decides what they leave open; raise `samples` or `seqlen`"
        )
    keep_freed_memory()
    watch = MemoryWatch()
    with limited(job.device, bytes_of_size(job.recipe.device_memory)):
        job.strategy.make_layers(job, session)
    session.memory = watch.stop()


def layers_report(certificates: list[LayerCertificate], plan: ModelPlan | None = None) -> dict[str, Any]:
    """Return what a run keeps of its layers: certificates, and why some of a plan stay float without being asked to."""
    report: dict[str, Any] = {"layers": [certificate.to_json() for certificate in certificates]}
    left_float = {} if plan is None else {**plan.spared, **plan.unfit}
    return {**report, "stays_float": left_float} if left_float else report
