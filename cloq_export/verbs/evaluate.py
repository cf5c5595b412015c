"""Measure the float model, the codes alone and the codes with their adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from cloq_export.artifact.artifact import Artifact
from cloq_export.compress.session import Session
from cloq_export.errors import UsageError
from cloq_export.files.atomic import make_folder
from cloq_export.models.block_loading import Streaming
from cloq_export.models.source import open_model
from cloq_export.parity.perplexity import PerplexityTable, TextWindows
from cloq_export.parity.plain import plain
from cloq_export.parity.task_report import TaskEntry
from cloq_export.parity.tasks import PERPLEXITY, expand_names
from cloq_export.recipe import Recipe
from cloq_export.texts.corpora import evaluation_text
from cloq_export.verbs.answering import answer_tasks, group_means, read_questions
from cloq_export.verbs.options import EvaluateOptions, refuse_unmeant
from cloq_export.verbs.recording import record_answers
from cloq_export.verbs.stored_model import StoredModel, choose_adapter, measure_perplexity, subjects_of


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was measured of an artefact.

    Args:
        perplexity: None if it was not asked for.
        tasks: task -> its entry; empty if none was asked for.
        means: group of tasks -> model -> mean accuracy.
        notes: what did not go the ordinary way.
    """

    perplexity: PerplexityTable | None
    tasks: Mapping[str, TaskEntry]
    means: Mapping[str, Mapping[str, float]]
    notes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Return what `cloq eval --json` prints."""
        perplexity = self.perplexity.to_json() if self.perplexity is not None else {}
        answers = {"tasks": plain(self.tasks), "means": self.means} if self.tasks else {}
        return {**perplexity, **answers, **({"notes": list(self.notes)} if self.notes else {})}


def evaluate(path: Path, options: EvaluateOptions | None = None, *, console: Console | None = None) -> Evaluation:
    """Measure the float model, Q alone and Q with its adapter: perplexity on the same windows, answers to tasks.

    Args:
        path: a run directory, an export or a checkpoint folder.
        options: on what, and with which adapter; None takes the defaults.
        console: where progress goes; None is standard error.

    Returns:
        Evaluation: a model that is not there has no figures.

    Raises:
        CloqError: anything a user can mend.
    """
    options = options or EvaluateOptions()
    refuse_unmeant(options)
    if not options.tasks:
        raise UsageError(f"`tasks` names nothing to measure; name {PERPLEXITY} or a task.")
    own = Artifact.open(path).run
    recipe = own.recipe if own is not None else Recipe()
    session = Session(console or Console(stderr=True))
    asked = expand_names([task for task in options.tasks if task != PERPLEXITY])
    questions = read_questions(asked, options.problems, options.shots)
    text = evaluation_text(options.text) if PERPLEXITY in options.tasks else None
    stored = StoredModel(path, options.adapter or choose_adapter(session, path, recipe.adapter_name), options.force)
    stored.check()
    session.notes.extend(stored.notes)
    if questions and options.out is not None:
        make_folder(options.out)
    name = options.reference or recipe.model
    loaded = None
    if name:
        loaded = open_model(name, dtype=torch.float32, stream=cast(Streaming, options.stream), blocks=recipe.blocks)
        session.notes.extend(loaded.reading)
    perplexity: PerplexityTable | None = None
    if text is not None:
        windows = TextWindows(text, options.window, options.windows, options.bos or recipe.bos)
        perplexity = measure_perplexity(session, stored, windows, loaded)
    tasks: dict[str, TaskEntry] = {}
    if questions:
        tokenizer = loaded.tokenizer if loaded is not None else stored.tokenizer()
        subjects = subjects_of(session, stored, loaded)
        tasks = answer_tasks(session, questions, subjects, tokenizer, stored.adapter, options.out)
        if own is not None:
            record_answers(session, own, stored.adapter, questions, tasks)
    if loaded is None:
        session.notes.append("the float model was not measured: name it with `reference`")
    return Evaluation(perplexity, tasks, group_means(tasks), tuple(dict.fromkeys(session.notes)))
