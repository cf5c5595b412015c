"""What a task is: how its questions are read and put to a model, and how its answers are judged."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from cloq_export.errors import DataError, UsageError
from cloq_export.files.spelled_paths import expand_user
from cloq_export.parity import gsm8k
from cloq_export.parity.answers import (
    Advance,
    Answers,
    AnswerStore,
    Respondent,
    continue_prompts,
    score_continuations,
)
from cloq_export.parity.commonsense_rows import Choices
from cloq_export.parity.continuations import CHOICES, PARAGRAPH_WORDS, continuation_rows
from cloq_export.texts.corpora import WIKITEXT2, evaluation_text
from cloq_export.texts.data_sets import hub_rows, local_file
from cloq_export.texts.named_sets import WORD_PROBLEM_COUNTS, WORD_PROBLEM_SETS, WORD_PROBLEMS
from cloq_export.texts.reading import read_rows
from cloq_export.texts.word_problems import generate


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

    @property
    def deciding(self) -> int:
        """Return how many of them can be answered in two ways: not those whose choices are all the same."""
        return sum(each.choices is None or len(set(each.choices.pairs)) > 1 for each in self.items)


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
            remedy=f"Name a file with `tasks={self.name}=FILE`, or put {self.files[0]} into the folder that the "
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
        asked: Respondent,
        questions: Questions,
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
            f"{self.name} takes no worked examples; leave `shots` out, or ask for gsm8k or {WORD_PROBLEMS} alone."
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
        asked: Respondent,
        questions: Questions,
        *,
        store: AnswerStore | None = None,
        advance: Advance | None = None,
    ) -> Answers:
        """Let a model write, greedily, and judge what it wrote."""
        prompts = [question.prompt for question in questions.items]
        texts = continue_prompts(
            asked,
            prompts,
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
        prompts = []
        for number, question in enumerate(questions):
            worked = self.rules.worked(gsm8k.choose_examples(pool, shots, number))
            prompts.append(dataclasses.replace(question, prompt=worked + question.prompt))
        return prompts


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
        asked: Respondent,
        questions: Questions,
        *,
        store: AnswerStore | None = None,
        advance: Advance | None = None,
    ) -> Answers:
        """Score every choice, and take the most probable one."""
        choices = [question.choices for question in questions.items if question.choices is not None]
        scores = score_continuations(asked, [each.pairs for each in choices], store=store, advance=advance)
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
        corpus = evaluation_text(file or WIKITEXT2)
        rows = list(continuation_rows(corpus.text, corpus.origin))
        if not rows:
            raise DataError(
                f"{corpus.origin} has no {CHOICES} paragraphs of {PARAGRAPH_WORDS} words or more, each on one line; "
                f"name another text with `tasks={self.name}=FILE`."
            )
        return iter(rows), corpus.origin


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda number: values[number])


def _generated_rows(name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    problems = generate(WORD_PROBLEM_COUNTS["test"], split="test", most_steps=WORD_PROBLEM_SETS[name])
    for number, problem in enumerate(problems, start=1):
        yield f"word problem {number}", {"question": problem.question, "answer": problem.answer}
