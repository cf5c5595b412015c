"""From a model to a fine-tuned, exported and verified checkpoint: the other verbs, one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.errors import DataError, MissingPackageError, UsageError
from cloq_export.files.atomic import write_bytes
from cloq_export.files.spelled_paths import command_line
from cloq_export.models.source import LoadedModel, find_source
from cloq_export.models.tokenizer_files import read_tokenizer
from cloq_export.parity.report import ParityReport, missed_gates
from cloq_export.recipe import FineTuneRecipe, Recipe
from cloq_export.texts.corpora import EMBEDDED
from cloq_export.texts.examples import Example, ExampleSet
from cloq_export.texts.named_sets import load_examples
from cloq_export.train.data import TrainingData, read_training_data
from cloq_export.verbs.export import export
from cloq_export.verbs.finetune import check_length, check_tokens, finetune
from cloq_export.verbs.options import ExportOptions
from cloq_export.verbs.run import run
from cloq_export.verbs.run_texts import embedded_texts, origin_of
from cloq_export.verbs.summary import RunSummary
from cloq_export.verbs.training_result import TrainingResult, report_name
from cloq_export.verbs.training_start import ZERO_START, differing_options
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verify import verify

# Greedy continuations that the verification compares: each takes as long as a few training steps on a CPU.
_PROMPTS = 8


@dataclasses.dataclass(frozen=True)
class TrainedBefore:
    """A training that an earlier call has finished."""

    adapter: str
    steps: int
    kept_step: int

    @property
    def notes(self) -> list[str]:
        """Return what did not go the ordinary way."""
        return [f"the adapter {self.adapter} was trained already"]

    def to_json(self) -> dict[str, Any]:
        """Return what `cloq run --json` prints of it."""
        return {**dataclasses.asdict(self), "notes": self.notes}


@dataclasses.dataclass(frozen=True)
class FineTunedRun:
    """A run whose adapter was trained, exported and verified.

    Args:
        summary: of the run.
        trained: the training.
        export: the folder of the export.
        report: of the verification.
    """

    summary: RunSummary
    trained: TrainingResult | TrainedBefore
    export: str
    report: ParityReport

    @property
    def missed(self) -> str | None:
        """Return the gates that were missed, None if none was."""
        return missed_gates(self.report)

    @property
    def notes(self) -> Sequence[str]:
        """Return what did not go the ordinary way."""
        return [*self.summary.notes, *self.trained.notes]

    def to_json(self) -> dict[str, Any]:
        """Return what `cloq run --json` prints: the summary of the run with what followed it."""
        content = self.summary.to_json()
        adapter, report = self.trained.adapter, self.report
        perplexity = dict(content["perplexity"] or {})
        for row in report.quality.perplexity:
            if row.model == "served" and row.adapter == adapter:
                perplexity["finetuned"] = row.to_json()
        files = {
            **content["files"],
            f"adapter {adapter}": str(RunDirectory.open(self.summary.run).adapter_path(adapter)),
            "export": self.export,
            "parity report": (report.files or {})["html"],
        }
        return {
            **content,
            "perplexity": perplexity,
            "files": files,
            "next": [
                command_line("cloq", "serve", self.export),
                command_line("cloq", "inspect", self.export, "--verify"),
            ],
            "notes": list(self.notes),
            "finetuned": self.trained.to_json(),
            "export": self.export,
            "verified": {"passed": report.passed, "missed": self.missed, "files": report.files},
        }


def run_and_finetune(recipe: Recipe, out: Path, *, demo: bool = False, console: Console | None = None) -> FineTunedRun:
    """Run a recipe, train its adapter, export the result and verify it through the packed runtime.

    Args:
        recipe: every option; its section `finetune` is not empty.
        out: the run directory.
        demo: as in `run`; where it fell back on Python's own text, that is learned too.
        console: where progress goes; None is standard error.

    Raises:
        UsageError: an adapter of that name exists and was trained otherwise.
        DataError: the examples cannot be read or learned; this is found before anything is quantized.
        CloqError: as the single verbs.
    """
    tuning = FineTuneRecipe.from_mapping(recipe.finetune)
    _check_options(recipe, tuning)
    console = console or Console(stderr=True)
    data = _checked_data(recipe, tuning, out, demo)

    def check(loaded: LoadedModel) -> None:
        check_length(loaded.model, tuning)
        # The tokenizer of a GGUF file comes with the model; the demo may fall back on a text that it brings itself.
        if loaded.source.kind == "gguf" and not demo:
            check_tokens(loaded.model, read_training_data(tuning, loaded.tokenizer, bos=recipe.bos))
        elif data is not None:
            check_tokens(loaded.model, data)

    summary = run(recipe, out, demo=demo, console=console, check=check)
    directory = RunDirectory.open(out)
    examples, text = _texts(directory, recipe, demo)
    trained = _trained_already(directory, tuning) or finetune(out, tuning, examples=examples, console=console)
    folder = export(out, ExportOptions(adapters=(tuning.name,)), console=console).folder
    options = VerifyOptions(
        reference=recipe.model,
        text=text,
        window=recipe.eval_window,
        windows=recipe.eval_windows,
        bos=recipe.bos,
        prompts=_PROMPTS,
        out=folder.with_name(f"{folder.name}-parity"),
    )
    return FineTunedRun(summary, trained, str(folder), verify(folder, options, console=console))


def _check_options(recipe: Recipe, tuning: FineTuneRecipe) -> None:
    if not tuning.data:
        raise UsageError("no examples were named; give a set, a file or a hub id with `finetune.data=NAME|FILE`.")
    if not recipe.rank and not tuning.start:
        raise UsageError(
            "the rank is 0, so there is no adapter to start the training from; choose one with `rank`, or "
            f"`finetune.start={ZERO_START}`."
        )
    if recipe.low_rank_rounds and tuning.start == ZERO_START:
        raise UsageError(
            "codes of low_rank_rounds need their adapter, and the training is to start without it; leave "
            "`finetune.start` out, or `low_rank_rounds` at 0."
        )
    if recipe.rank and tuning.name == recipe.adapter_name:
        raise UsageError(
            f"the adapter {tuning.name!r} is made together with the codes; give the trained one another name with "
            "`finetune.name=NAME`."
        )


def _checked_data(recipe: Recipe, tuning: FineTuneRecipe, out: Path, demo: bool) -> TrainingData | None:
    """Read the examples and make sequences of them: minutes at most, before hours of quantization.

    Returns:
        What is learned; None where that is not known yet, or learned already.

    Raises:
        DataError: they cannot be read, no sequence comes of them, or the model's chat template refuses one.
        MissingPackageError: they are on the hub, and `datasets` is not installed.
    """
    if RunDirectory.is_run(out) and RunDirectory.open(out).state == "done":
        return None
    try:
        examples = load_examples(tuning.data)
    except (DataError, MissingPackageError):
        if demo:
            return None  # it may fall back on Python's own text
        raise
    source = find_source(recipe.model)
    if source.kind == "gguf":
        return None  # its tokenizer comes with reading the model
    return read_training_data(tuning, read_tokenizer(source.folder, name=source.name), examples, bos=recipe.bos)


def _texts(directory: RunDirectory, recipe: Recipe, demo: bool) -> tuple[ExampleSet | None, str]:
    """Return what is learned if it is not what the recipe names, and the text to measure on."""
    if not demo or recipe.calibration == EMBEDDED or not origin_of(directory).startswith(EMBEDDED):
        return None, recipe.eval_text
    texts = embedded_texts()
    assert texts.evaluation is not None  # both parts are there
    folder = directory.path / "work"
    folder.mkdir(exist_ok=True)
    write_bytes(folder / "evaluation.txt", texts.evaluation.text.encode("utf-8"))
    learned = texts.calibration
    return ExampleSet.of([Example(None, learned.text)], learned.origin), str(folder / "evaluation.txt")


def _trained_already(directory: RunDirectory, tuning: FineTuneRecipe) -> TrainedBefore | None:
    """Return the training that an earlier call has finished, None if there is none.

    Raises:
        UsageError: the adapter of that name was trained with other options.
    """
    if not directory.adapter_path(tuning.name).exists() or report_name(tuning.name) not in directory.reports():
        return None
    report = directory.read_report(report_name(tuning.name))
    faults = differing_options(report.get("options"), tuning.to_mapping())
    if faults:
        raise UsageError(
            f"{directory.path} has an adapter {tuning.name!r} that was trained with other options "
            f"({'; '.join(faults)}); choose another name with `finetune.name=NAME`, or delete "
            f"{directory.adapter_path(tuning.name)}."
        )
    return TrainedBefore(tuning.name, report["steps"], report["kept_step"])
