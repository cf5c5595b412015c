"""What a comparison is: start points, tasks, widths and seeds, read from a recipe and checked as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from cloq_export.errors import RecipeError
from cloq_export.lab.table_recipe import (
    is_mapping,
    is_positive,
    is_text,
    is_width,
    list_of,
    read_table_recipe,
    whole,
)
from cloq_export.parity.tasks import GROUPS, task_names
from cloq_export.recipe import FineTuneRecipe, Recipe

FLOAT_BITS, NF4_BITS = 16, 4
# The start that all others are compared with.
LORA = "lora"


@dataclasses.dataclass(frozen=True)
class Start:
    """A start point.

    Args:
        kind: "run" trains over packed codes, "float" over the float model, "nf4" over bitsandbytes' codes.
        quantize: recipe options of its own base, besides those of all bases.
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
    "cloq-low-rank": Start(quantize={"low_rank_rounds": 3}),
    # Table 6 of the CLoQ paper.
    "cloq-balanced": Start(adapt={"split": "balanced"}),
    "cloq-transposed": Start(adapt={"split": "transposed"}),
    # GPTQ-LoRA: codes that were calibrated without an adapter behind them.
    "zero": Start(quantize={"rank": 0}, zero=True),
    "zero-on-cloq": Start(zero=True),
    "svd": Start(adapt={"init": "svd"}),
    "loftq": Start(quantize={"init": "loftq"}),
    "apiq-lw": Start(quantize={"refine": "apiq-lw"}),
    "apiq-bw": Start(quantize={"refine": "apiq-bw"}),
    # Table 7.
    "cloq-32": Start(quantize={"samples": 32}),
    "cloq-64": Start(quantize={"samples": 64}),
    "cloq-128": Start(quantize={"samples": 128}),
    "cloq-256": Start(quantize={"samples": 256}),
    LORA: Start(kind="float", zero=True),
    "qlora": Start(kind="nf4", zero=True),
}


@dataclasses.dataclass(frozen=True)
class ComparisonRecipe:
    """What is compared.

    Args:
        model: the float model.
        quantize: recipe options of every base; "preset" may be among them.
        bits: widths.
        seeds: width -> seeds; the float model takes those of the smallest width.
        starts: names in `STARTS`.
        tasks: name -> "finetune" (options of the training), and how it is judged: "text", "window" and "windows" for
            perplexity, "questions" (a task or a group of tasks) and "problems" (of each) for accuracy.
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
    def read(cls, name: str, *, model: str = "", full: bool = False) -> ComparisonRecipe:
        """Return the comparison of a file, or of the package by name.

        Args:
            name: a YAML file, or a name such as "small".
            model: taken instead of the file's.
            full: with what its section `full` says instead.

        Raises:
            RecipeError: it cannot be read, or a value is wrong.
        """
        changes = {"model": model} if model else {}
        content = read_table_recipe(name, "compare", _NEEDED, _faults, full=full, changes=changes)
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

    @property
    def reserve(self) -> int:
        """Return how many tokens at the end of each calibration text no base sees.

        A training holds the end of its text out, and learning rates are chosen there: no start may know it before.
        """
        trainings = [FineTuneRecipe.from_mapping(task["finetune"]) for task in self.tasks.values()]
        own = base_recipe(self.model, self.quantize).reserve
        # One sequence more: the last one may not be full.
        held_out = [(each.eval_samples + 1) * each.seqlen for each in trainings if not each.eval_data]
        return max([own, *held_out])

    @property
    def bos(self) -> str:
        """Return what each window of a text begins with, in training and in judging."""
        return base_recipe(self.model, self.quantize).bos

    def cases(self) -> list[tuple[str, str, int, int]]:
        """Return (task, start, bits, seed) of every row, in the order in which they are measured."""
        cases = []
        for task in self.tasks:
            for bits in sorted(self.bits):
                for start in self.starts:
                    width = {"run": bits, "float": FLOAT_BITS, "nf4": NF4_BITS}[STARTS[start].kind]
                    cases += [(task, start, width, seed) for seed in self.seeds.get(bits, (0,))]
        return list(dict.fromkeys(cases))


# How a task is judged: by perplexity, or by answers.
_JUDGED_BY = {
    "text": (is_text, "a text"),
    "window": (whole(2), "a whole number of at least 2"),
    "windows": (whole(1), "a whole number of at least 1"),
    "questions": (
        lambda name: name in (*task_names(), *GROUPS),
        f"a task or group out of {', '.join((*task_names(), *GROUPS))}",
    ),
    "problems": (whole(1), "a whole number of at least 1"),
}


def _are_seeds(value: Any) -> bool:
    # Keys of a YAML mapping are read as texts.
    return is_mapping(value) and all(str(width).isdecimal() and list_of(whole(0))(own) for width, own in value.items())


_NEEDED = {
    "model": (is_text, "a model"),
    "quantize": (is_mapping, "a mapping of recipe options"),
    "bits": (list_of(is_width), "a list of widths out of 2, 3, 4 and 8"),
    "seeds": (_are_seeds, "a mapping from a width to a list of whole numbers"),
    "starts": (list_of(is_text), "a list of starts"),
    "tasks": (lambda tasks: is_mapping(tasks) and bool(tasks), "a mapping from a name to its options"),
    "rates": (list_of(is_positive), "a list of learning rates above 0"),
    "rate_steps": (whole(1), "a whole number of at least 1"),
}


def base_recipe(model: str, quantize: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a base from its options; "preset" may be among them."""
    options = {**quantize, "model": model}
    return Recipe.from_mapping(options, preset=str(options.pop("preset", "default")))


def base_name(start: Start, width: int) -> str:
    """Return the folder name of a start's base: starts with equal options share one."""
    if not start.quantize:
        return f"int{width}"
    told = "-".join(f"{key}-{value}" for key, value in sorted(start.quantize.items()))
    return f"int{width}-{told}"


def row_name(task: str, start: str, width: int, seed: int) -> str:
    """Return the name of a row's file."""
    return f"{task}-{start}-{width}-{seed}"


def _faults(content: Mapping[str, Any]) -> Iterable[str]:
    strange = [name for name in content["starts"] if name not in STARTS]
    if strange:
        yield f"the start {strange[0]!r} is unknown; allowed are {', '.join(STARTS)}"
    try:
        base_recipe(content["model"], content["quantize"])
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
