"""Writers of an export, one for each kind: a packed checkpoint, merged weights, an ONNX graph, adapters alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from cloq_export.artifact.adapters import ADAPTERS_NAME
from cloq_export.artifact.certificate import Certificate, certify_checkpoint, write_certificate
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.checkpoint_writer import LayerSource, WriteSettings, export_checkpoint
from cloq_export.artifact.empty_model import empty_model, float_part, refuse_single_experts, tied_head
from cloq_export.artifact.expert_names import expert_stacks
from cloq_export.artifact.merged import MergedAdapter, MergedReport, export_merged
from cloq_export.artifact.model_card import CardAdapter, CardFacts, write_model_card
from cloq_export.artifact.provenance import BaseRecord, write_base_record
from cloq_export.compress.session import Session
from cloq_export.errors import UsageError
from cloq_export.formats.onnx.blocks import STYLES, TWO_BIT, Style, TwoBit
from cloq_export.formats.onnx.record import GraphOptions
from cloq_export.formats.peft.stacked import ExpertStack
from cloq_export.formats.registry import LAYOUTS
from cloq_export.verbs.export_adapters import PreparedAdapter, place_adapter, place_onnx_adapter
from cloq_export.verbs.export_card import certificate_row, write_card
from cloq_export.verbs.options import ExportOptions

_MERGED_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class ExportJob:
    """One export, with all that was decided before its first byte is written.

    Args:
        session: of the call.
        out: the folder to make.
        format: what is written.
        checkpoint: its codes, and what is not quantized.
        layers: the codes, read one at a time.
        adapters: that go along.
        options: what was asked.
        record: what the export carries about what it was made from, or None.
        max_shard_bytes: largest weight file.
        card: what the model card says.
    """

    session: Session
    out: Path
    format: str
    checkpoint: Checkpoint
    layers: LayerSource
    adapters: Sequence[PreparedAdapter]
    options: ExportOptions
    record: BaseRecord | None
    max_shard_bytes: int
    card: CardFacts

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of the codes."""
        return self.card.base_fingerprint

    @property
    def base_model(self) -> str:
        """Return what the export may say of the float model."""
        return self.card.made_from.base_model

    def certificate_facts(self) -> dict[str, Any]:
        """Return what the certificate says besides hashes."""
        return {
            "provenance": self.record is not None,
            "adapters": {adapter.name: dict(adapter.record) for adapter in self.adapters},
            "forced": [adapter.name for adapter in self.adapters if adapter.record.get("forced")],
        }

    def write_card(self, folder: Path, certificate: Certificate, **more: Any) -> None:
        """Write the model card, with what only became known in writing."""
        card = dataclasses.replace(self.card, certificate=certificate_row(certificate), **more)
        write_card(folder, card, self.checkpoint)


def write_quantized(job: ExportJob) -> None:
    """Write a checkpoint in a layout, with its adapters."""
    floats = float_part(job.checkpoint)

    def finish(folder: Path, written: str) -> None:
        for adapter in job.adapters:
            place_adapter(folder / ADAPTERS_NAME / adapter.name, adapter, job.base_model, written)
        if job.record is not None:
            write_base_record(folder, job.record)
        certificate = certify_checkpoint(
            folder, job.layers, floats, base_fingerprint=written, facts=job.certificate_facts()
        )
        job.write_card(folder, certificate)

    def write() -> None:
        with job.session.progress(f"write {job.format}") as progress:
            export_checkpoint(
                job.out,
                job.layers,
                floats,
                layout=LAYOUTS[job.format],
                settings=WriteSettings(job.max_shard_bytes, job.fingerprint, finish, progress),
            )

    job.session.timed("write and compare", write)


def write_merged(job: ExportJob) -> None:
    """Write plain 16-bit weights with one adapter, if there is one, in them."""
    session = job.session
    refuse_single_experts(job.checkpoint)
    floats = float_part(job.checkpoint)
    adapter = job.adapters[0] if job.adapters else None
    untied = []
    if adapter is not None and any(f"{module}.weight" not in floats.headers for module in adapter.pairs):
        floats = dataclasses.replace(floats, tied=tied_head(job.checkpoint))
        untied = [name for name in floats.tied if name.removesuffix(".weight") in adapter.pairs]
    session.notes += [f"{name} has a pair, so it is written apart from {floats.tied[name]}" for name in untied]

    def finish(folder: Path, report: MergedReport) -> None:
        certificate = write_certificate(folder, job.format, job.fingerprint, report.modules, job.certificate_facts())
        lost = report.rounding["merged"].max_norm
        notes = [
            *session.notes,
            f"Merging rounds each weight once more than serving codes and adapter apart does: at most {lost:.2e} of a "
            "weight matrix's norm here.",
        ]
        job.write_card(folder, certificate, dtype=job.options.dtype, notes=tuple(notes))

    def write() -> None:
        with session.progress("merge") as progress:
            export_merged(
                job.out,
                job.layers,
                floats,
                MergedAdapter() if adapter is None else MergedAdapter(adapter.pairs, adapter.name),
                dtype=_MERGED_DTYPES[job.options.dtype],
                settings=WriteSettings(job.max_shard_bytes, job.fingerprint, finish, progress),
            )

    session.timed("write and compare", write)


def write_onnx(job: ExportJob) -> None:
    """Write a decoder graph with its adapters."""
    from cloq_export.engines.onnx.export import OnnxReport, export_onnx

    _require_fit(job)
    session, options = job.session, job.options

    def finish(folder: Path, report: OnnxReport) -> None:
        for adapter in job.adapters:
            place_onnx_adapter(folder / ADAPTERS_NAME / adapter.name, adapter, job.base_model, job.fingerprint)
        if job.record is not None:
            write_base_record(folder, job.record)
        session.notes.append(
            f"opset {report.record.opset}, float graph of {report.record.exporter}, style {report.record.style}"
        )
        session.notes.extend(report.record.notes)
        facts = job.certificate_facts() | ({"needs_adapter": True} if job.layers.needs_adapter else {})
        certificate = write_certificate(folder, job.format, job.fingerprint, report.modules, facts)
        job.write_card(folder, certificate, notes=tuple(session.notes))

    def write() -> None:
        session.say("export the float graph; the exporter holds the float model in memory")
        with session.progress("write onnx") as progress:
            export_onnx(
                job.out,
                job.layers,
                float_part(job.checkpoint),
                GraphOptions(
                    style=cast(Style, options.style or STYLES[0]),
                    two_bit=cast(TwoBit, options.two_bit or TWO_BIT[0]),
                    opset=options.opset,
                    progress=progress,
                ),
                base_fingerprint=job.fingerprint,
                finish=finish,
            )

    session.timed("write and compare", write)


def write_adapters_alone(job: ExportJob) -> None:
    """Write adapters alone: one is the folder itself, several are folders in it."""
    peft = job.format == "peft"
    if not peft:
        _require_fit(job)
    place: Callable[[Path, PreparedAdapter, str, str], None] = place_onnx_adapter
    if peft:
        place = functools.partial(place_adapter, stacks=_asked_stacks(job))

    def write() -> None:
        for adapter in job.adapters:
            folder = job.out if len(job.adapters) == 1 else job.out / adapter.name
            place(folder, adapter, job.base_model, job.fingerprint)
            facts = dataclasses.replace(job, adapters=[adapter]).certificate_facts()
            certificate = write_certificate(folder, job.format, job.fingerprint, {}, facts)
            card = dataclasses.replace(
                job.card,
                relation="adapter",
                library_name="peft" if peft else "onnxruntime",
                certificate=certificate_row(certificate),
                adapters=(CardAdapter(adapter.name, adapter.record),),
            )
            write_model_card(folder, card)

    job.session.timed("write and compare", write)


def _asked_stacks(job: ExportJob) -> list[ExpertStack]:
    """Return the tensors of fused experts whose pairs are to be one each.

    Raises:
        UsageError: they are asked for, and the model's class has none.
    """
    if job.options.expert_pairs == "single":
        return []
    stacks = expert_stacks(empty_model(job.checkpoint, None))
    if not stacks:
        raise UsageError(
            f"`expert_pairs` is 'stacked', and the model of {job.checkpoint.folder} holds no experts in one tensor; "
            "leave it out."
        )
    return stacks


def _require_fit(job: ExportJob) -> None:
    from cloq_export.formats.onnx.adapter import require_fit

    for adapter in job.adapters:
        require_fit(adapter.pairs, job.layers.shapes, f"the adapter {adapter.name}")
