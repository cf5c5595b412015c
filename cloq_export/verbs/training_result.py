"""What a training has made: the adapter, its report and plot, and what is said of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cloq_export.artifact.pair_record import pair_digest, pairs_digest
from cloq_export.artifact.probe_record import ProbeRecord
from cloq_export.artifact.provenance import TrainingRecord
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.files.atomic import write_bytes
from cloq_export.files.spelled_paths import command_line
from cloq_export.formats.peft import read_adapter, write_adapter
from cloq_export.parity.plots import line_plot, standalone
from cloq_export.parity.questions import TrainedOn
from cloq_export.process.host_memory import MemoryUse
from cloq_export.recipe import FineTuneRecipe
from cloq_export.texts.examples import ExampleSet
from cloq_export.train.data import HeldOut, prompts_of
from cloq_export.train.trainer import EvaluationPoint, Training, TrainingCurve, TrainingStep
from cloq_export.types import LoraPair
from cloq_export.verbs.recording import note_adapter
from cloq_export.verbs.training_start import TrainingStart


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """A finished training.

    Args:
        run: the run directory.
        recipe: every option of the training.
        start: the adapter that it began from.
        data: what was learned.
        sequences: how many of them.
        precision: arithmetic of the activations.
        training: its curve, and where it continued.
        seconds: stage -> time.
        memory: of the training.
        files: name -> path.
        notes: what did not go the ordinary way.
    """

    run: Path
    recipe: FineTuneRecipe
    start: str
    data: str
    sequences: int
    precision: str
    training: Training
    seconds: Mapping[str, float]
    memory: MemoryUse | None
    files: Mapping[str, str]
    notes: Sequence[str]

    @property
    def adapter(self) -> str:
        """Return the name of the adapter."""
        return self.recipe.name

    @property
    def loss_before(self) -> float | None:
        """Return the held-out loss before the first step; None if nothing was evaluated."""
        evaluations = self.training.curve.evaluations
        return evaluations[0].loss if evaluations else None

    def to_json(self) -> dict[str, Any]:
        """Return what `cloq finetune --json` prints."""
        curve = self.training.curve
        steps_taken = max(1, curve.steps - self.training.resumed_at)
        return {
            "run": str(self.run),
            "adapter": self.adapter,
            "start": self.start,
            "data": self.data,
            "precision": self.precision,
            "sequences": self.sequences,
            "steps": curve.steps,
            "kept_step": curve.kept_step,
            "loss": {
                "first": curve.losses[0].loss if curve.losses else None,
                "last": curve.losses[-1].loss if curve.losses else None,
                "held_out_before": self.loss_before,
                "held_out_kept": curve.kept_loss,
            },
            "held_out_perplexity": {
                "before": perplexity_of(self.loss_before),
                "kept": perplexity_of(curve.kept_loss),
            },
            "seconds": dict(self.seconds),
            "seconds_per_step": self.seconds.get("train", 0.0) / steps_taken,
            "peak_memory_bytes": self.memory.peak if self.memory else None,
            "files": dict(self.files),
            "next": [
                command_line("cloq", "eval", self.run, "--adapter", self.adapter),
                command_line("cloq", "export", self.run, "--adapter", self.adapter),
            ],
            "notes": list(self.notes),
        }


def write_trained(
    directory: RunDirectory,
    start: TrainingStart,
    recipe: FineTuneRecipe,
    pairs: Mapping[str, LoraPair],
    curve: TrainingCurve,
    record: TrainedRecord,
) -> None:
    """Write a trained adapter into its run, with a report and a plot of the training.

    Args:
        directory: the run.
        start: what the training began from.
        recipe: every option.
        pairs: what was trained, as it is stored.
        curve: what the training did.
        record: what the adapter records of itself besides that.
    """
    data_sha256 = start.data["data"]["sha256"]
    trained = TrainingRecord(
        steps=curve.steps,
        kept_step=curve.kept_step,
        kept_loss=curve.kept_loss,
        last_loss=curve.losses[-1].loss if curve.losses else None,
        learning_rate=recipe.learning_rate,
        seed=recipe.seed,
        data_sha256=data_sha256,
        questions=TrainedOn.of(prompts_of(record.examples)),
        start=pairs_digest({module: pair_digest(pair) for module, pair in read_adapter(start.adapter).pairs.items()}),
    )
    write_adapter(
        directory.adapter_path(recipe.name),
        pairs,
        base_model=start.base_model,
        base_fingerprint=start.base_fingerprint,
        # No path: what an adapter says of itself may be published.
        extra={
            "finetuned": {
                "start_sha256": start.adapter_sha256,
                "data_sha256": data_sha256,
                "learning_rate": recipe.learning_rate,
                "steps": curve.steps,
                "kept_step": curve.kept_step,
                "kept_loss": curve.kept_loss,
            },
            **note_adapter(
                recipe.name, pairs, base_fingerprint=start.base_fingerprint, probe=record.probe, training=trained
            ),
        },
    )
    held_out = None
    if record.held_out is not None:
        held_out = {**dataclasses.asdict(record.held_out), "calibrated_tokens": record.calibrated}
    report = {**start.to_json(), **dataclasses.asdict(curve), "held_out": held_out}
    directory.write_report(report_name(recipe.name), report)
    write_bytes(report_path(directory, recipe.name).with_suffix(".svg"), curve_plot(curve))


@dataclasses.dataclass(frozen=True)
class TrainedRecord:
    """What a trained adapter records of itself, besides the training.

    Args:
        examples: what it learned; only marks of the prompts are kept.
        probe: what the model says with it.
        held_out: the stretch of a text that it was evaluated on, where it is one.
        calibrated: how many tokens of that the run was calibrated on.
    """

    examples: ExampleSet
    probe: ProbeRecord
    held_out: HeldOut | None = None
    calibrated: int = 0


def curve_plot(curve: TrainingCurve) -> bytes:
    """Return the plot of training and evaluation losses over steps, a picture that stands alone."""

    def series(label: str, points: Sequence[TrainingStep | EvaluationPoint]) -> tuple[str, list[float], list[float]]:
        return label, [float(point.step) for point in points], [float(point.loss) for point in points]

    both = (series("learned", curve.losses), series("held out", curve.evaluations))
    drawn = [each for each in both if each[1]]
    return standalone(line_plot(drawn, x_label="step", y_label="loss, nats per token")).encode("utf-8")


def report_name(adapter: str) -> str:
    """Return the name of the report of an adapter's training."""
    return f"finetune-{adapter}"


def report_path(directory: RunDirectory, adapter: str) -> Path:
    """Return where the report of an adapter's training stands; its plot lies beside it."""
    return directory.path / "reports" / f"{report_name(adapter)}.json"


def files_of_training(directory: RunDirectory, adapter: str) -> dict[str, str]:
    """Return what a training has written, by name."""
    report = report_path(directory, adapter)
    return {
        "adapter": str(directory.adapter_path(adapter)),
        "report": str(report),
        "plot": str(report.with_suffix(".svg")),
    }


def perplexity_of(loss: float | None) -> float | None:
    """Return exp(loss), held below the largest number; None for no loss."""
    return None if loss is None else math.exp(min(loss, 700.0))
