"""Train from several start points on the same data with the same steps, and compare the results."""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.compress.session import Session
from cloq_export.engines.transformers.served import float_model
from cloq_export.errors import DivergedError, UsageError
from cloq_export.files.atomic import write_json
from cloq_export.files.safe_json import read_json
from cloq_export.lab.comparison import STARTS, ComparisonRecipe, base_name, base_recipe, row_name
from cloq_export.lab.comparison_report import write_comparison
from cloq_export.lab.row_folder import RowFolder, making_cost, row_path
from cloq_export.lab.trainers import FloatTrainer, RunTrainer, Trainer, UnavailableError
from cloq_export.parity.perplexity import perplexity
from cloq_export.parity.tasks import expand_names
from cloq_export.recipe import FineTuneRecipe
from cloq_export.texts.corpora import evaluation_text, evaluation_tokens
from cloq_export.texts.named_sets import load_examples
from cloq_export.verbs.adapt import adapt
from cloq_export.verbs.answering import Subject, answer_tasks, read_questions
from cloq_export.verbs.run import run


def compare(
    comparison: ComparisonRecipe,
    out: Path,
    *,
    starts: Sequence[str] = (),
    bits: Sequence[int] = (),
    tasks: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure the rows of a comparison that are not measured yet, and write the table and the plots of all there are.

    Every row is kept as soon as it is measured, and a training that was interrupted continues.

    Args:
        comparison: what is compared.
        out: folder for bases, rows, table and plots.
        starts: only these; none is all.
        bits: only these widths; none is all. 16 is the float model.
        tasks: only these; none is all.
        console: where progress goes; None is standard error.

    Returns:
        dict: what compare.json holds, with "files" beside it.

    Raises:
        UsageError: the folder holds another comparison, or a name is not in this one.
        CloqError: a model or data cannot be read.
    """
    console = console or Console(stderr=True)
    for asked, known, what in ((starts, comparison.starts, "start"), (tasks, tuple(comparison.tasks), "task")):
        strange = [name for name in asked if name not in known]
        if strange:
            raise UsageError(f"the comparison has no {what} {strange[0]!r}; it has {', '.join(known)}.")
    work = ComparisonFolder(comparison, out, console)
    missing = [
        (task, start, width, seed)
        for task, start, width, seed in comparison.cases()
        if (not starts or start in starts) and (not tasks or task in tasks) and (not bits or width in bits)
        if not work.rows.has(row_name(task, start, width, seed))
    ]
    for task in dict.fromkeys(task for task, *_ in missing):
        _check_data(comparison.tasks[task])
    for task, start, width, seed in missing:
        console.print(f"{task}, {start}, {width} bits, seed {seed}", highlight=False, markup=False)
        work.rows.write(row_name(task, start, width, seed), work.measure(task, start, width, seed))
        gc.collect()
    return write_comparison(comparison, out)


class ComparisonFolder:
    """One comparison on disk."""

    def __init__(self, comparison: ComparisonRecipe, out: Path, console: Console) -> None:
        self.comparison = comparison
        self.out = out
        self.console = console
        asked = {**dataclasses.asdict(comparison), "reserve": comparison.reserve}
        self.rows = RowFolder(out, "comparison", asked)
        (out / "bases").mkdir(exist_ok=True)

    def measure(self, task: str, start: str, width: int, seed: int) -> dict[str, Any]:
        """Tune the rate, train and judge."""
        row: dict[str, Any] = {"task": task, "init": start, "bits": width, "seed": seed}
        trainer = self._trainer(start, width)
        try:
            rate, tried = self._rate(trainer, task, start, width)
            recipe = self._recipe(task, f"{task}-seed{seed}").changed({"seed": seed, "learning_rate": rate})
            curve, model, tokenizer = trainer.train(recipe)
        except DivergedError as error:
            return row | {"failed": str(error)}
        except UnavailableError as error:
            return row | {"failed": f"not available here: {error}"}
        before = curve["evaluations"][0]["loss"] if curve["evaluations"] else None
        row |= {"learning_rate": rate, "tried_rates": tried, "steps": curve["steps"], "kept_step": curve["kept_step"]}
        row |= {"held_out_loss_before": before, "held_out_loss": curve["kept_loss"]}
        if curve.get("held_out"):
            row["held_out_tokens_calibrated_on"] = curve["held_out"]["calibrated_tokens"]
        return row | self._judge(task, model, tokenizer, f"{start}-{width}-{seed}") | {"curve": curve}

    def _trainer(self, start: str, width: int) -> Trainer:
        if STARTS[start].kind == "run":
            return RunTrainer(self.base(start, width), start, self.console)
        return FloatTrainer(self.comparison, start, self.out / "bases", self.console)

    def base(self, start: str, width: int) -> Path:
        """Return the run that a start trains over, made if need be, with its adapter."""
        own = STARTS[start]
        options = {**self.comparison.quantize, **own.quantize, "bits": width, "reserve": self.comparison.reserve}
        recipe = base_recipe(self.comparison.model, options)
        folder = self.out / "bases" / base_name(own, width)
        if not RunDirectory.is_run(folder) or RunDirectory.open(folder).state != "done":
            in_one_go = not folder.exists()
            summary = run(recipe, folder, console=self.console).to_json()
            figures = {
                **making_cost(summary, in_one_go=in_one_go),
                "environment": self.rows.environment(),
                # The path of the text is left out; its hash identifies it.
                "perplexity": {key: value for key, value in summary["perplexity"].items() if key != "text"},
            }
            with RunDirectory.open(folder) as directory:
                directory.write_report("cost", figures)
        if own.adapt is not None and start not in RunDirectory.open(folder).adapters.folders:
            adapt(folder, {**own.adapt, "adapter_name": start}, console=self.console)
        return folder

    def _recipe(self, task: str, name: str) -> FineTuneRecipe:
        return FineTuneRecipe.from_mapping({**self.comparison.tasks[task]["finetune"], "name": name})

    def _rate(self, trainer: Trainer, task: str, start: str, width: int) -> tuple[float, dict[str, float | None]]:
        """Return the rate with the least held-out loss after a short training, and the loss of each."""
        path = row_path(self.out, f"rates-{task}-{start}-{width}")
        tried: dict[str, float | None] = read_json(path) if path.exists() else {}
        for rate in self.comparison.rates:
            if f"{rate:g}" in tried:
                continue
            recipe = self._recipe(task, f"{task}-rate{rate:g}")
            steps = self.comparison.rate_steps
            recipe = recipe.changed({"steps": steps, "eval_every": steps, "learning_rate": rate})
            try:
                tried[f"{rate:g}"] = trainer.train(recipe, judge=False)[0]["kept_loss"]
            except DivergedError:
                tried[f"{rate:g}"] = None
            trainer.forget(recipe)
            write_json(path, tried)
        settled = [(loss, float(rate)) for rate, loss in tried.items() if loss is not None and math.isfinite(loss)]
        if not settled:
            raise DivergedError(f"every learning rate of {list(tried)} diverged, or nothing was evaluated")
        return min(settled)[1], tried

    def _judge(self, task: str, model: nn.Module, tokenizer: Any, name: str) -> dict[str, Any]:
        options = self.comparison.tasks[task]
        judged: dict[str, Any] = {}
        model.eval()
        if "text" in options:
            text = evaluation_text(options["text"]).text
            tokens = evaluation_tokens(tokenizer, text, options["window"], self.comparison.bos)
            sizes = {"window": options["window"], "windows": options["windows"]}
            measured = perplexity(model, tokens, **sizes, console=self.console)
            judged |= {"perplexity": measured.perplexity, "standard_error": measured.standard_error}
        if "questions" in options:
            questions = read_questions(expand_names([options["questions"]]), options["problems"], 0)
            session = Session(self.console)
            subject = Subject(name, float_model(model), None, name)
            entries = answer_tasks(session, questions, [subject], tokenizer, None, None)
            accuracies = {task: entry.models[name].accuracy for task, entry in entries.items()}
            asked = sum(entry.questions for entry in entries.values())
            # Of a group the mean over its tasks, as the paper's tables have it.
            judged |= {"accuracy": statistics.fmean(accuracies.values()), "questions": asked}
            if len(accuracies) > 1:
                judged["accuracies"] = accuracies
        return judged


def _check_data(options: Mapping[str, Any]) -> None:
    """Read the data of a task, which is cheap, before a base is made for it.

    Raises:
        CloqError: something is not there, or cannot be read.
    """
    learned = FineTuneRecipe.from_mapping(options["finetune"])
    for name in (learned.data, learned.eval_data):
        if name:
            load_examples(name)
    if "text" in options:
        evaluation_text(options["text"])
    if "questions" in options:
        read_questions(expand_names([options["questions"]]), options["problems"], 0)
