"""What an artefact is and what it weighs, from its headers alone."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloq_export.artifact.adapters import ADAPTERS_NAME, AdapterShelf, read_bound_adapter
from cloq_export.artifact.artifact import Artifact
from cloq_export.artifact.certificate import CERTIFICATE_NAME, RepeatedCertificate, verify_certificate
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.checkpoint_writer import is_ours
from cloq_export.artifact.detective import examine
from cloq_export.artifact.detective.gptq import HUMMING_ZEROS
from cloq_export.artifact.inspection_result import (
    AdapterInspection,
    CheckpointInspection,
    GridCount,
    Inspection,
    MergedInspection,
    OnnxAdapterInspection,
    OnnxGridCount,
    OnnxInspection,
    RunInspection,
    UnreadInspection,
)
from cloq_export.artifact.needed_adapter import NOTE
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.artifact.stored_sizes import StoredSizes, adapter_bytes
from cloq_export.errors import FormatError
from cloq_export.files.fingerprint import combine_digests, layer_digest
from cloq_export.files.safe_json import read_json
from cloq_export.formats.gptq import GPTQ_V1
from cloq_export.formats.merged import MERGED_NAME
from cloq_export.formats.onnx.packages import require_packages
from cloq_export.formats.onnx.record import ADAPTER_NAME as ONNX_ADAPTER_NAME
from cloq_export.formats.onnx.record import read_record
from cloq_export.formats.peft.codec import Adapter, read_adapter
from cloq_export.models.companions import companion_files

_NO_CERTIFICATE = "none: only the fingerprint was computed; `cloq export` writes one"


def describe(
    path: str | os.PathLike[str],
    *,
    verify: bool = False,
    adapter: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Inspection:
    """Say what an artefact is: a run directory, an export, a checkpoint or adapter of ours, or somebody else's.

    Args:
        path: the folder.
        verify: read every tensor, compute the fingerprint of the base again, and repeat the certificate if there is
            one.
        adapter: an adapter that is to be served on this base: its name in the folder, or a folder of its own.
        force: describe an adapter of another base instead of refusing it; the answer says so.

    Returns:
        The facts of its kind.

    Raises:
        FormatError: there is nothing that is known at the path, or a file of it is missing or damaged.
        RunDirectoryError: the run cannot be read.
        BindingError: the adapter belongs to another base, and `force` is not given.
    """
    artifact = Artifact.open(path)
    inspection = _describe(artifact, verify=verify)
    if adapter is None:
        return inspection
    return dataclasses.replace(inspection, checked_adapter=_describe_bound(artifact, adapter, force=force))


def _describe(artifact: Artifact, *, verify: bool) -> Inspection:
    folder = artifact.path
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FormatError(f"{folder} {what}; give the folder of a run, a checkpoint or an adapter.")
    if artifact.run is not None:
        return _describe_run(artifact.run, verify=verify)
    if artifact.kind == "adapter":
        return dataclasses.replace(_describe_adapter(folder), certificate=_certificate_of(folder, verify=verify))
    if artifact.kind == "merged export":
        repeated = verify_certificate(folder) if verify else None
        return MergedInspection(path=str(folder), record=read_json(folder / MERGED_NAME), certificate=repeated)
    if artifact.kind == "onnx export":
        return _describe_onnx(folder, artifact.adapters, verify=verify)
    if artifact.kind == "onnx adapter":
        return _describe_onnx_adapter(folder, verify=verify)
    if artifact.kind == "checkpoint" and is_ours(folder):
        return _with_adapters(_describe_checkpoint(artifact.checkpoint, verify=verify), artifact.adapters)
    if artifact.kind == "checkpoint":
        return _describe_foreign(folder, verify=verify)
    raise FormatError(
        f"{folder} holds no run.json, config.json or adapter_config.json, so it is no run, checkpoint or adapter; "
        "check the path."
    )


def _describe_run(run: RunDirectory, *, verify: bool) -> RunInspection:
    checkpoint = described = None
    if run.checkpoint_path.is_dir():
        checkpoint = Checkpoint.open(run.checkpoint_path)
        described = _describe_checkpoint(checkpoint, verify=verify)
        if verify:
            _refuse_other_layers(run, described.base_fingerprint)
    adapters = []
    for name, folder in run.adapters.folders.items():
        adapter = dataclasses.replace(_describe_adapter(folder), name=name)
        if checkpoint is not None:
            adapter = dataclasses.replace(
                adapter,
                bits_per_weight_with_adapter=StoredSizes.of(checkpoint, folder).bits_per_weight_with_adapter,
                bound_to_this_base=adapter.base_fingerprint == checkpoint.fingerprint,
            )
        adapters.append(adapter)
    return RunInspection(
        path=str(run.path),
        state=run.state,
        model=run.manifest.recipe.get("model"),
        source_fingerprint=run.source_fingerprint,
        finished_layers=len(run.completed_modules()),
        damaged_layers=tuple(sorted(run.damaged_layers().values())),
        reports=tuple(run.reports()),
        adapters=tuple(adapters),
        checkpoint=described,
        recipe=dict(run.manifest.recipe),
        versions=run.manifest.versions,
        notes=run.adapters.notes,
    )


def _with_adapters(described: CheckpointInspection, shelf: AdapterShelf) -> CheckpointInspection:
    if not (shelf.home / ADAPTERS_NAME).is_dir():
        return described
    adapters = []
    for name, folder in shelf.folders.items():
        adapter = _describe_adapter(folder)
        bound = adapter.base_fingerprint == described.base_fingerprint
        adapters.append(dataclasses.replace(adapter, name=name, bound_to_this_base=bound))
    return dataclasses.replace(described, adapters=tuple(adapters), notes=(*described.notes, *shelf.notes))


def _describe_foreign(folder: Path, *, verify: bool) -> Inspection:
    """Describe a checkpoint of another tool: what it is by label and by content, and what is suspicious."""
    examination = examine(folder)
    if examination.readable:
        described = _describe_checkpoint(Checkpoint.open(folder), verify=verify)
        return dataclasses.replace(described, examination=examination)
    if verify and examination.refusal:
        raise FormatError(examination.refusal)
    return UnreadInspection(path=str(folder), ours=False, examination=examination)


def _describe_bound(artifact: Artifact, adapter: str | os.PathLike[str], *, force: bool) -> AdapterInspection:
    """Describe an adapter for the base that it is to be served on, refusing one of another base."""
    checkpoint = artifact.checkpoint
    folder = artifact.adapters.find(adapter)
    read_bound_adapter(folder, checkpoint, force=force)
    described = _describe_adapter(folder)
    bound = described.base_fingerprint == checkpoint.fingerprint
    return dataclasses.replace(described, bound_to_this_base=bound, forced=not bound)


def _describe_onnx(folder: Path, shelf: AdapterShelf, *, verify: bool) -> OnnxInspection:
    record = read_record(folder)
    grids = collections.Counter(
        (module.spec, module.blocks.bits, module.blocks.block_size, module.blocks.accuracy_level)
        for module in record.modules.values()
    )
    return OnnxInspection(
        path=str(folder),
        style=record.style,
        two_bit=record.two_bit,
        opset=record.opset,
        exporter=record.exporter,
        base_fingerprint=record.base_fingerprint,
        quantized_modules=len(record.modules),
        notes=(
            *record.notes,
            *([NOTE] if record.needs_adapter else []),
            *shelf.notes,
        ),
        graph_bytes=sum(path.stat().st_size for path in folder.glob("model.onnx*") if path.is_file()),
        grids=tuple(
            OnnxGridCount(
                **dataclasses.asdict(spec), container_bits=bits, block_size=size, accuracy_level=level, modules=count
            )
            for (spec, bits, size, level), count in grids.items()
        ),
        adapters=tuple(shelf.names) if (folder / ADAPTERS_NAME).is_dir() else None,
        certificate=verify_certificate(folder) if verify else None,
    )


def _describe_onnx_adapter(folder: Path, *, verify: bool) -> OnnxAdapterInspection:
    require_packages()
    from cloq_export.formats.onnx.adapter import read_onnx_adapter

    adapter = read_onnx_adapter(folder)
    return OnnxAdapterInspection(
        path=str(folder),
        base_model=adapter.config.get("base_model_name_or_path"),
        base_fingerprint=adapter.base_fingerprint,
        modules=len(adapter.pairs),
        ranks=_counted_ranks(adapter),
        parameters=_parameters(adapter),
        adapter_bytes=(folder / ONNX_ADAPTER_NAME).stat().st_size,
        certificate=_certificate_of(folder, verify=verify),
    )


def _certificate_of(folder: Path, *, verify: bool) -> RepeatedCertificate | None:
    """Repeat the certificate of a folder if it has one and this is asked for."""
    return verify_certificate(folder) if verify and (folder / CERTIFICATE_NAME).is_file() else None


def _refuse_other_layers(run: RunDirectory, packed: str | None) -> None:
    """Check that the layers of a run are those that its checkpoint packs."""
    kept = combine_digests({name: layer_digest(file.read_codes()) for name, file in run.layer_files().items()})
    if kept != packed:
        raise FormatError(
            f"the layers of {run.path} are {kept}, but its checkpoint packs {packed}; write the checkpoint again with: "
            f"cloq export {run.path}"
        )


def _describe_checkpoint(checkpoint: Checkpoint, *, verify: bool) -> CheckpointInspection:
    specs = collections.Counter(checkpoint.specs.values())
    main, folder = checkpoint.grids.default, checkpoint.folder
    fingerprint = checkpoint.grids.base_fingerprint
    certificate: RepeatedCertificate | str | None = None
    if verify:
        # Before the certificate, which can only say that a file changed: that the base is another one says more.
        fingerprint = _computed_fingerprint(checkpoint)
        certificate = _certificate_of(folder, verify=True) or (_NO_CERTIFICATE if checkpoint.is_ours else None)
    return CheckpointInspection(
        path=str(folder),
        ours=checkpoint.is_ours,
        architecture=_architecture(checkpoint.config),
        layout=checkpoint.grids.layout.name,
        main=GridCount(**dataclasses.asdict(main), modules=len(checkpoint.specs)),
        grids=tuple(
            GridCount(**dataclasses.asdict(spec), modules=count)
            for spec, count in sorted(specs.items(), key=lambda item: (-item[1], item[0].bits, item[0].group_size))
        ),
        base_fingerprint=fingerprint,
        files=tuple(sorted({file.path.name for file in checkpoint.files.values()})),
        companions=tuple(path.relative_to(folder).as_posix() for path in companion_files(folder)),
        sizes=StoredSizes.of(checkpoint),
        notes=(*checkpoint.notes, *([NOTE] if checkpoint.needs_adapter else []), *_reader_notes(checkpoint)),
        verified=verify,
        certificate=certificate,
    )


def _reader_notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return what to know of readers of a checkpoint of ours; those of other tools are examined."""
    if not checkpoint.is_ours or checkpoint.layout_name != GPTQ_V1.name:
        return ()
    if all(spec.symmetric for spec in checkpoint.specs.values()):
        return ()
    finding, _, remedy = HUMMING_ZEROS
    return (f"{finding}; {remedy}",)


def _computed_fingerprint(checkpoint: Checkpoint) -> str:
    """Return the fingerprint of the tensors, which must be what the config says."""
    computed, recorded = checkpoint.computed_fingerprint(), checkpoint.grids.base_fingerprint
    if recorded is not None and recorded != computed:
        raise FormatError(
            f"{checkpoint.folder} says its base is {recorded}, but its tensors are {computed}; the files were changed "
            "or damaged: fetch or write the checkpoint again."
        )
    return computed


def _architecture(config: Mapping[str, Any]) -> str | None:
    names = config.get("architectures")
    known = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return ", ".join(known) or None


def _describe_adapter(folder: Path) -> AdapterInspection:
    adapter = read_adapter(folder)
    dtypes = sorted({str(pair.lora_A.dtype).removeprefix("torch.") for pair in adapter.pairs.values()})
    return AdapterInspection(
        path=str(folder),
        ours=adapter.base_fingerprint is not None,
        base_model=adapter.config.get("base_model_name_or_path"),
        base_fingerprint=adapter.base_fingerprint,
        modules=len(adapter.pairs),
        ranks=_counted_ranks(adapter),
        dtype=", ".join(dtypes),
        parameters=_parameters(adapter),
        adapter_bytes=adapter_bytes(folder),
    )


def _counted_ranks(adapter: Adapter) -> str:
    """Return "64" or, where ranks differ, "64 (200 modules), 16 (10 modules)"."""
    counts = collections.Counter(pair.rank for pair in adapter.pairs.values())
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{rank} ({count} modules)" for rank, count in sorted(counts.items(), reverse=True))


def _parameters(adapter: Adapter) -> int:
    return sum(pair.lora_A.numel() + pair.lora_B.numel() for pair in adapter.pairs.values())
