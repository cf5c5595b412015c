"""Train from several start points on the same data and steps, and put what came of it side by side."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import itertools
import math
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.compress.session import Session, plan_model
from cloq_export.engines.transformers.loading import load
from cloq_export.engines.transformers.served import float_model
from cloq_export.errors import DivergedError, RecipeError, UsageError
from cloq_export.files.atomic import write_json
from cloq_export.files.safe_json import read_json
from cloq_export.lab.row_folder import (
    RowFolder,
    environment_mark,
    making_cost,
    row_path,
    seconds_cell,
    table_foot,
    write_table,
)
from cloq_export.lab.table_recipe import (
    is_mapping,
    is_positive,
    is_text,
    is_width,
    listed,
    read_table_recipe,
    whole,
)
from cloq_export.models.library_calls import NO_CODE
from cloq_export.models.saving import save_plain
from cloq_export.models.source import open_model
from cloq_export.models.tokenizer_files import read_tokenizer
from cloq_export.parity.perplexity import perplexity
from cloq_export.parity.plots import line_plot, standalone
from cloq_export.parity.tasks import task_names
from cloq_export.recipe import FineTuneRecipe, Recipe
from cloq_export.texts.corpora import evaluation_text, evaluation_tokens
from cloq_export.texts.named_sets import load_examples
from cloq_export.verbs.answering import Subject, answer_tasks, read_questions
from cloq_export.verbs.finetuning import (
    ZERO_RANK,
    ZERO_START,
    finetune,
    read_training_data,
    report_name,
    run_training,
    training_device,
    zero_pairs,
)
from cloq_export.verbs.verbs import adapt, run

FORMAT, FORMAT_VERSION = "cloq-compare", 1
MEAN = "mean"
_FLOAT_BITS, _NF4_BITS = 16, 4
# The start that all others are put beside.
_LORA = "lora"
# Field of a row -> what the tables and plots call it.
_FIGURES = {
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "held_out_perplexity": "perplexity of held-out examples",
}
# Field of a certificate -> norm: the paper's Figure 2.
_DISCREPANCIES = {"error_adapted": "frobenius", "spectral_error_adapted": "spectral"}


@dataclasses.dataclass(frozen=True)
class Start:
    """A start point.

    Args:
        kind: "run" trains over packed codes, "float" over the float model, "nf4" over bitsandbytes' codes.
        quantize: recipe options of its own base, beside those of all bases.
        adapt: recipe options of an adapter that is made for the codes of that base; None takes the base's own.
        zero: begin with an adapter that changes nothing yet.
    """

    kind: str = "run"
    quantize: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    adapt: Mapping[str, Any] | None = None
    zero: bool = False


STARTS: dict[str, Start] = {
    "cloq": Start(),
    "cloq-paper": Start(quantize={"preset": "paper"}),
    "cloq-refine": Start(quantize={"refine": "model"}),
    # Table 6 of the CLoQ paper.
    "cloq-balanced": Start(adapt={"split": "balanced"}),
    "cloq-transposed": Start(adapt={"split": "transposed"}),
    # GPTQ-LoRA: codes that were calibrated without an adapter behind them.
    "zero": Start(quantize={"rank": 0}, zero=True),
    "zero-on-cloq": Start(zero=True),
    "svd": Start(adapt={"init": "svd"}),
    "loftq": Start(quantize={"init": "loftq"}),
    # Table 7.
    "cloq-32": Start(quantize={"samples": 32}),
    "cloq-64": Start(quantize={"samples": 64}),
    "cloq-128": Start(quantize={"samples": 128}),
    "cloq-256": Start(quantize={"samples": 256}),
    _LORA: Start(kind="float", zero=True),
    "qlora": Start(kind="nf4", zero=True),
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared.

    Args:
        model: the float model.
        quantize: recipe options of every base; "preset" may be among them.
        bits: widths.
        seeds: width -> seeds; the float model takes those of the smallest width.
        starts: names in `STARTS`.
        tasks: name -> "finetune" (options of the training), and how it is judged: "text", "window" and "windows" for
            perplexity, "questions" and "problems" for accuracy.
        rates: learning rates to choose from, the same for every start.
        rate_steps: steps of the training that a rate is judged by.

    Raises:
        RecipeError: a value is missing or has another form; the message lists all faults.
    """

    model: str
    quantize: Mapping[str, Any]
    bits: tuple[int, ...]
    seeds: Mapping[int, tuple[int, ...]]
    starts: tuple[str, ...]
    tasks: Mapping[str, Mapping[str, Any]]
    rates: tuple[float, ...]
    rate_steps: int

    @classmethod
    def read(cls, name: str, *, full: bool = False) -> Comparison:
        """Return the comparison of a file, or of the package by name.

        Args:
            name: a YAML file, or a name such as "small".
            full: with what its section `full` says instead.

        Raises:
            RecipeError: it cannot be read, or a value is wrong.
        """
        content = read_table_recipe(name, "compare", _NEEDED, _faults, full=full)
        seeds = {int(width): tuple(values) for width, values in content["seeds"].items()}
        return cls(
            model=content["model"],
            quantize=content["quantize"],
            bits=tuple(content["bits"]),
            seeds=seeds,
            starts=tuple(content["starts"]),
            tasks=content["tasks"],
            rates=tuple(float(rate) for rate in content["rates"]),
            rate_steps=content["rate_steps"],
        )

    def cases(self) -> list[tuple[str, str, int, int]]:
        """Return (task, start, bits, seed) of every row, in the order in which they are measured."""
        found = []
        for task in self.tasks:
            for bits in sorted(self.bits):
                for start in self.starts:
                    width = {"run": bits, "float": _FLOAT_BITS, "nf4": _NF4_BITS}[STARTS[start].kind]
                    found += [(task, start, width, seed) for seed in self.seeds.get(bits, (0,))]
        return list(dict.fromkeys(found))


# How a task is judged: by perplexity, or by answers.
_JUDGED_BY = {
    "text": (is_text, "a text"),
    "window": (whole(2), "a whole number of at least 2"),
    "windows": (whole(1), "a whole number of at least 1"),
    "questions": (lambda name: name in task_names(), f"a task out of {', '.join(task_names())}"),
    "problems": (whole(1), "a whole number of at least 1"),
}


def _are_seeds(value: Any) -> bool:
    # YAML's keys are read as texts.
    return is_mapping(value) and all(str(width).isdecimal() and listed(whole(0))(own) for width, own in value.items())


_NEEDED = {
    "model": (is_text, "a model"),
    "quantize": (is_mapping, "a mapping of recipe options"),
    "bits": (listed(is_width), "a list of widths out of 2, 3, 4 and 8"),
    "seeds": (_are_seeds, "a mapping from a width to a list of whole numbers"),
    "starts": (listed(is_text), "a list of starts"),
    "tasks": (lambda tasks: is_mapping(tasks) and bool(tasks), "a mapping from a name to its options"),
    "rates": (listed(is_positive), "a list of learning rates above 0"),
    "rate_steps": (whole(1), "a whole number of at least 1"),
}


def compare(
    comparison: Comparison,
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
    work = _Work(comparison, out, console)
    missing = [
        (task, start, width, seed)
        for task, start, width, seed in comparison.cases()
        if (not starts or start in starts) and (not tasks or task in tasks) and (not bits or width in bits)
        if not work.rows.has(_row_name(task, start, width, seed))
    ]
    for task in dict.fromkeys(task for task, *_ in missing):
        _check_data(comparison.tasks[task])
    for task, start, width, seed in missing:
        console.print(f"{task}, {start}, {width} bits, seed {seed}", highlight=False, markup=False)
        work.rows.write(_row_name(task, start, width, seed), work.measure(task, start, width, seed))
        gc.collect()
    return write_comparison(comparison, out)


def write_comparison(comparison: Comparison, out: Path) -> dict[str, Any]:
    """Write compare.json, compare.md and the plots from the rows that are there.

    Args:
        comparison: what is compared.
        out: its folder.

    Returns:
        dict: what compare.json holds, with "files" beside it.
    """
    rows, curves = [], {}
    for task, start, width, seed in comparison.cases():
        path = row_path(out, _row_name(task, start, width, seed))
        if path.exists():
            row = read_json(path)
            curves[task, start, width, seed] = row.pop("curve", None)
            if row.get("held_out_loss") is not None:
                row["held_out_perplexity"] = math.exp(row["held_out_loss"])
            rows.append(row)
    missing = len(comparison.cases()) - len(rows)
    rows += _means(rows)
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "comparison": dataclasses.asdict(comparison),
        "missing_rows": missing,
        "bases": _bases(out),
        "rows": rows,
    }

    def plots(result: Mapping[str, Any]) -> dict[str, str]:
        return _plots(comparison, out, result["rows"], curves)

    return write_table(out, "compare", content, comparison_table, plots)


def comparison_table(result: Mapping[str, Any]) -> str:
    """Return the rows as tables in Markdown: one line for each start, one column for each width.

    Args:
        result: what compare.json holds.
    """
    lines: list[str] = []
    rows = [row for row in result["rows"] if row["seed"] == MEAN]
    for task in dict.fromkeys(row["task"] for row in rows):
        for figure, called in _FIGURES.items():
            chosen = [row for row in rows if row["task"] == task and row.get(figure) is not None]
            widths = sorted({row["bits"] for row in chosen})
            if not chosen:
                continue
            beside = (
                "; beside 16-bit LoRA" if figure == "perplexity" and any(r["init"] == _LORA for r in chosen) else ""
            )
            lines += [f"{task}, {called} after training (mean ± spread over seeds{beside}):", ""]
            lines += ["| start | " + " | ".join(f"{width} bits" for width in widths) + " |"]
            lines += ["|---|" + "---|" * len(widths)]
            for init in dict.fromkeys(row["init"] for row in chosen):
                cells = [_cell(chosen, init, width, figure) for width in widths]
                lines.append(f"| {init} | " + " | ".join(cells) + " |")
            lines.append("")
    failed = [row for row in result["rows"] if row.get("failed")]
    if failed:
        lines += [*(f"- {row['init']}, {row['task']}, seed {row['seed']}: {row['failed']}" for row in failed), ""]
    if result["bases"]:
        lines += [
            "| base | seconds | peak memory beyond the model | mean relative discrepancy, Frobenius | spectral |",
        ]
        lines += ["|---|---|---|---|---|"]
        for name, base in result["bases"].items():
            beyond = base.get("memory_beyond_model_bytes")
            memory = "" if beyond is None else f"{beyond / 1e9:.2f} GB"
            seconds = seconds_cell(base["seconds"], environment_mark([base["environment"]], result["environments"]))
            discrepancies = " | ".join(f"{base[f'mean_{field}']:.4f}" for field in _DISCREPANCIES)
            lines.append(f"| {name} | {seconds} | {memory} | {discrepancies} |")
    lines += table_foot(result)
    return "\n".join(lines) + "\n"


class _Work:
    """One comparison on disk."""

    def __init__(self, comparison: Comparison, out: Path, console: Console) -> None:
        self.comparison = comparison
        self.out = out
        self.console = console
        self.rows = RowFolder(out, "comparison", dataclasses.asdict(comparison))
        (out / "bases").mkdir(exist_ok=True)

    def measure(self, task: str, start: str, width: int, seed: int) -> dict[str, Any]:
        """Tune the rate, train and judge."""
        row: dict[str, Any] = {"task": task, "init": start, "bits": width, "seed": seed}
        kind = STARTS[start].kind
        trainer: _Trainer = _RunTrainer(self, start, width) if kind == "run" else _FloatTrainer(self, start, kind)
        try:
            rate, tried = self._rate(trainer, task, start, width)
            recipe = self._recipe(task, f"{task}-seed{seed}").changed({"seed": seed, "learning_rate": rate})
            curve, model, tokenizer = trainer.train(recipe)
        except DivergedError as error:
            return row | {"failed": str(error)}
        except _UnavailableError as error:
            return row | {"failed": f"not available here: {error}"}
        before = curve["evaluations"][0]["loss"] if curve["evaluations"] else None
        row |= {"learning_rate": rate, "tried_rates": tried, "steps": curve["steps"], "kept_step": curve["kept_step"]}
        row |= {"held_out_loss_before": before, "held_out_loss": curve["kept_loss"]}
        return row | self._judge(task, model, tokenizer, f"{start}-{width}-{seed}") | {"curve": curve}

    @property
    def bos(self) -> str:
        """Return what each window of a text begins with, in training and in judging."""
        return _base_recipe(self.comparison.model, self.comparison.quantize).bos

    def base(self, start: str, width: int) -> Path:
        """Return the run that a start trains over, made if need be, with its adapter."""
        own = STARTS[start]
        recipe = _base_recipe(self.comparison.model, {**self.comparison.quantize, **own.quantize, "bits": width})
        folder = self.out / "bases" / base_name(own, width)
        if not RunDirectory.is_run(folder) or RunDirectory.open(folder).state != "done":
            in_one_go = not folder.exists()
            summary = run(recipe, folder, console=self.console)
            figures = {
                **making_cost(summary, in_one_go=in_one_go),
                "environment": self.rows.environment(),
                # Where the text lay says nothing; its hash does.
                "perplexity": {key: value for key, value in summary["perplexity"].items() if key != "text"},
            }
            with RunDirectory.open(folder) as directory:
                directory.write_report("cost", figures)
        if own.adapt is not None and start not in RunDirectory.open(folder).adapters.folders:
            adapt(folder, {**own.adapt, "adapter_name": start}, console=self.console)
        return folder

    def _recipe(self, task: str, name: str) -> FineTuneRecipe:
        return FineTuneRecipe.from_mapping({**self.comparison.tasks[task]["finetune"], "name": name})

    def _rate(self, trainer: _Trainer, task: str, start: str, width: int) -> tuple[float, dict[str, float | None]]:
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
        found: dict[str, Any] = {}
        model.eval()
        if "text" in options:
            text = evaluation_text(options["text"]).text
            tokens = evaluation_tokens(tokenizer, text, options["window"], self.bos)
            sizes = {"window": options["window"], "windows": options["windows"]}
            measured = perplexity(model, tokens, **sizes, console=self.console)
            found |= {"perplexity": measured.perplexity, "standard_error": measured.standard_error}
        if "questions" in options:
            questions = read_questions({options["questions"]: None}, options["problems"], 0)
            session = Session(Recipe(), self.console)
            subject = Subject(name, float_model(model), None, name)
            entry = answer_tasks(session, questions, [subject], tokenizer, None, None)[options["questions"]]
            found |= {"accuracy": entry["models"][name]["accuracy"], "questions": entry["questions"]}
        return found


class _UnavailableError(Exception):
    """What a start needs is not there; its row says so."""


Trained = tuple[dict[str, Any], nn.Module, Any]


class _Trainer:
    """Trains from one start."""

    def train(self, recipe: FineTuneRecipe, *, judge: bool = True) -> Trained:
        """Return the curve, the trained model in float32 arithmetic where it can have that, and its tokenizer."""
        raise NotImplementedError

    def forget(self, recipe: FineTuneRecipe) -> None:
        """Remove what a training left that only served to choose a rate."""
        raise NotImplementedError


class _RunTrainer(_Trainer):
    """Over packed codes, through the verb that users call; what is judged is read back from the files."""

    def __init__(self, work: _Work, start: str, width: int) -> None:
        self._own = STARTS[start]
        self._name = start
        self._folder = work.base(start, width)
        self._console = work.console

    def train(self, recipe: FineTuneRecipe, *, judge: bool = True) -> Trained:
        begin = ZERO_START if self._own.zero else self._name if self._own.adapt is not None else ""
        # Starts that share a base must not share a name.
        recipe = self._named(recipe).changed({"start": begin})
        directory = RunDirectory.open(self._folder)
        if report_name(recipe.name) not in directory.reports():
            shutil.rmtree(directory.adapter_path(recipe.name), ignore_errors=True)
            finetune(self._folder, recipe, console=self._console)
        curve = directory.read_report(report_name(recipe.name))
        tokenizer = read_tokenizer(directory.checkpoint_path)
        model = load(self._folder, recipe.name, dtype=torch.float32) if judge else nn.Identity()
        return curve, model, tokenizer

    def forget(self, recipe: FineTuneRecipe) -> None:
        directory = RunDirectory.open(self._folder)
        shutil.rmtree(directory.adapter_path(self._named(recipe).name), ignore_errors=True)
        shutil.rmtree(self._folder / "work" / f"finetune-{self._named(recipe).name}", ignore_errors=True)

    def _named(self, recipe: FineTuneRecipe) -> FineTuneRecipe:
        return recipe.changed({"name": f"{self._name}-{recipe.name}"})


class _FloatTrainer(_Trainer):
    """Over the float model in the training's precision, or over bitsandbytes' NF4 codes of it."""

    def __init__(self, work: _Work, start: str, kind: str) -> None:
        self._work, self._name, self._kind = work, start, kind

    def train(self, recipe: FineTuneRecipe, *, judge: bool = True) -> Trained:
        device, dtype = training_device(recipe)
        loaded = open_model(self._work.comparison.model, dtype=torch.float32)
        options = {**self._work.comparison.quantize, "model": self._work.comparison.model}
        options.pop("preset", None)
        plan, _ = plan_model(loaded.model, Recipe.from_mapping(options))
        shapes = {name: tuple(loaded.model.get_submodule(name).weight.shape) for name in plan.modules}
        model = loaded.model.to(dtype) if self._kind == "float" else self._nf4(loaded, dtype)
        attach_pairs(model, zero_pairs(shapes, dict.fromkeys(shapes, ZERO_RANK), recipe.seed))
        session = Session(Recipe(), self._work.console)
        data = read_training_data(recipe, loaded.tokenizer, bos=self._work.bos)
        folder = self._folder(recipe)
        training = run_training(session, model, data, recipe, folder, device, dtype)
        if judge and self._kind == "float":
            model.to(torch.float32)
        return dataclasses.asdict(training.curve), model, loaded.tokenizer

    def forget(self, recipe: FineTuneRecipe) -> None:
        shutil.rmtree(self._folder(recipe), ignore_errors=True)

    def _folder(self, recipe: FineTuneRecipe) -> Path:
        return self._work.out / "bases" / f"{self._name}-work" / recipe.name

    def _nf4(self, loaded: Any, dtype: torch.dtype) -> nn.Module:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise _UnavailableError("bitsandbytes is not installed (pip install cloq-export[qlora])")
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        folder = self._work.out / "bases" / "float-model"
        if not (folder / "config.json").exists():
            save_plain(loaded, folder)
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, **NO_CODE)
        except Exception as error:  # the library raises what its backend raises
            raise _UnavailableError(" ".join(str(error).split())[:200]) from None
        for module in model.modules():
            # On a CPU the library repacks its codes at the first evaluation, for good and only for rows of whole
            # blocks; the trained layers must go on with the codes that they have.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model  # type: ignore[no-any-return]


def attach_pairs(model: Any, pairs: Mapping[str, Any]) -> None:
    """Let PEFT wrap linears of a model with given pairs, held in float32; nothing else asks for gradients.

    Args:
        model: a transformers model.
        pairs: full module name -> pair, all of one alpha over rank.
    """
    from peft import LoraConfig

    ranks = {name: pair.rank for name, pair in pairs.items()}
    largest = max(ranks.values())
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        target_modules=set(pairs),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != largest},
        alpha_pattern={name: rank for name, rank in ranks.items() if rank != largest},
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        model.add_adapter(config, "default")
    model.requires_grad_(False)
    for name, pair in pairs.items():
        layer = model.get_submodule(name)
        for side, values in ((layer.lora_A["default"], pair.lora_A), (layer.lora_B["default"], pair.lora_B)):
            side.weight = nn.Parameter(values.to(side.weight.device, torch.float32).clone())


def _base_recipe(model: str, quantize: Mapping[str, Any]) -> Recipe:
    options = {**quantize, "model": model}
    return Recipe.from_mapping(options, preset=str(options.pop("preset", "default")))


def base_name(start: Start, width: int) -> str:
    """Return the folder name of a start's base: starts with equal options share one."""
    if not start.quantize:
        return f"int{width}"
    told = "-".join(f"{key}-{value}" for key, value in sorted(start.quantize.items()))
    return f"int{width}-{told}"


def _faults(content: Mapping[str, Any]) -> Iterable[str]:
    strange = [name for name in content["starts"] if name not in STARTS]
    if strange:
        yield f"the start {strange[0]!r} is unknown; allowed are {', '.join(STARTS)}"
    try:
        _base_recipe(content["model"], content["quantize"])
    except RecipeError as error:
        yield f"quantize: {str(error).removesuffix('.')}"
    for name, task in content["tasks"].items():
        if not is_mapping(task) or not is_mapping(task.get("finetune")) or set(task) - {"finetune", *_JUDGED_BY}:
            yield f"the task {name!r} needs 'finetune', and of {', '.join(_JUDGED_BY)} what it is judged by"
            continue
        if not {"text", "window", "windows"} <= set(task) and not {"questions", "problems"} <= set(task):
            yield f"the task {name!r} is judged by nothing; give text, window and windows, or questions and problems"
        for key in [key for key in _JUDGED_BY if key in task and not _JUDGED_BY[key][0](task[key])]:
            yield f"the task {name!r}: {key} is {task[key]!r}; {_JUDGED_BY[key][1]} is needed"
        try:
            learned = FineTuneRecipe.from_mapping(task["finetune"])
        except RecipeError as error:
            yield f"the task {name!r}: {str(error).removesuffix('.')}"
            continue
        if not learned.data:
            yield f"the task {name!r} learns from nothing; give data"
        if not learned.eval_samples:
            yield f"the task {name!r} evaluates nothing, so no learning rate can be chosen; give eval_samples"


def _check_data(options: Mapping[str, Any]) -> None:
    """Read what a task is learned and judged by, which is cheap, before a base is made for it.

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
        read_questions({options["questions"]: None}, options["problems"], 0)


def _row_name(task: str, start: str, width: int, seed: int) -> str:
    return f"{task}-{start}-{width}-{seed}"


def _means(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each task, start and width with the means over its seeds and their spread."""
    found = []
    for key in dict.fromkeys((row["task"], row["init"], row["bits"]) for row in rows):
        own = [row for row in rows if (row["task"], row["init"], row["bits"]) == key and not row.get("failed")]
        if not own:
            continue
        mean: dict[str, Any] = dict(zip(("task", "init", "bits"), key, strict=True)) | {"seed": MEAN, "seeds": len(own)}
        for figure in _FIGURES:
            values = [row[figure] for row in own if row.get(figure) is not None]
            if values:
                mean[figure] = statistics.fmean(values)
                mean[f"{figure}_spread"] = statistics.stdev(values) if len(values) > 1 else None
        found.append(mean)
    return found


def _cell(rows: Sequence[Mapping[str, Any]], init: str, width: int, figure: str) -> str:
    row = next((row for row in rows if (row["init"], row["bits"]) == (init, width)), None)
    if row is None:
        return ""
    spread = row.get(f"{figure}_spread")
    digits = 2 if figure == "perplexity" else 3
    cell = f"{row[figure]:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")
    whole = next((row for row in rows if row["init"] == _LORA), None)
    if whole is not None and init != _LORA and figure == "perplexity":
        cell += f" ({row[figure] / whole[figure]:.2f}x)"
    return cell


def _bases(out: Path) -> dict[str, Any]:
    found = {}
    for folder in sorted((out / "bases").iterdir()) if (out / "bases").is_dir() else ():
        if not RunDirectory.is_run(folder) or "cost" not in RunDirectory.open(folder).reports():
            continue
        directory = RunDirectory.open(folder)
        certificates = directory.certificates()
        found[folder.name] = directory.read_report("cost") | {
            f"mean_{field}": statistics.fmean(getattr(certificate, field) for certificate in certificates)
            for field in _DISCREPANCIES
        }
    return found


def _plots(
    comparison: Comparison, out: Path, rows: Sequence[Mapping[str, Any]], curves: Mapping[Any, Any]
) -> dict[str, str]:
    pictures = {}
    means = [row for row in rows if row["seed"] == MEAN]
    for task in comparison.tasks:
        for figure, called in _FIGURES.items():
            chosen = [row for row in means if row["task"] == task and row.get(figure) is not None]
            series = []
            for init in dict.fromkeys(row["init"] for row in chosen):
                points = sorted((float(row["bits"]), float(row[figure])) for row in chosen if row["init"] == init)
                series.append((init, [x for x, _ in points], [y for _, y in points]))
            if series:
                plot = line_plot(series, x_label="bits", y_label=called, log_y=figure != "accuracy")
                pictures[f"{task}-{figure}"] = standalone(plot)
        for width in comparison.bits:
            drawn = {
                start: curve
                for (name, start, own, seed), curve in curves.items()
                if curve and name == task and own in (width, _FLOAT_BITS) and seed == 0
            }
            if drawn:
                series = [
                    (start, [float(p["step"]) for p in c["losses"]], [float(p["loss"]) for p in c["losses"]])
                    for start, c in drawn.items()
                ]
                plot = line_plot(series, x_label="step", y_label=f"loss at {width} bits")
                pictures[f"{task}-losses-{width}"] = standalone(plot)
    for width, (field, norm) in itertools.product(comparison.bits, _DISCREPANCIES.items()):
        series = []
        for start in comparison.starts:
            folder = out / "bases" / base_name(STARTS[start], width)
            own_codes = STARTS[start].kind == "run" and STARTS[start].adapt is None and not STARTS[start].zero
            if own_codes and RunDirectory.is_run(folder):
                errors = [getattr(certificate, field) for certificate in RunDirectory.open(folder).certificates()]
                series.append((start, [float(n) for n in range(len(errors))], errors))
        if series:
            plot = line_plot(series, x_label="layer", y_label=f"relative discrepancy, {norm}", log_y=True)
            pictures[f"discrepancy-{norm}-{width}"] = standalone(plot)
    return pictures
