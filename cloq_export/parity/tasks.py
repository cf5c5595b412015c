"""Tasks by name: where their questions come from, how they are put to a model, and how its answers are read."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from cloq_export.errors import DataError, UsageError
from cloq_export.parity import arithmetic, gsm8k
from cloq_export.parity.commonsense import (
    COMMONSENSE_SETS,
    CommonsenseSet,
    first_label,
    harness_definition,
    stated_label,
)
from cloq_export.parity.continuations import read_continuation
from cloq_export.parity.questions import question_hash, row_hashes
from cloq_export.parity.task_kinds import (
    ChoiceTask,
    ContinuationTask,
    Gsm8kTask,
    Question,
    Questions,
    Task,
    WrittenTask,
)
from cloq_export.texts.data_sets import hub_rows, local_file
from cloq_export.texts.examples import instruction_prompt
from cloq_export.texts.named_sets import WORD_PROBLEM_COUNTS, WORD_PROBLEM_SETS
from cloq_export.texts.reading import read_rows
from cloq_export.texts.word_problems import generate

# Accepted among the tasks, although it asks no questions.
PERPLEXITY = "ppl"
# Behind a task's name: put as LLM-Adapters puts it, and read by its rules.
INSTRUCTION = "instruction"
# Tokens that an answer may take: a worked solution, and a label as LLM-Adapters limits it.
_SOLUTION_TOKENS = 256
_LABEL_TOKENS = 32
# What ends the answer to an instruction, besides the tokenizer's own end.
_INSTRUCTION_ENDS = ("\n### ", "</s>", "<|im_end|>")
CONTINUATIONS = "continuations"
_OWN_RULES = "four endings of neighbouring paragraphs; the choice of the largest log-likelihood"
_ADAPTERS_RULES = "LLM-Adapters (arXiv:2304.01933), greedy"


# Task -> what makes it; nothing is read before it is asked for.
_MAKERS: dict[str, Callable[[], Task]] = {}
GROUPS: dict[str, tuple[str, ...]] = {
    "arithmetic": (f"gsm8k:{INSTRUCTION}", "svamp", "mawps", "aqua"),
    "commonsense": tuple(f"{name}:{INSTRUCTION}" for name in COMMONSENSE_SETS),
}


def task_names() -> tuple[str, ...]:
    """Return the names of all tasks."""
    return tuple(_MAKERS)


def gate_key(task: str) -> str:
    """Return a task's name as the names of its figures begin."""
    return task.replace("-", "_").replace(":", "_")


def expand_names(asked: Sequence[str]) -> dict[str, str | None]:
    """Return task -> its file or None, with groups replaced by their tasks.

    Args:
        asked: TASK, TASK=FILE or a group.

    Raises:
        UsageError: there is no such task, or a group is given a file.
    """
    files: dict[str, str | None] = {}
    for text in asked:
        name, separator, file = text.partition("=")
        if name in GROUPS and separator:
            raise UsageError(f"the task {text}: {name} is a group; name a file for each of {', '.join(GROUPS[name])}.")
        if name not in GROUPS and name not in _MAKERS:
            known = (*_MAKERS, *GROUPS)
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"`tasks` is {name!r}; allowed are {PERPLEXITY}, {', '.join(known)}.{hint}")
        for task in GROUPS.get(name, (name,)):
            files[task] = (file or None) if separator else files.get(task)
    return files


def find_task(name: str) -> Task:
    """Return a task.

    Args:
        name: one of `task_names()`.

    Raises:
        FormatError: the installed lm-evaluation-harness defines the task in a form that is not known here.
    """
    return _MAKERS[name]()


def load_questions(task: Task, file: str | None, *, count: int | None = None, shots: int = 0) -> Questions:
    """Return the questions of a task.

    Args:
        task: the task.
        file: a file of JSON rows; None takes the data folder's (the one that CLOQ_DATA names), else the
            hub's; word problems are generated, and continuations made from a text.
        count: only so many, from the start.
        shots: worked examples before each.

    Raises:
        DataError: the questions cannot be found or read, or a row has no answer: the message says which.
        UsageError: the task takes no worked examples.
        MissingPackageError: they are on the hub, and `datasets` is not installed.
    """
    if shots and not task.takes_examples:
        task.with_examples((), shots)
    rows, origin = task.rows(file)
    # All rows are read, so that a broken one is found even if only some are asked for.
    pairs = [(task.read(row, where), row) for where, row in rows][:count]
    items = [item for item, _ in pairs]
    keys = tuple(question_hash(_put(item, "\n")) for item in items)
    hashes = tuple(row_hashes(_put(item, None), row) for item, row in pairs)
    if not items:
        raise DataError(f"{origin} holds no question of {task.name}; name another file with `tasks={task.name}=FILE`.")
    if shots:
        items = task.with_examples(items, shots)
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(dataclasses.asdict(item), sort_keys=True).encode("utf-8") + b"\n")
    return Questions(tuple(items), origin, digest.hexdigest(), shots, keys, hashes)


def _put(item: Question, between: str | None) -> str:
    """Return what is put to a model: with its choices where `between` is to stand between them."""
    if item.choices is None:
        return item.prompt
    pairs = item.choices.pairs
    return pairs[0][0] if between is None else between.join(text for pair in pairs for text in pair)


def _files(*folders: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(f"{folder}/test.{suffix}" for folder in folders for suffix in ("jsonl", "json")))


def _gsm8k_like(
    name: str, hub: tuple[str, str | None, str] | None, examples: Callable[[], Sequence[gsm8k.Problem]]
) -> Task:
    rules = gsm8k.task_definition()

    def reader(row: Mapping[str, Any], where: str) -> tuple[str, str]:
        problem = gsm8k.problem_of(row, where)
        return rules.prompt(problem), problem.answer

    return Gsm8kTask(
        name=name,
        version=rules.version,
        definition=rules.origin,
        files=_files(name) if hub else (),
        hub=hub,
        reader=reader,
        ends=rules.until,
        extract=rules.extract,
        extract_strict=lambda text: rules.extract(text, strict=True),
        is_right=lambda answer, gold: rules.is_correct(answer, gsm8k.Problem("", gold)),
        form=rules.normal_form,
        max_new_tokens=_SOLUTION_TOKENS,
        rules=rules,
        examples=examples,
    )


def _training_problems() -> list[gsm8k.Problem]:
    path = local_file("gsm8k/train.jsonl", "gsm8k/train.json")
    if path is not None:
        rows: Iterable[tuple[str, Mapping[str, Any]]] = read_rows(path)
    else:
        remedy = "Put gsm8k/train.jsonl into the folder that the environment variable CLOQ_DATA names."
        found = hub_rows("openai/gsm8k", "main", "train", remedy=remedy)
        rows = ((f"row {number} of hub:openai/gsm8k:main:train", row) for number, row in enumerate(found, start=1))
    return [gsm8k.problem_of(row, where) for where, row in rows]


def _training_word_problems(name: str) -> list[gsm8k.Problem]:
    problems = generate(WORD_PROBLEM_COUNTS["train"], most_steps=WORD_PROBLEM_SETS[name])
    return [gsm8k.Problem(each.question, each.answer) for each in problems]


@dataclasses.dataclass(frozen=True)
class _AnswerRules:
    """How LLM-Adapters reads what a model writes: see `WrittenTask`."""

    extract: Callable[[str], str]
    extract_strict: Callable[[str], str]
    is_right: Callable[[str, str], bool] = str.__eq__
    form: Callable[[str], str] = str
    max_new_tokens: int = _SOLUTION_TOKENS


_NUMBERS = _AnswerRules(
    arithmetic.last_number, arithmetic.stated_number, arithmetic.is_number_right, arithmetic.number_form
)
_LETTERS = _AnswerRules(arithmetic.first_letter, arithmetic.stated_letter)


def _instructed(
    name: str,
    folder: str,
    hub: tuple[str, str | None, str],
    read: Callable[[Mapping[str, Any], str], tuple[str, str]],
    rules: _AnswerRules,
) -> Task:
    def reader(row: Mapping[str, Any], where: str) -> tuple[str, str]:
        instruction, gold = read(row, where)
        return instruction_prompt(instruction), gold

    return WrittenTask(
        name=name,
        version="1",
        definition=_ADAPTERS_RULES,
        files=_files(name.partition(":")[0], folder),
        hub=hub,
        reader=reader,
        ends=_INSTRUCTION_ENDS,
        **vars(rules),
    )


def _choices(name: str, chosen: CommonsenseSet) -> Task:
    version, origin = harness_definition(chosen)
    return ChoiceTask(
        name=name, version=version, definition=origin, files=_files(name), hub=chosen.hub, reader=chosen.choices
    )


def _labels(name: str, chosen: CommonsenseSet) -> Task:
    rules = _AnswerRules(
        lambda text: first_label(text, chosen.labels),
        lambda text: stated_label(text, chosen.labels),
        max_new_tokens=_LABEL_TOKENS,
    )
    return _instructed(name, chosen.folder, chosen.hub, chosen.instruction, rules)


def _continuations() -> Task:
    return ContinuationTask(
        name=CONTINUATIONS, version="1", definition=_OWN_RULES, files=(), hub=None, reader=read_continuation
    )


_GSM8K_HUB = ("openai/gsm8k", "main", "test")
_MAKERS |= {
    "gsm8k": partial(_gsm8k_like, "gsm8k", _GSM8K_HUB, _training_problems),
    **{name: partial(_gsm8k_like, name, None, partial(_training_word_problems, name)) for name in WORD_PROBLEM_SETS},
    f"gsm8k:{INSTRUCTION}": partial(
        _instructed, f"gsm8k:{INSTRUCTION}", "gsm8k", _GSM8K_HUB, arithmetic.read_gsm8k, _NUMBERS
    ),
    "svamp": partial(_instructed, "svamp", "SVAMP", ("ChilleD/SVAMP", None, "test"), arithmetic.read_svamp, _NUMBERS),
    "mawps": partial(
        _instructed, "mawps", "mawps", ("MU-NLPC/Calc-mawps", None, "test"), arithmetic.read_mawps, _NUMBERS
    ),
    "aqua": partial(_instructed, "aqua", "AQuA", ("deepmind/aqua_rat", "raw", "test"), arithmetic.read_aqua, _LETTERS),
    CONTINUATIONS: _continuations,
    **{name: partial(_choices, name, chosen) for name, chosen in COMMONSENSE_SETS.items()},
    **{
        f"{name}:{INSTRUCTION}": partial(_labels, f"{name}:{INSTRUCTION}", chosen)
        for name, chosen in COMMONSENSE_SETS.items()
    },
}
