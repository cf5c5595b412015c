"""Tasks put to several models in turn, with what was answered kept on disk as it comes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cloq_export.compress.session import Session
from cloq_export.engines.protocol import ServedModel
from cloq_export.files.atomic import make_folder, write_json
from cloq_export.parity.answers import Answers, AnswerStore, Respondent
from cloq_export.parity.plain import plain
from cloq_export.parity.task_kinds import Questions, Task, WrittenTask
from cloq_export.parity.task_report import TaskEntry, task_entry
from cloq_export.parity.tasks import GROUPS, find_task, load_questions
from cloq_export.texts.tokens import TextTokens

TASKS_FILE = "tasks.json"


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model that answers.

    Args:
        name: in reports.
        model: the runtime.
        adapter: with which it is asked, by the runtime's name; None asks it as it is.
        fingerprint: of all that its answers depend on.
    """

    name: str
    model: ServedModel
    adapter: str | None
    fingerprint: str


def read_questions(asked: Mapping[str, str | None], count: int | None, shots: int) -> dict[str, tuple[Task, Questions]]:
    """Return the tasks that are asked for with their questions: name -> (task, questions).

    Args:
        asked: task -> its file or None.
        count: questions of each task, from the start; None takes all.
        shots: worked examples before each.

    Raises:
        CloqError: questions cannot be found or read.
    """
    tasks = {name: find_task(name) for name in asked}
    return {
        name: (tasks[name], load_questions(tasks[name], file, count=count, shots=shots)) for name, file in asked.items()
    }


def answer_tasks(
    session: Session,
    tasks: Mapping[str, tuple[Task, Questions]],
    subjects: Iterable[Subject],
    tokenizer: Any,
    adapter: str | None,
    out: Path | None,
) -> dict[str, TaskEntry]:
    """Put every task to every model.

    Args:
        session: where progress goes.
        tasks: name -> (task, questions).
        subjects: taken one at a time, and no reference to one is kept: a generator may switch an adapter in between.
        tokenizer: of the models.
        adapter: the adapter that one of them has, for the report.
        out: folder for answers and tasks.json; None keeps nothing.

    Returns:
        dict: task -> its entry in a report.

    Raises:
        RunDirectoryError: the folder holds answers of another model or to other questions, or cannot be written.
    """
    answers: dict[str, dict[str, Answers]] = {name: {} for name in tasks}
    begin = TextTokens(tokenizer).begin
    if out is not None:
        make_folder(out)
    for subject in subjects:
        for name, (task, questions) in tasks.items():
            store = (
                None
                if out is None
                else AnswerStore(_answer_file(out, name, subject), _key(task, questions, subject, begin))
            )
            with session.progress(f"{name}, {subject.name}") as advance:
                answers[name][subject.name] = task.ask(
                    Respondent(subject.model, tokenizer, subject.adapter), questions, store=store, advance=advance
                )
    entries = {name: task_entry(task, questions, answers[name], adapter) for name, (task, questions) in tasks.items()}
    if out is not None:
        write_json(out / TASKS_FILE, plain(entries), sort_keys=False)
    return entries


def group_means(entries: Mapping[str, TaskEntry]) -> dict[str, dict[str, float]]:
    """Return group -> model -> mean accuracy of its tasks, for each group all of whose tasks were measured.

    Args:
        entries: task -> entry.
    """
    means = {}
    for group, names in GROUPS.items():
        if all(name in entries for name in names):
            means[group] = {
                model: sum(entries[name].models[model].accuracy for name in names) / len(names)
                for model in entries[names[0]].models
            }
    return means


def _answer_file(out: Path, task: str, subject: Subject) -> Path:
    return out / f"answers-{re.sub(r'[^a-z0-9-]', '-', task)}-{subject.name}.json"


def _key(task: Task, questions: Questions, subject: Subject, begin: tuple[int, ...]) -> dict[str, Any]:
    key = {
        "task": task.name,
        "model": subject.fingerprint,
        "questions": questions.sha256,
        "tokens": task.max_new_tokens if isinstance(task, WrittenTask) else None,
    }
    return key | ({"begin": list(begin)} if begin else {})
