"""One export of any format, as `export` and `convert` make it: checked, fitted to its target, written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.checkpoint_writer import LayerSource
from cloq_export.artifact.empty_model import quantized_embeddings
from cloq_export.artifact.model_card import CardAdapter, CardFacts, MadeFrom
from cloq_export.artifact.needed_adapter import NOTE, refuse_alone
from cloq_export.artifact.provenance import BaseRecord
from cloq_export.compress.session import Session
from cloq_export.errors import FormatError, UnsupportedModelError, UsageError
from cloq_export.files.spelled_paths import command_line
from cloq_export.formats.onnx.packages import require_packages
from cloq_export.formats.targets.preflight import Decision, preflight
from cloq_export.formats.targets.table import Exported, parse_target
from cloq_export.verbs.export_adapters import PreparedAdapter, fit_target, prepare_adapters, refuse_strange_modules
from cloq_export.verbs.export_card import loading_lines
from cloq_export.verbs.export_writing import ExportJob, write_adapters_alone, write_merged, write_onnx, write_quantized
from cloq_export.verbs.options import ExportOptions, refuse_unmeant
from cloq_export.verbs.recording import export_record

MERGED, PEFT, ONNX, ONNX_ADAPTER = "merged", "peft", "onnx", "onnx-adapter"
ADAPTERS_ALONE = (PEFT, ONNX_ADAPTER)


@dataclasses.dataclass(frozen=True)
class ExportSource:
    """What an export is made from.

    Args:
        path: where adapters are looked up by name, and in which the export lies unless it is told otherwise.
        checkpoint: its codes, and what is not quantized.
        layers: the codes, read one at a time.
        adapters: names in the source, or adapter folders.
        made_from: what the model card says of the float model and the method.
        record: what it was made from; None if nothing recorded that.
        max_shard_bytes: largest weight file.
    """

    path: Path
    checkpoint: Checkpoint
    layers: LayerSource
    adapters: Sequence[str]
    made_from: MadeFrom
    record: BaseRecord | None
    max_shard_bytes: int


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """An export that was written.

    Args:
        folder: where it lies.
        format: what it is.
        target: the engine that it was checked for; None if none was named.
        devices: where that engine can serve it.
        max_lora_rank: what that engine must be told to serve the adapters.
        base_fingerprint: of the codes.
        adapters: that are in it.
        seconds: stage -> time.
        notes: what did not go the ordinary way.
    """

    folder: Path
    format: str
    target: str | None
    devices: Sequence[str] | None
    max_lora_rank: int | None
    base_fingerprint: str
    adapters: Sequence[PreparedAdapter]
    seconds: Mapping[str, float]
    notes: Sequence[str]

    @property
    def next(self) -> list[str]:
        """Return commands that suggest themselves."""
        verify = f"{command_line('cloq', 'verify', self.folder)} --reference MODEL --runtime onnx"
        return [
            command_line("cloq", "inspect", self.folder, "--verify"),
            *([verify] if self.format == ONNX else []),
            command_line("cloq", "push", self.folder, "OWNER/NAME"),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return what `cloq export --json` prints."""
        return {
            "format": self.format,
            "target": self.target,
            "devices": self.devices,
            "max_lora_rank": self.max_lora_rank,
            "base_fingerprint": self.base_fingerprint,
            "adapters": [adapter.to_json() for adapter in self.adapters],
            "files": {"export": str(self.folder)},
            "seconds": dict(self.seconds),
            "notes": list(self.notes),
            "next": self.next,
        }


def write_export(session: Session, source: ExportSource, options: ExportOptions) -> ExportResult:
    """Write one export of any format.

    Args:
        session: of the call.
        source: what it is made from.
        options: what is asked.

    Raises:
        CloqError: as `export`.
    """
    check_export_options(options, source.adapters)
    checkpoint, layers = source.checkpoint, source.layers
    if options.format == ONNX and isinstance(checkpoint.config.get("text_config"), Mapping):
        raise UnsupportedModelError(
            f"{checkpoint.folder} is a wrapper of the type {checkpoint.config.get('model_type')}, and an ONNX export "
            "is a decoder of text, without the wrapper's other parts; choose another format, e.g. `format=gptq_v2`."
        )
    if options.format == ONNX and (embeddings := quantized_embeddings(checkpoint)):
        raise UnsupportedModelError(
            f"{checkpoint.folder} holds codes of {embeddings[0]}, and an ONNX export has floats of embeddings alone; "
            "choose another format, e.g. `format=compressed_tensors`."
        )
    if layers.needs_adapter:
        _require_adapter(session, source, options)
    adapters = prepare_adapters(session, source.path, source.adapters, checkpoint, options)
    refuse_strange_modules(adapters, layers, checkpoint)
    format, decision = _choose_format(session, source, adapters, options)
    if decision is not None:
        adapters = tuple(fit_target(session, adapter, decision, options) for adapter in adapters)
    record = None
    if format not in (*ADAPTERS_ALONE, MERGED):
        record = export_record(
            session, source.record, layers, {adapter.name: adapter.provenance for adapter in adapters}
        )
    exported = exported_of(source, adapters, merged=format == MERGED)
    engines = () if format in ADAPTERS_ALONE else loading_lines(format, exported, adapters)
    job = ExportJob(
        session=session,
        out=options.out or source.path / "exports" / format,
        format=format,
        checkpoint=checkpoint,
        layers=layers,
        adapters=adapters,
        options=options,
        record=record,
        max_shard_bytes=source.max_shard_bytes,
        card=CardFacts(
            made_from=source.made_from,
            layout=format,
            base_fingerprint=checkpoint.fingerprint,
            adapters=tuple(CardAdapter(adapter.name, adapter.record) for adapter in adapters),
            engines=engines,
            notes=tuple(session.notes),
        ),
    )
    write = {PEFT: write_adapters_alone, ONNX_ADAPTER: write_adapters_alone, ONNX: write_onnx, MERGED: write_merged}
    write.get(format, write_quantized)(job)
    return ExportResult(
        folder=job.out,
        format=format,
        target=options.target,
        devices=None if decision is None else decision.devices,
        max_lora_rank=None if decision is None else decision.max_lora_rank,
        base_fingerprint=checkpoint.fingerprint,
        adapters=adapters,
        seconds=session.seconds,
        notes=session.notes,
    )


def check_export_options(options: ExportOptions, adapters: Sequence[str]) -> None:
    """Refuse options that contradict each other.

    Args:
        options: what is asked.
        adapters: that would go along.

    Raises:
        UsageError: they do, or one has a value that is not allowed.
        MissingPackageError: an ONNX export is asked for, and its packages are not installed.
    """
    refuse_unmeant(options)
    if options.expert_pairs != "single" and options.format != PEFT:
        raise UsageError(
            f"`expert_pairs` is {options.expert_pairs!r}, which engines that read {options.format or 'checkpoints'} do "
            "not take; give it with `format=peft`, or leave it out."
        )
    if options.format == MERGED and len(adapters) > 1:
        raise UsageError(
            f"a merged export holds one adapter, and there are {len(adapters)}: {', '.join(adapters)}; choose one "
            "with `adapters`."
        )
    for name in ("style", "two_bit", "opset"):
        if getattr(options, name) is not None and options.format != ONNX:
            raise UsageError(f"`{name}` is about ONNX graphs; give it with `format=onnx`, or leave it out.")
    if options.format in (ONNX, ONNX_ADAPTER):
        require_packages()
    if options.format in ADAPTERS_ALONE and not adapters:
        raise UsageError("there is no adapter to export; make one with `cloq adapt`, or name a folder with `adapters`.")


def _require_adapter(session: Session, source: ExportSource, options: ExportOptions) -> None:
    """Refuse weights without the adapter that their codes need, and note the need elsewhere."""
    if not source.adapters and options.format == MERGED:
        refuse_alone(source.checkpoint, "merge one in with `adapters`")
    session.notes.append(NOTE if source.adapters else f"{NOTE}; none goes along with this export")


def noted_record(session: Session, read: Callable[[], BaseRecord | None]) -> BaseRecord | None:
    """Return what was recorded of a base; one that cannot be read is noted, and treated as missing."""
    try:
        return read()
    except FormatError as error:
        session.notes.append(f"the provenance of the codes is not carried: {error}")
        return None


def exported_of(source: ExportSource, adapters: Sequence[PreparedAdapter], *, merged: bool) -> Exported:
    """Return what an engine would be given; this package, and so the plugin, is installed here.

    Args:
        source: what the export is made from.
        adapters: that lie in it.
        merged: there is one adapter, and it is in the weights.
    """
    ranks = [] if merged else [pair.rank for adapter in adapters for pair in adapter.pairs.values()]
    embeddings = quantized_embeddings(source.checkpoint)
    return Exported(source.layers.specs, source.layers.shapes, ranks, plugin=True, embeddings=embeddings)


def _choose_format(
    session: Session, source: ExportSource, adapters: Sequence[PreparedAdapter], options: ExportOptions
) -> tuple[str, Decision | None]:
    """Return the format, and what the target's rules say about it."""
    alone = options.format if options.format in ADAPTERS_ALONE else None
    if options.target is None:
        return options.format or source.checkpoint.grids.layout.name, None
    decision = preflight(
        parse_target(options.target),
        exported_of(source, adapters, merged=False),
        layout=None if alone else options.format,
        device=options.device,
    )
    session.notes.extend(decision.notes)
    return alone or decision.layout, decision
