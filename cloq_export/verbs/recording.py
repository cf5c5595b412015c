"""Records of what a run or a training made, written when it is made; `verify` compares what is served with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloq_export.artifact.checkpoint_writer import LayerSource
from cloq_export.artifact.pair_record import record_pairs
from cloq_export.artifact.probe_record import ProbeRecord, TokenizerRecord
from cloq_export.artifact.provenance import (
    ADAPTER_KEY,
    AdapterRecord,
    AnswerRecord,
    BaseRecord,
    QualityRecord,
    TrainingRecord,
    adapter_record,
    seal_of,
)
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.compress.session import Session
from cloq_export.engines.transformers.served import sequence_logprobs
from cloq_export.errors import FormatError, RunDirectoryError
from cloq_export.files.fingerprint import combine_digests, layer_digest
from cloq_export.formats.peft import read_adapter
from cloq_export.parity.task_kinds import Questions, Task
from cloq_export.parity.task_report import TaskEntry
from cloq_export.types import LoraPair

PROVENANCE_REPORT = "provenance"
# Key of the codes alone among the probes.
CODES_ALONE = ""


def note_adapter(
    name: str,
    pairs: Mapping[str, LoraPair],
    *,
    base_fingerprint: str,
    probe: ProbeRecord | None = None,
    training: TrainingRecord | None = None,
) -> dict[str, Any]:
    """Return what the side file of an adapter records of its provenance.

    Args:
        name: of the adapter.
        pairs: as they were made, in the dtype in which they are stored.
        base_fingerprint: of the codes that they were made for.
        probe: what the model said with them at the last step.
        training: what the training says of itself.
    """
    record = AdapterRecord(name, base_fingerprint, record_pairs(pairs), probe, training)
    return {ADAPTER_KEY: record.to_json()}


def probe_model(model: Any, tokenizer: Any) -> ProbeRecord:
    """Return what a model in memory says of the fixed probes, in its own precision.

    Args:
        model: a transformers model; its adapter is on or off as it stands.
        tokenizer: of the model.
    """
    token_ids = TokenizerRecord.of(tokenizer).probes()
    was_training = model.training
    model.eval()
    try:
        logprobs = [sequence_logprobs(model, [ids])[0] for ids in token_ids]
    finally:
        model.train(was_training)
    # Where head and embeddings have codes, the first parameter is that of an adapter.
    return ProbeRecord.of(model.get_input_embeddings().weight.dtype, token_ids, logprobs)


def record_base(
    session: Session,
    directory: RunDirectory,
    tokenizer: Any,
    *,
    model_name: str,
    probes: Mapping[str, ProbeRecord] | None = None,
    quality: QualityRecord | None = None,
) -> None:
    """Write what a run has made into its reports.

    Args:
        session: of the call.
        directory: the run, all layers finished.
        tokenizer: of the float model.
        model_name: what the record may say of the model.
        probes: name of an adapter, or `CODES_ALONE` -> what the written model says.
        quality: what was measured.
    """
    layers = directory.digests()
    record = BaseRecord(
        model=model_name,
        source_fingerprint=directory.source_fingerprint,
        base_fingerprint=combine_digests(layers),
        layers=layers,
        tokenizer=TokenizerRecord.of(tokenizer),
        probes=dict(probes or {}),
        quality=quality,
    )
    session.timed("write", lambda: directory.write_report(PROVENANCE_REPORT, record.to_json()))


def record_answers(
    session: Session,
    directory: RunDirectory,
    adapter: str | None,
    tasks: Mapping[str, tuple[Task, Questions]],
    entries: Mapping[str, TaskEntry],
) -> None:
    """Add to a run's record which questions it answers right, for `verify` to hold served answers against.

    Args:
        session: of the call; it notes where the run cannot be written now.
        directory: the run.
        adapter: the adapter in the run that was asked; None if none was.
        tasks: name -> (task, questions).
        entries: task -> its entry in a report.
    """
    record = run_record(directory)
    if record is None:
        return
    seals = {"quantized": CODES_ALONE}
    if adapter is not None and adapter in directory.adapters.folders:
        made = adapter_record(read_adapter(directory.adapter_path(adapter)).extra, adapter)
        seals |= {} if made is None else {"adapter": seal_of(made)}
    kept = dict(record.tasks)
    for name, (task, questions) in tasks.items():
        models = entries[name].models
        right = {
            seal: "".join("1" if flag else "0" for flag in models[model].correct)
            for model, seal in seals.items()
            if model in models
        }
        joined = "".join(key[: AnswerRecord.DIGITS] for key in questions.keys)
        made_before = kept.get(name)
        asked = AnswerRecord(questions.shots, task.version, joined, right)
        if made_before is not None and dataclasses.replace(made_before, right=right) == asked:
            asked = dataclasses.replace(asked, right={**made_before.right, **right})
        kept[name] = asked
    try:
        with directory:
            directory.write_report(PROVENANCE_REPORT, dataclasses.replace(record, tasks=kept).to_json())
    except RunDirectoryError as error:
        session.notes.append(f"which questions were answered right is not recorded in the run: {error}")


def run_record(directory: RunDirectory) -> BaseRecord | None:
    """Return what a run recorded, None if it recorded nothing.

    Raises:
        FormatError: the record is of another version, was edited, or is damaged.
    """
    if PROVENANCE_REPORT not in directory.reports():
        return None
    source = str(directory.path / "reports" / f"{PROVENANCE_REPORT}.json")
    return BaseRecord.from_json(directory.read_report(PROVENANCE_REPORT), source)


def export_record(
    session: Session, record: BaseRecord | None, layers: LayerSource, adapters: Mapping[str, AdapterRecord | None]
) -> BaseRecord | None:
    """Return the record that an export carries: the run's, with the adapters that the export is written with.

    The record is carried unchanged even if the layers have changed since, which is noted here and found by `verify`.

    Args:
        session: of the call; differences are noted in it.
        record: of the run, or of the export that is converted.
        layers: what the export is made of.
        adapters: name -> record of each adapter that goes along.
    """
    if record is None:
        session.notes.append(
            "nothing recorded what these codes were made from, so `cloq verify` cannot prove their provenance"
        )
        return None
    changed = [module for module in layers.specs if record.layers.get(module) != layer_digest(layers.read(module))]
    if changed or set(record.layers) != set(layers.specs):
        session.notes.append(
            f"{len(changed)} layers are not those that the run recorded when it made them, {(changed or ['none'])[0]} "
            "the first: `cloq verify` will miss its gate"
        )
    return dataclasses.replace(
        record, adapters={name: None if known is None else seal_of(known) for name, known in adapters.items()}
    )


def read_adapter_record(session: Session, name: str, extra: Mapping[str, Any], folder: Path) -> AdapterRecord | None:
    """Return the record in an adapter's side file; one that cannot be read is noted, and treated as missing.

    Args:
        session: of the call.
        name: of the adapter.
        extra: what its writer noted.
        folder: where it lies.
    """
    try:
        return adapter_record(extra, str(folder))
    except FormatError as error:
        session.notes.append(f"the provenance of the adapter {name} is not carried: {error}")
        return None
