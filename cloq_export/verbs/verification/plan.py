"""What was asked of `verify`, checked against the files as far as that is cheap."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cloq_export.artifact.adapters import AdapterShelf, read_bound_adapter
from cloq_export.artifact.artifact import Artifact
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.needed_adapter import refuse_alone
from cloq_export.errors import UsageError
from cloq_export.formats.onnx.blocks import INT8
from cloq_export.formats.onnx.packages import require_packages
from cloq_export.formats.peft import Adapter
from cloq_export.models.devices import chosen_device
from cloq_export.parity.gate import (
    SIGNIFICANCE,
    default_limits,
    merged_limits,
    read_gate_file,
)
from cloq_export.parity.power import CHANCE, CHANCE_HALF, chance_limit, questions_needed
from cloq_export.parity.questions import DEFAULT_QUESTIONS
from cloq_export.parity.task_kinds import Questions, Task
from cloq_export.parity.tasks import PERPLEXITY, expand_names, gate_key
from cloq_export.verbs.answering import read_questions
from cloq_export.verbs.verification.made_before import MadeBefore
from cloq_export.verbs.verification.options import VerifyOptions

if TYPE_CHECKING:
    from cloq_export.formats.onnx.reading import OnnxExport

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was asked, with what lies there.

    Args:
        export: an export, a checkpoint folder, or a run directory.
        options: of the call.
        checkpoint: the export, opened.
        folders: name -> folder of each adapter that is served.
        adapters: name -> adapter.
        made: what is known from when they were made.
        tasks: name -> (task, questions).
        limits: name of a gate -> limit.
    """

    export: Path
    options: VerifyOptions
    checkpoint: Checkpoint | OnnxExport
    folders: Mapping[str, Path]
    adapters: Mapping[str, Adapter]
    made: MadeBefore
    tasks: Mapping[str, tuple[Task, Questions]]
    limits: Mapping[str, float]

    @classmethod
    def make(cls, export: Path, options: VerifyOptions) -> Plan:
        """Return the plan; questions are read too, because a record may be of them.

        Raises:
            CloqError: options, gate file, export, adapters or questions are wrong.
        """
        chosen = {} if options.gate is None else read_gate_file(options.gate)
        options.check()
        asked = _asked_tasks(options)
        chosen_device(options.device)  # before any work, so that a device that is not there is refused at once
        artifact = Artifact.open(export)
        if artifact.kind == "merged export":
            raise UsageError(
                f"{export} is a merged export, which has no codes and no adapter to verify; give the quantized export."
            )
        checkpoint, folders, adapters = (_read_onnx if artifact.kind == "onnx export" else _read_checkpoint)(
            artifact, options
        )
        if not adapters:
            refuse_alone(
                checkpoint, "verify the run or an export that holds it, or name it with `adapters=NAME=FOLDER`"
            )
        tasks = read_questions(asked, typed_questions(options) or DEFAULT_QUESTIONS, options.shots)
        made = MadeBefore.read(export, checkpoint, folders, adapters, run=options.run, serves_all=not options.adapters)
        defaults = default_limits(
            options.dtype,
            min(spec.bits for spec in checkpoint.specs.values()),
            tuple(tasks),
            adapters=len(adapters),
            packed=options.measures_packed,
            rounded=_rounds_activations(checkpoint),
        )
        if not _rounds_activations(checkpoint):
            defaults |= {
                f"{gate_key(name)}_drop_upper": options.detect or chance_limit(len(questions.items), chance_of(options))
                for name, (_, questions) in tasks.items()
            }
        defaults |= made.limits(options, defaults)
        recorded = [name for name, (task, questions) in tasks.items() if made.recorded_answers(task, questions)]
        defaults |= {f"{gate_key(name)}_recorded_p_value": SIGNIFICANCE for name in recorded}
        return cls(export, options, checkpoint, folders, adapters, made, tasks, merged_limits(defaults, chosen))

    @property
    def rounds_activations(self) -> bool:
        """Return whether a kernel of the export rounds activations to int8, as compact 2-bit graphs ask for."""
        return _rounds_activations(self.checkpoint)

    @property
    def bits(self) -> int:
        """Return the smallest width among the layers."""
        return min(spec.bits for spec in self.checkpoint.specs.values())

    @property
    def subjects(self) -> list[str | None]:
        """Return what is measured on text: every adapter, or the base if there is none."""
        return list(self.adapters) or [None]

    @property
    def scored(self) -> list[str | None]:
        """Return what is scored on text: every adapter, and the base without one, which engines compute otherwise.

        Codes that need their adapter are not scored alone: their log-probabilities are noise, in which the rounding of
        any engine shows enlarged, and they are never served.
        """
        return [*self.adapters] if self.checkpoint.needs_adapter else [*self.adapters, None]


def chance_of(options: VerifyOptions) -> float:
    """Return the share of questions that a model which loses nothing answers otherwise in the served precision."""
    return CHANCE.get(options.dtype, CHANCE_HALF)


def typed_questions(options: VerifyOptions) -> int | None:
    """Return how many questions of each task must be there: as many as were typed, or as a loss needs; else None."""
    if options.detect is None:
        return options.problems
    return questions_needed(options.detect, chance_of(options))


def _rounds_activations(checkpoint: Checkpoint | OnnxExport) -> bool:
    return not isinstance(checkpoint, Checkpoint) and any(
        module.blocks.accuracy_level == INT8 for module in checkpoint.record.modules.values()
    )


def _read_checkpoint(
    artifact: Artifact, options: VerifyOptions
) -> tuple[Checkpoint | OnnxExport, dict[str, Path], dict[str, Adapter]]:
    if options.runtime == "onnx":
        raise UsageError(f"{artifact.path} is no ONNX export; make one with: cloq export RUN --format onnx")
    checkpoint = artifact.checkpoint
    folders = adapter_folders(artifact.adapters, options.adapters)
    return (
        checkpoint,
        folders,
        {name: read_bound_adapter(path, checkpoint, force=options.force) for name, path in folders.items()},
    )


def _read_onnx(
    artifact: Artifact, options: VerifyOptions
) -> tuple[Checkpoint | OnnxExport, dict[str, Path], dict[str, Adapter]]:
    if options.runtime != "onnx" or options.dtype != "float32":
        raise UsageError(
            f"{artifact.path} is an ONNX export, whose graph computes in float32; verify it with `runtime=onnx` and "
            "without `dtype`."
        )
    require_packages()
    from cloq_export.formats.onnx.reading import OnnxExport
    from cloq_export.verbs.verification import onnx_stand_in

    opened = OnnxExport.open(artifact.path)
    folders = adapter_folders(artifact.adapters, options.adapters)
    adapters = {
        name: onnx_stand_in.read_fitting_adapter(path, opened, force=options.force) for name, path in folders.items()
    }
    return opened, folders, adapters


def adapter_folders(shelf: AdapterShelf, asked: Sequence[str]) -> dict[str, Path]:
    """Return name -> folder of the adapters that are to be served.

    Args:
        shelf: of the base.
        asked: as typed; nothing means all that are on the shelf.

    Raises:
        UsageError: a name is not allowed, or is given twice.
        FormatError, RunDirectoryError: there is no adapter.
    """
    if not asked:
        return dict(shelf.folders)
    folders: dict[str, Path] = {}
    for text in asked:
        name, separator, place = text.partition("=")
        if not separator or (not _NAME.fullmatch(name) and Path(text).is_dir()):
            place = text
            name = Path(text).name
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"`adapters={text}`: {name[:80]!r} cannot be the name of an adapter; letters, digits, '.', '_' and "
                "'-' are allowed, a letter or digit first. Give one with `adapters=NAME=FOLDER`."
            )
        if name in folders:
            raise UsageError(f"two adapters have the name {name!r}; give one another with `adapters=NAME=FOLDER`.")
        folders[name] = shelf.find(place)
    return folders


def _asked_tasks(options: VerifyOptions) -> dict[str, str | None]:
    """Return task -> its file or None, perplexity left out.

    Raises:
        UsageError: there is no such task.
    """
    asked = expand_names([task for task in options.tasks if task != PERPLEXITY])
    if options.gsm8k is not None and "gsm8k" in asked:
        asked["gsm8k"] = asked["gsm8k"] or options.gsm8k
    return asked
