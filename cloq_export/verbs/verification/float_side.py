"""The float model: what it says, and whether everything that is not quantized equals it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.engines.protocol import ServedModel
from cloq_export.engines.transformers.served import float_model
from cloq_export.errors import UsageError
from cloq_export.models.block_loading import Streaming
from cloq_export.models.source import LoadedModel, open_model
from cloq_export.parity.answers import Answers, Respondent
from cloq_export.parity.divergence import next_logprobs
from cloq_export.parity.float_part import (
    compare_config,
    compare_generation,
    compare_tensors,
    compare_tokenizer,
    compare_vocabulary,
)
from cloq_export.parity.folder_files import compare_files
from cloq_export.parity.genai_settings import compare_genai_settings
from cloq_export.parity.numerics import LogprobDifferences, compare_logprobs, measure_logprobs
from cloq_export.parity.provenance import Finding
from cloq_export.parity.report import FloatModel, NumericsRow
from cloq_export.verbs.verification.engines import DTYPES
from cloq_export.verbs.verification.plan import Plan
from cloq_export.verbs.verification.probe_texts import ProbeTexts
from cloq_export.verbs.verification.progress import Progress

# Task -> answers.
Answered = Mapping[str, Answers]


@dataclasses.dataclass(frozen=True)
class FloatSide:
    """What is known of the float model when it is let go of.

    Args:
        source: which model it is.
        tokenizer: of it.
        texts: what is put to all models.
        logprobs: of each window.
        distributions: log-probabilities of the whole vocabulary, on the windows whose distributions are compared.
        noise_floor: differences to a second measurement of the first window.
        numerics: how it differs from itself in the served precision.
        answers: to the questions of each task.
        findings: on the model that the run was made from.
        float_part: on what is not quantized.
        base: what the reference is read from; for an ONNX export a checkpoint with its integers stands in.
        folders: name -> folder of each adapter over that base.
    """

    source: FloatModel
    tokenizer: Any
    texts: ProbeTexts
    logprobs: Sequence[torch.Tensor]
    distributions: Sequence[torch.Tensor]
    noise_floor: LogprobDifferences
    numerics: tuple[NumericsRow, ...]
    answers: Answered
    findings: tuple[Finding, ...]
    float_part: tuple[Finding, ...]
    base: Path
    folders: Mapping[str, Path]


def measure_float(plan: Plan, text: str, place: Path, progress: Progress) -> FloatSide:
    """Open the float model, compare what is not quantized with it, and measure it twice.

    Args:
        plan: what was asked.
        text: that is measured on.
        place: an existing folder to write into.
        progress: of the call.

    Raises:
        UsageError: the model is not the one that the export was made from, or reads no window of this length.
        GateMissedError: the text is shorter than one window.
    """
    options = plan.options
    # Another device or precision takes the whole model at once.
    stream: Streaming = "auto" if (options.dtype, options.device) == ("float32", "cpu") else "never"
    assert options.reference is not None  # `VerifyOptions.check` asked for it
    loaded = open_model(options.reference, dtype=torch.float32, stream=stream)
    for line in loaded.reading:
        progress.session.say(line)
    _refuse_other_model(loaded, plan)
    with progress.phase("float part"):
        findings = plan.made.findings_of_reference(loaded, other=options.other_reference)
        float_part = _compare_float_part(plan, loaded)
    base, folders = _reference_files(plan, loaded, place)
    texts = ProbeTexts.cut(plan, loaded, text)
    model = float_model(loaded.model.to(options.device))
    alone: list[str | None] = [None] * len(texts.windows)
    progress.session.say(f"measure the float model on {len(alone)} windows of {options.window} tokens, one twice")
    distributions = [whole_distribution(model, ids) for ids in texts.compared]
    logprobs = [next_logprobs(each, ids) for each, ids in zip(distributions, texts.compared, strict=True)]
    rest = len(logprobs)
    logprobs += measure_logprobs(model, texts.windows[rest:], alone[rest:]) if alone[rest:] else []
    # One window shows whether it answers twice alike.
    again = next_logprobs(whole_distribution(model, texts.compared[0]), texts.compared[0])
    noise_floor = compare_logprobs([again], logprobs[:1])
    answers = ask_tasks(plan, "float", Respondent(model, loaded.tokenizer), progress)
    return FloatSide(
        source=FloatModel(options.reference, loaded.source.fingerprint),
        tokenizer=loaded.tokenizer,
        texts=texts,
        logprobs=logprobs,
        distributions=distributions,
        noise_floor=noise_floor,
        numerics=_rounded_numerics(plan, loaded, texts, model, logprobs),
        answers=answers,
        findings=tuple(findings),
        float_part=tuple(float_part),
        base=base,
        folders=folders,
    )


def whole_distribution(model: ServedModel, token_ids: Sequence[int], adapter: str | None = None) -> torch.Tensor:
    """Return the log-probabilities of the whole vocabulary in each place of a text, (n - 1, vocabulary)."""
    return model.token_distributions([token_ids], [adapter])[0].logprobs


def ask_tasks(plan: Plan, name: str, asked: Respondent, progress: Progress) -> Answered:
    """Put the questions of every task to a model.

    Args:
        plan: what was asked.
        name: of the model, for people.
        asked: the runtime, with its adapter.
        progress: of the call.
    """
    answers = {}
    of = f" with {asked.adapter}" if asked.adapter else ""
    for task_name, (task, questions) in plan.tasks.items():
        with progress.phase(task_name), progress.session.progress(f"{task_name}, {name}{of}") as advance:
            answers[task_name] = task.ask(asked, questions, advance=advance)
    return answers


def _rounded_numerics(
    plan: Plan, loaded: LoadedModel, texts: ProbeTexts, model: ServedModel, logprobs: Sequence[torch.Tensor]
) -> tuple[NumericsRow, ...]:
    """Return how the float model differs from itself in the served precision, on the windows and at length."""
    if plan.options.dtype == "float32":
        return ()
    longest = measure_logprobs(model, [texts.longest], [None])
    # In place: a second copy would double the memory that the float model takes.
    rounded = float_model(loaded.model.to(DTYPES[plan.options.dtype]))
    measured = measure_logprobs(rounded, texts.windows, [None] * len(texts.windows))
    measured_longest = measure_logprobs(rounded, [texts.longest], [None])
    name = "float in served precision"
    return (
        NumericsRow(name, "float", None, compare_logprobs(measured, logprobs)),
        NumericsRow(f"{name}, at length", "float", None, compare_logprobs(measured_longest, longest)),
    )


def _reference_files(plan: Plan, loaded: LoadedModel, place: Path) -> tuple[Path, Mapping[str, Path]]:
    if isinstance(plan.checkpoint, Checkpoint):
        return plan.export, plan.folders
    from cloq_export.verbs.verification.onnx_stand_in import write_stand_in

    return write_stand_in(place, plan.checkpoint, loaded, plan.adapters)


def _compare_float_part(plan: Plan, loaded: LoadedModel) -> list[Finding]:
    """Compare what is not quantized with the float model.

    Of an ONNX graph, tensors that every token goes through are judged by what it computes.
    """
    checkpoint, folder = plan.checkpoint, plan.checkpoint.folder
    findings = [compare_config(checkpoint.config, loaded.model, str(folder / "config.json"))]
    if isinstance(checkpoint, Checkpoint):
        # A run writes them without loss; other tools may have rounded them, and another reference may be rounded.
        exact = plan.made.base is not None and not plan.options.other_reference
        findings += [compare_tensors(checkpoint, loaded, exact=exact), compare_files(checkpoint, loaded)]
    else:
        findings += [compare_vocabulary(checkpoint, loaded), compare_genai_settings(folder, loaded)]
    return [*findings, *compare_tokenizer(folder, loaded), compare_generation(folder, loaded.model)]


def _refuse_other_model(loaded: LoadedModel, plan: Plan) -> None:
    """Refuse a float model whose sizes are not those of the export."""
    folder = plan.checkpoint.folder
    config = loaded.config.get_text_config()
    for field in ("vocab_size", "hidden_size", "num_hidden_layers"):
        mine, theirs = plan.checkpoint.config.get(field), getattr(config, field, None)
        if mine is not None and theirs is not None and mine != theirs:
            raise UsageError(
                f"{loaded.source.name} has {field} {theirs} and {folder} has {mine}, so the one was not "
                "made from the other; give the float model of this export with `reference`."
            )
