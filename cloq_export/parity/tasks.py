"""Tasks by name: where their questions come from, how they are put to a model, and how its answers are read."""

from __future__ import annotations

import abc
import dataclasses
import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any

from cloq_export.engines.protocol import ServedModel
from cloq_export.errors import DataError, UsageError
from cloq_export.files.spelled_paths import expand_user
from cloq_export.parity import arithmetic, gsm8k
from cloq_export.parity.answers import (
    Advance,
    Answers,
    AnswerStore,
    agreement,
    continue_prompts,
    score_continuations,
)
from cloq_export.parity.commonsense import (
    COMMONSENSE_SETS,
    Choices,
    CommonsenseSet,
    first_label,
    harness_definition,
    stated_label,
)
from cloq_export.parity.continuations import CHOICES, PARAGRAPH_WORDS, continuation_rows, read_continuation
from cloq_export.parity.quality import mcnemar
from cloq_export.parity.questions import question_hash, row_hashes
from cloq_export.texts.corpora import WIKITEXT2, evaluation_text
from cloq_export.texts.data_sets import hub_rows, local_file
from cloq_export.texts.examples import instruction_prompt
from cloq_export.texts.named_sets import WORD_PROBLEM_COUNTS, WORD_PROBLEM_SETS, WORD_PROBLEMS
from cloq_export.texts.reading import read_rows
from cloq_export.texts.word_problems import generate

# Asked for in one breath with the tasks, though no question is asked for it.
PERPLEXITY = "ppl"
# Behind a task's name: put as LLM-Adapters puts it, and read by its rules.
INSTRUCTION = "instruction"
# Tokens that an answer may take: a worked solution, and a label as LLM-Adapters limits it.
_SOLUTION_TOKENS = 256
_LABEL_TOKENS = 32
# What ends the answer to an instruction, beside the tokenizer's own end.
_INSTRUCTION_ENDS = ("\n### ", "</s>", "<|im_end|>")
CONTINUATIONS = "continuations"
_OWN_RULES = "four endings of neighbouring paragraphs; the choice of the largest log-likelihood"
_ADAPTERS_RULES = "LLM-Adapters (arXiv:2304.01933), greedy"


@dataclasses.dataclass(frozen=True)
class Question:
    """One question as it is put to a model.

    Args:
        prompt: what a model continues; empty where choices are scored.
        choices: what is scored, None where a model writes its answer.
        gold: the right answer, in the form that the task's rules compare.
    """

    prompt: str
    choices: Choices | None
    gold: str


@dataclasses.dataclass(frozen=True)
class Questions:
    """The questions of a task.

    Args:
        items: at least one.
        origin: where they are from.
        sha256: of all that is put to a model and of the right answers, hexadecimal.
        shots: worked examples before each.
        keys: hash of each question and its choices, worked examples left out.
        hashes: of each question the hashes that it may have among examples of a training.
    """

    items: tuple[Question, ...]
    origin: str
    sha256: str
    shots: int
    keys: tuple[str, ...] = ()
    hashes: tuple[frozenset[str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """One task.

    Args:
        name: by which it is asked for.
        version: of its definition.
        definition: where its rules were read.
        files: what its questions may be called in the data folder, the preferred name first.
        hub: identifier, config and split on the hub; None where they are generated.
    """

    name: str
    version: str
    definition: str
    files: tuple[str, ...]
    hub: tuple[str, str | None, str] | None

    @property
    @abc.abstractmethod
    def other_rule(self) -> str:
        """Return what the second accuracy is called: "strict" or "normalised"."""

    @property
    def takes_examples(self) -> bool:
        """Return whether worked examples can stand before a question."""
        return False

    def rows(self, file: str | None) -> tuple[Iterator[tuple[str, Mapping[str, Any]]], str]:
        """Return ((place, row) of each question, origin).

        Args:
            file: a file of JSON rows; None takes the data folder's, else the hub's.

        Raises:
            DataError: they cannot be found or read.
            MissingPackageError: they are on the hub, and `datasets` is not installed.
        """
        path = expand_user(file) if file is not None else local_file(*self.files)
        if path is not None:
            return read_rows(path), str(path)
        if self.hub is None:
            return _generated_rows(self.name), f"generated ({self.name}, test)"
        rows = hub_rows(
            *self.hub,
            remedy=f"Name a file with --tasks {self.name}=FILE, or put {self.files[0]} into the folder that the "
            "environment variable CLOQ_DATA names.",
        )
        origin = ":".join(part for part in ("hub", *self.hub) if part)
        return ((f"row {number} of {origin}", row) for number, row in enumerate(rows, start=1)), origin

    @abc.abstractmethod
    def read(self, row: Mapping[str, Any], where: str) -> Question:
        """Return the question that a row holds.

        Raises:
            DataError: it lacks a field, or no answer can be read out of it.
        """

    @abc.abstractmethod
    def ask(
        self,
        model: ServedModel,
        tokenizer: Any,
        questions: Questions,
        adapter: str | None,
        *,
        store: AnswerStore | None = None,
        advance: Advance | None = None,
    ) -> Answers:
        """Put the questions to a model and judge its answers; store and advance as in `continue_prompts`."""

    @abc.abstractmethod
    def normal_form(self, answer: str) -> str:
        """Return an extracted answer in the form in which two models' answers are compared."""

    def with_examples(self, questions: Sequence[Question], shots: int) -> list[Question]:
        """Return the questions with worked examples before each.

        Raises:
            UsageError: this task has none.
        """
        raise UsageError(
            f"{self.name} takes no worked examples; leave --shots out, or ask for gsm8k or {WORD_PROBLEMS} alone."
        )


@dataclasses.dataclass(frozen=True)
class WrittenTask(Task):
    """A task whose answers a model writes.

    Args:
        reader: from a row and its place to (prompt, right answer).
        ends: texts that end an answer.
        extract: from a text to the answer that it gives.
        extract_strict: the same by the stricter rule.
        is_right: whether an extracted answer is the right one.
        form: of an extracted answer in comparisons.
        max_new_tokens: where an answer is cut that has not ended by itself.
    """

    reader: Callable[[Mapping[str, Any], str], tuple[str, str]]
    ends: tuple[str, ...]
    extract: Callable[[str], str]
    extract_strict: Callable[[str], str]
    is_right: Callable[[str, str], bool]
    form: Callable[[str], str]
    max_new_tokens: int

    @property
    def other_rule(self) -> str:
        """Return "strict"."""
        return "strict"

    def read(self, row: Mapping[str, Any], where: str) -> Question:
        """Return the question that a row holds; see `Task`."""
        prompt, gold = self.reader(row, where)
        return Question(prompt, None, gold)

    def ask(
        self,
        model: ServedModel,
        tokenizer: Any,
        questions: Questions,
        adapter: str | None,
        *,
        store: AnswerStore | None = None,
        advance: Advance | None = None,
    ) -> Answers:
        """Let a model write, greedily, and judge what it wrote."""
        prompts = [question.prompt for question in questions.items]
        texts = continue_prompts(
            model,
            tokenizer,
            prompts,
            adapter,
            cut=self.cut,
            max_new_tokens=self.max_new_tokens,
            store=store,
            advance=advance,
        )
        return self.judge(questions, texts)

    def judge(self, questions: Questions, texts: Iterable[str]) -> Answers:
        """Return the verdict on what a model wrote.

        Args:
            questions: the questions.
            texts: what stands behind each prompt.
        """
        cut = tuple(map(self.cut, texts))
        extracted, strict = tuple(map(self.extract, cut)), tuple(map(self.extract_strict, cut))
        golds = [question.gold for question in questions.items]
        return Answers(
            cut,
            extracted,
            tuple(self.is_right(answer, gold) for answer, gold in zip(extracted, golds, strict=True)),
            tuple(self.is_right(answer, gold) for answer, gold in zip(strict, golds, strict=True)),
        )

    def cut(self, text: str) -> str:
        """Return what stands before the first text that ends an answer."""
        for end in self.ends:
            text = text.split(end, 1)[0]
        return text

    def normal_form(self, answer: str) -> str:
        """Return an extracted answer in the form in which two models' answers are compared."""
        return self.form(answer)


@dataclasses.dataclass(frozen=True)
class Gsm8kTask(WrittenTask):
    """GSM8K, or problems of its form, by the harness's rules.

    Args:
        examples: gives the training problems that worked examples are drawn from.
    """

    rules: gsm8k.Definition
    examples: Callable[[], Sequence[gsm8k.Problem]]

    @property
    def takes_examples(self) -> bool:
        """Return True."""
        return True

    def with_examples(self, questions: Sequence[Question], shots: int) -> list[Question]:
        """Return the questions with worked examples of the training problems before each, seeded by its number."""
        pool = self.examples()
        found = []
        for number, question in enumerate(questions):
            worked = self.rules.worked(gsm8k.choose_examples(pool, shots, number))
            found.append(dataclasses.replace(question, prompt=worked + question.prompt))
        return found


@dataclasses.dataclass(frozen=True)
class ChoiceTask(Task):
    """A task whose choices are scored by their log-likelihood.

    Args:
        reader: from a row and its place to the question's choices.
    """

    reader: Callable[[Mapping[str, Any], str], Choices]

    @property
    def other_rule(self) -> str:
        """Return "normalised": the log-likelihood is divided by the letters of the choice."""
        return "normalised"

    def read(self, row: Mapping[str, Any], where: str) -> Question:
        """Return the question that a row holds; see `Task`."""
        choices = self.reader(row, where)
        return Question("", choices, str(choices.gold))

    def ask(
        self,
        model: ServedModel,
        tokenizer: Any,
        questions: Questions,
        adapter: str | None,
        *,
        store: AnswerStore | None = None,
        advance: Advance | None = None,
    ) -> Answers:
        """Score every choice, and take the most probable one."""
        choices = [question.choices for question in questions.items if question.choices is not None]
        scores = score_continuations(
            model, tokenizer, [each.pairs for each in choices], adapter, store=store, advance=advance
        )
        taken, normalised = [], []
        for each, values in zip(choices, scores, strict=True):
            taken.append(_largest(values))
            normalised.append(_largest([value / max(1, n) for value, n in zip(values, each.lengths, strict=True)]))
        golds = [each.gold for each in choices]
        named = tuple(map(str, taken))
        return Answers(
            named,
            named,
            tuple(number == gold for number, gold in zip(taken, golds, strict=True)),
            tuple(number == gold for number, gold in zip(normalised, golds, strict=True)),
        )

    def normal_form(self, answer: str) -> str:
        """Return the number of the choice as it is."""
        return answer


@dataclasses.dataclass(frozen=True)
class ContinuationTask(ChoiceTask):
    """A task whose questions are made from a text."""

    def rows(self, file: str | None) -> tuple[Iterator[tuple[str, Mapping[str, Any]]], str]:
        """Return ((place, row) of each question, origin).

        Args:
            file: a text, as `--eval-text` names it, each paragraph on one line; None takes WikiText-2's test split.

        Raises:
            CalibrationError: it cannot be found or read.
            DataError: it has too few paragraphs that are long enough.
            MissingPackageError: it is on the hub, and `datasets` is not installed.
        """
        found = evaluation_text(file or WIKITEXT2)
        rows = list(continuation_rows(found.text, found.origin))
        if not rows:
            raise DataError(
                f"{found.origin} has no {CHOICES} paragraphs of {PARAGRAPH_WORDS} words or more, each on one line; "
                f"name another text with --tasks {self.name}=FILE."
            )
        return iter(rows), found.origin


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
    found: dict[str, str | None] = {}
    for text in asked:
        name, separator, file = text.partition("=")
        if name in GROUPS and separator:
            raise UsageError(f"--tasks {text}: {name} is a group; name a file for each of {', '.join(GROUPS[name])}.")
        if name not in GROUPS and name not in _MAKERS:
            known = (*_MAKERS, *GROUPS)
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"--tasks is {name!r}; allowed are {PERPLEXITY}, {', '.join(known)}.{hint}")
        for task in GROUPS.get(name, (name,)):
            found[task] = (file or None) if separator else found.get(task)
    return found


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
    # All are read, so that a broken row is found whatever part is asked for.
    pairs = [(task.read(row, where), row) for where, row in rows][:count]
    items = [item for item, _ in pairs]
    keys = tuple(question_hash(_put(item, "\n")) for item in items)
    hashes = tuple(row_hashes(_put(item, None), row) for item, row in pairs)
    if not items:
        raise DataError(f"{origin} holds no question of {task.name}; name another file with --tasks {task.name}=FILE.")
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


def task_entry(task: Task, questions: Questions, answers: Mapping[str, Answers], adapter: str | None) -> dict[str, Any]:
    """Return what a report says of a task: each model's accuracy, and every two models beside each other.

    Args:
        task: the task.
        questions: its questions.
        answers: model -> what it answered.
        adapter: with which adapter.
    """
    return {
        "questions": len(questions.items),
        "questions_sha256": questions.sha256,
        "shots": questions.shots,
        "max_new_tokens": task.max_new_tokens if isinstance(task, WrittenTask) else None,
        "version": task.version,
        "definition": task.definition,
        "origin": questions.origin,
        "adapter": adapter,
        "other_rule": task.other_rule,
        "models": {
            name: {
                "accuracy": found.accuracy,
                "other_accuracy": found.other_accuracy,
                "answers": list(found.extracted),
                "correct": list(found.correct),
            }
            for name, found in answers.items()
        },
        "comparisons": [
            {
                "first": first,
                "second": second,
                "agreement": agreement(answers[first], answers[second], task.normal_form),
                **mcnemar(answers[first].correct, answers[second].correct),
            }
            for first, second in combinations(answers, 2)
        ],
    }


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda number: values[number])


def _generated_rows(name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    problems = generate(WORD_PROBLEM_COUNTS["test"], split="test", most_steps=WORD_PROBLEM_SETS[name])
    for number, problem in enumerate(problems, start=1):
        yield f"word problem {number}", {"question": problem.question, "answer": problem.answer}


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


def _instructed(
    name: str,
    folder: str,
    hub: tuple[str, str | None, str],
    read: Callable[[Mapping[str, Any], str], tuple[str, str]],
    *,
    extract: Callable[[str], str],
    extract_strict: Callable[[str], str],
    is_right: Callable[[str, str], bool] = str.__eq__,
    form: Callable[[str], str] = str,
    max_new_tokens: int = _SOLUTION_TOKENS,
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
        extract=extract,
        extract_strict=extract_strict,
        is_right=is_right,
        form=form,
        max_new_tokens=max_new_tokens,
    )


def _numbers(
    name: str,
    folder: str,
    hub: tuple[str, str | None, str],
    read: Callable[[Mapping[str, Any], str], tuple[str, str]],
) -> Task:
    return _instructed(
        name,
        folder,
        hub,
        read,
        extract=arithmetic.last_number,
        extract_strict=arithmetic.stated_number,
        is_right=arithmetic.is_number_right,
        form=arithmetic.number_form,
    )


def _letters() -> Task:
    return _instructed(
        "aqua",
        "AQuA",
        ("deepmind/aqua_rat", "raw", "test"),
        arithmetic.read_aqua,
        extract=arithmetic.first_letter,
        extract_strict=arithmetic.stated_letter,
    )


def _choices(name: str, chosen: CommonsenseSet) -> Task:
    version, origin = harness_definition(chosen)
    return ChoiceTask(
        name=name, version=version, definition=origin, files=_files(name), hub=chosen.hub, reader=chosen.choices
    )


def _labels(name: str, chosen: CommonsenseSet) -> Task:
    return _instructed(
        name,
        chosen.folder,
        chosen.hub,
        chosen.instruction,
        extract=lambda text: first_label(text, chosen.labels),
        extract_strict=lambda text: stated_label(text, chosen.labels),
        max_new_tokens=_LABEL_TOKENS,
    )


def _continuations() -> Task:
    return ContinuationTask(
        name=CONTINUATIONS, version="1", definition=_OWN_RULES, files=(), hub=None, reader=read_continuation
    )


_GSM8K_HUB = ("openai/gsm8k", "main", "test")
_MAKERS |= {
    "gsm8k": partial(_gsm8k_like, "gsm8k", _GSM8K_HUB, _training_problems),
    **{name: partial(_gsm8k_like, name, None, partial(_training_word_problems, name)) for name in WORD_PROBLEM_SETS},
    f"gsm8k:{INSTRUCTION}": partial(_numbers, f"gsm8k:{INSTRUCTION}", "gsm8k", _GSM8K_HUB, arithmetic.read_gsm8k),
    "svamp": partial(_numbers, "svamp", "SVAMP", ("ChilleD/SVAMP", None, "test"), arithmetic.read_svamp),
    "mawps": partial(_numbers, "mawps", "mawps", ("MU-NLPC/Calc-mawps", None, "test"), arithmetic.read_mawps),
    "aqua": _letters,
    CONTINUATIONS: _continuations,
    **{name: partial(_choices, name, chosen) for name, chosen in COMMONSENSE_SETS.items()},
    **{
        f"{name}:{INSTRUCTION}": partial(_labels, f"{name}:{INSTRUCTION}", chosen)
        for name, chosen in COMMONSENSE_SETS.items()
    },
}
