"""What a report says of a task: each model's accuracy, and each pair of models compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import combinations
from typing import Any

from cloq_export.parity.answers import Answers, agreement
from cloq_export.parity.plain import Result, plain
from cloq_export.parity.quality import PairedTest, mcnemar
from cloq_export.parity.questions import QuestionFacts
from cloq_export.parity.task_kinds import Questions, Task, WrittenTask


@dataclasses.dataclass(frozen=True)
class ModelAnswers(Result):
    """What one model answered.

    Args:
        accuracy: by the task's rule.
        other_accuracy: by its other rule.
        answers: as they were read.
        correct: which are right.
    """

    accuracy: float
    other_accuracy: float
    answers: tuple[str, ...]
    correct: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Comparison(Result):
    """Two models compared.

    Args:
        first: name of the one.
        second: name of the other.
        agreement: share of equal answers.
        test: McNemar's.
    """

    levelled = "test"

    first: str
    second: str
    agreement: float
    test: PairedTest


@dataclasses.dataclass(frozen=True)
class TaskEntry(Result):
    """What a report says of a task, answered with one adapter.

    Args:
        questions: how many.
        questions_sha256: of all that is put to a model, and of the right answers.
        shots: worked examples before each.
        max_new_tokens: of a written answer; None where choices are scored.
        version: of the task's definition.
        definition: where its rules were read.
        origin: of the questions.
        adapter: with which adapter.
        other_rule: what the second accuracy is called.
        models: name -> what it answered.
        comparisons: every two of them.
    """

    questions: int
    questions_sha256: str
    shots: int
    max_new_tokens: int | None
    version: str
    definition: str
    origin: str
    adapter: str | None
    other_rule: str
    models: Mapping[str, ModelAnswers]
    comparisons: tuple[Comparison, ...]


@dataclasses.dataclass(frozen=True)
class RecordedAnswers(Result):
    """Answers of the served model next to those that the run recorded to the same questions.

    Args:
        questions: that both answered.
        correct_then: answers that were right then.
        correct: answers that are right now; None where the served model was not asked.
        p_value: McNemar's exact test of whether answers were lost, one-sided; None as above.
    """

    questions: int
    correct_then: int
    correct: int | None
    p_value: float | None


@dataclasses.dataclass(frozen=True)
class VerifiedTask(Result):
    """A task as `verify` judges it.

    Args:
        entry: what was answered.
        facts: of the questions.
        recorded: what the run recorded of the same questions; None if nothing.
    """

    entry: TaskEntry
    facts: QuestionFacts
    recorded: RecordedAnswers | None

    def to_json(self) -> dict[str, Any]:
        """Return the entry as the report holds it, with all of it on one level."""
        return {**self.entry.to_json(), **self.facts.to_json(), "recorded": plain(self.recorded)}


def task_entry(task: Task, questions: Questions, answers: Mapping[str, Answers], adapter: str | None) -> TaskEntry:
    """Return what a report says of a task.

    Args:
        task: the task.
        questions: its questions.
        answers: model -> what it answered.
        adapter: with which adapter.
    """
    return TaskEntry(
        questions=len(questions.items),
        questions_sha256=questions.sha256,
        shots=questions.shots,
        max_new_tokens=task.max_new_tokens if isinstance(task, WrittenTask) else None,
        version=task.version,
        definition=task.definition,
        origin=questions.origin,
        adapter=adapter,
        other_rule=task.other_rule,
        models={
            name: ModelAnswers(found.accuracy, found.other_accuracy, found.extracted, found.correct)
            for name, found in answers.items()
        },
        comparisons=tuple(
            Comparison(
                first,
                second,
                agreement(answers[first], answers[second], task.normal_form),
                mcnemar(answers[first].correct, answers[second].correct),
            )
            for first, second in combinations(answers, 2)
        ),
    )
