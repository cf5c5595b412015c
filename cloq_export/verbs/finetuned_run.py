"""From a model to a fine-tuned, exported and verified checkpoint: the other verbs, one behind the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.compress.session import Session
from cloq_export.errors import DataError, MissingPackageError, UsageError
from cloq_export.files.atomic import write_bytes
from cloq_export.files.spelled_paths import command_line
from cloq_export.models.source import LoadedModel, find_source
from cloq_export.models.tokenizer_files import read_tokenizer
from cloq_export.parity.report import missed_gates
from cloq_export.recipe import FineTuneRecipe, Recipe
from cloq_export.texts.corpora import EMBEDDED
from cloq_export.texts.examples import Example, ExampleSet
from cloq_export.texts.named_sets import load_examples
from cloq_export.verbs.exporting import ExportOptions, export
from cloq_export.verbs.finetuning import ZERO_START, check_length, finetune, read_training_data, report_name
from cloq_export.verbs.verbs import TEXT_REPORT, embedded_texts, run
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verify import verify

# Greedy continuations that the verification compares: each takes as long as a few training steps on a CPU.
_PROMPTS = 8


def run_and_finetune(
    recipe: Recipe, out: Path, *, demo: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Run a recipe, train its adapter, export the result and verify it through the packed runtime.

    Args:
        recipe: every option; its section `finetune` is not empty.
        out: the run directory.
        demo: as in `run`; where it fell back on Python's own text, that is learned too.
        console: where progress goes; None is standard error.

    Returns:
        The summary of `run`, with "finetuned", "export" and "verified" beside it, and the perplexity of the trained
        adapter under "finetuned" in "perplexity".

    Raises:
        UsageError: an adapter of that name exists and was trained otherwise.
        DataError: the examples cannot be read or learned; this is found before anything is quantized.
        CloqError: as the single verbs.
    """
    tuning = FineTuneRecipe.from_mapping(recipe.finetune)
    if not tuning.data:
        raise UsageError("no examples were named; give a set, a file or a hub id with --set finetune.data=NAME|FILE.")
    if not recipe.rank and not tuning.start:
        raise UsageError(
            "the rank is 0, so there is no adapter to start the training from; choose one with --rank, or "
            f"--set finetune.start={ZERO_START}."
        )
    if recipe.rank and tuning.name == recipe.adapter_name:
        raise UsageError(
            f"the adapter {tuning.name!r} is made together with the codes; give the trained one another name with "
            "--set finetune.name=NAME."
        )
    console = console or Console(stderr=True)
    _check_data(recipe, tuning, out, demo)

    def check(loaded: LoadedModel) -> None:
        check_length(loaded.model, tuning)
        # The tokenizer of a GGUF file comes with the model; the demo may fall back on a text that it brings itself.
        if loaded.source.kind == "gguf" and not demo:
            read_training_data(tuning, loaded.tokenizer, bos=recipe.bos)

    summary = run(recipe, out, demo=demo, console=console, check=check)
    directory = RunDirectory.open(out)
    examples, text = _texts(directory, recipe, demo, console)
    trained = _trained_already(directory, tuning)
    if trained is None:
        trained = finetune(out, tuning, examples=examples, console=console)
    folder = Path(export(out, ExportOptions(adapters=(tuning.name,)), console=console)["files"]["export"])
    options = VerifyOptions(
        reference=recipe.model,
        text=text,
        window=recipe.eval_window,
        windows=recipe.eval_windows,
        bos=recipe.bos,
        prompts=_PROMPTS,
        out=folder.with_name(f"{folder.name}-parity"),
    )
    report = verify(folder, options, console=console)
    for row in report.quality.perplexity:
        if row.model == "served" and row.adapter == tuning.name:
            summary["perplexity"]["finetuned"] = row.to_json()
    summary["finetuned"] = trained
    summary["export"] = str(folder)
    summary["verified"] = {"passed": report.passed, "missed": missed_gates(report), "files": report.files}
    summary["files"] = {
        **summary["files"],
        f"adapter {tuning.name}": str(directory.adapter_path(tuning.name)),
        "export": str(folder),
        "parity report": (report.files or {})["html"],
    }
    summary["next"] = [command_line("cloq", "serve", folder), command_line("cloq", "inspect", folder, "--verify")]
    summary["notes"] = [*summary["notes"], *(trained.get("notes") or [])]
    return summary


def _check_data(recipe: Recipe, tuning: FineTuneRecipe, out: Path, demo: bool) -> None:
    """Read the examples and make sequences of them, which takes minutes at most, before what takes hours.

    Raises:
        DataError: they cannot be read, no sequence comes of them, or the model's chat template refuses one.
        MissingPackageError: they are on the hub, and `datasets` is not installed.
    """
    if RunDirectory.is_run(out) and RunDirectory.open(out).state == "done":
        return
    try:
        found = load_examples(tuning.data)
    except (DataError, MissingPackageError):
        if demo:
            return  # it may fall back on Python's own text
        raise
    source = find_source(recipe.model)
    if source.kind == "gguf":
        return  # its tokenizer comes with reading the model
    read_training_data(tuning, read_tokenizer(source.folder, name=source.name), found, bos=recipe.bos)


def _texts(directory: RunDirectory, recipe: Recipe, demo: bool, console: Console) -> tuple[ExampleSet | None, str]:
    """Return what is learned if it is not what the recipe names, and the text to measure on."""
    calibrated_on = str(directory.read_report(TEXT_REPORT).get("origin", ""))
    if not demo or recipe.calibration == EMBEDDED or not calibrated_on.startswith(EMBEDDED):
        return None, recipe.eval_text
    learned, judging = embedded_texts(Session(recipe, console))
    folder = directory.path / "work"
    folder.mkdir(exist_ok=True)
    write_bytes(folder / "evaluation.txt", judging.text.encode("utf-8"))
    return ExampleSet.of([Example(None, learned.text)], learned.origin), str(folder / "evaluation.txt")


def _trained_already(directory: RunDirectory, tuning: FineTuneRecipe) -> dict[str, Any] | None:
    """Return the summary of a training that an earlier call has finished, None if there is none.

    Raises:
        UsageError: the adapter of that name was trained with other options.
    """
    if not directory.adapter_path(tuning.name).exists() or report_name(tuning.name) not in directory.reports():
        return None
    report = directory.read_report(report_name(tuning.name))
    held = report.get("options") or {}
    faults = [
        f"{name}: {held.get(name)!r} then, {value!r} now"
        for name, value in tuning.to_mapping().items()
        if held.get(name) != value
    ]
    if faults:
        raise UsageError(
            f"{directory.path} has an adapter {tuning.name!r} that was trained with other options "
            f"({'; '.join(faults)}); choose another name with --set finetune.name=NAME, or delete "
            f"{directory.adapter_path(tuning.name)}."
        )
    return {
        "adapter": tuning.name,
        "steps": report["steps"],
        "kept_step": report["kept_step"],
        "notes": [f"the adapter {tuning.name} was trained already"],
    }
