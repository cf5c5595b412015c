"""What an artefact is and what it weighs, from its headers alone."""

from __future__ import annotations

import collections
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cloq_export.artifact.adapters import find_adapter, read_bound_adapter
from cloq_export.artifact.certificate import CERTIFICATE_NAME, verify_certificate
from cloq_export.artifact.checkpoint import ADAPTERS_NAME, CONFIG_NAME, Checkpoint
from cloq_export.artifact.checkpoint_writer import is_ours
from cloq_export.artifact.detective import examine
from cloq_export.artifact.merged import is_merged
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.errors import FormatError
from cloq_export.files.fingerprint import combine_digests, layer_digest
from cloq_export.files.safe_json import read_json
from cloq_export.files.safe_tensors import read_safetensors_header
from cloq_export.formats.merged import MERGED_NAME
from cloq_export.formats.onnx.packages import require_packages
from cloq_export.formats.onnx.record import ADAPTER_NAME as ONNX_ADAPTER_NAME
from cloq_export.formats.onnx.record import is_onnx_export, read_record
from cloq_export.formats.peft.codec import WEIGHTS_NAME as ADAPTER_WEIGHTS_NAME
from cloq_export.formats.peft.codec import Adapter, is_adapter, read_adapter
from cloq_export.models.companions import companion_files

_DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
}
_SIZES = {"codes": "code_bytes", "scales": "scale_bytes", "zeros": "zero_bytes", "index": "index_bytes"}


def stored_sizes(path: str | os.PathLike[str], adapter: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Return what a checkpoint and one of its adapters take on disk.

    `bits_per_weight` counts codes, scales and zeros over the weights of the quantized linears; an index such as
    `g_idx`, which says nothing in the layouts here, is left out of it and stands in "index_bytes". With the adapter,
    its A and B are added, over the same weights.

    Args:
        path: a run directory or a checkpoint folder.
        adapter: an adapter folder, or the name of an adapter in the run; None counts none.

    Returns:
        dict: "quantized_weights" (their number), "code_bytes", "scale_bytes", "zero_bytes", "index_bytes",
        "float_part_bytes" (tensors that are not quantized), "checkpoint_bytes" (all of these), "adapter_bytes" (None
        without one), "float_bytes" (the same model unquantized, in the dtype of its float part),
        "bits_per_weight", "bits_per_weight_with_adapter" (None without one).

    Raises:
        FormatError: a file is missing or damaged.
    """
    folder = None
    if adapter is not None:
        folder = Path(adapter)
        if RunDirectory.is_run(path) and isinstance(adapter, str) and adapter in RunDirectory.open(path).adapters():
            folder = RunDirectory.open(path).adapter_path(adapter)
    return _sizes(Checkpoint.open(path), folder)


def describe(
    path: str | os.PathLike[str],
    *,
    verify: bool = False,
    adapter: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Say what an artefact is: a run directory, an export, a checkpoint or adapter of ours, or somebody else's.

    Args:
        path: the folder.
        verify: read every tensor, compute the fingerprint of the base again, and repeat the certificate if there is
            one.
        adapter: an adapter that is to be served on this base: its name in the folder, or a folder of its own.
        force: describe an adapter of another base instead of refusing it; the answer says so.

    Returns:
        dict: "kind" ("run", "checkpoint" or "adapter"), "path", "ours", and the facts of that kind, ready for JSON.

    Raises:
        FormatError: there is nothing that is known at the path, or a file of it is missing or damaged.
        RunDirectoryError: the run cannot be read.
        BindingError: the adapter belongs to another base, and `force` is not given.
    """
    folder = Path(path)
    facts = _describe(folder, verify=verify)
    if adapter is not None:
        facts["checked_adapter"] = _describe_bound(folder, adapter, force=force)
    return facts


def _describe(folder: Path, *, verify: bool) -> dict[str, Any]:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FormatError(f"{folder} {what}; give the folder of a run, a checkpoint or an adapter.")
    if RunDirectory.is_run(folder):
        return _describe_run(folder, verify=verify)
    if is_adapter(folder):
        facts = _describe_adapter(folder)
        if verify and (folder / CERTIFICATE_NAME).is_file():
            facts["certificate"] = _verified(folder)
        return facts
    if is_merged(folder):
        return _describe_merged(folder, verify=verify)
    if is_onnx_export(folder):
        return _describe_onnx(folder, verify=verify)
    if (folder / ONNX_ADAPTER_NAME).is_file():
        return _describe_onnx_adapter(folder, verify=verify)
    if (folder / CONFIG_NAME).is_file():
        if not is_ours(folder):
            return _describe_foreign(folder, verify=verify)
        facts = _describe_checkpoint(Checkpoint.open(folder), verify=verify)
        home = folder / ADAPTERS_NAME
        if home.is_dir():
            base = facts["base_fingerprint"]
            found = [_describe_adapter(place) for place in sorted(home.iterdir()) if is_adapter(place)]
            facts["adapters"] = [
                {"name": Path(each["path"]).name, **each, "bound_to_this_base": each["base_fingerprint"] == base}
                for each in found
            ]
        return facts
    raise FormatError(
        f"{folder} holds no run.json, config.json or adapter_config.json, so it is no run, checkpoint or adapter; "
        "check the path."
    )


def _describe_run(folder: Path, *, verify: bool) -> dict[str, Any]:
    run = RunDirectory.open(folder)
    recipe = run.recipe
    damaged = run.damaged_layers()
    facts: dict[str, Any] = {
        "kind": "run",
        "path": str(folder),
        "ours": True,
        "state": run.state,
        "model": recipe.get("model"),
        "source_fingerprint": run.source_fingerprint,
        "finished_layers": len(run.completed_modules()),
        "damaged_layers": sorted(damaged.values()),
        "reports": run.reports(),
        "adapters": [],
        "checkpoint": None,
        "recipe": recipe,
        "versions": dict(run.manifest.versions),
    }
    checkpoint = None
    if run.checkpoint_path.is_dir():
        checkpoint = Checkpoint.open(run.checkpoint_path)
        facts["checkpoint"] = _describe_checkpoint(checkpoint, verify=verify)
        if verify:
            _refuse_other_layers(run, facts["checkpoint"]["base_fingerprint"])
    for name in run.adapters():
        adapter = _describe_adapter(run.adapter_path(name))
        if checkpoint is not None:
            sizes = _sizes(checkpoint, run.adapter_path(name))
            adapter["bits_per_weight_with_adapter"] = sizes["bits_per_weight_with_adapter"]
            adapter["bound_to_this_base"] = adapter["base_fingerprint"] == checkpoint.fingerprint
        facts["adapters"].append({"name": name, **adapter})
    return facts


def _describe_foreign(folder: Path, *, verify: bool) -> dict[str, Any]:
    """Describe a checkpoint of another tool: what it is by label and by content, and what is suspicious."""
    found = examine(folder)
    facts: dict[str, Any] = {"kind": "checkpoint", "path": str(folder), "ours": False}
    if found.readable:
        facts = _describe_checkpoint(Checkpoint.open(folder), verify=verify)
    elif verify and found.refusal:
        raise FormatError(found.refusal)
    return {**facts, "examination": found.facts()}


def _describe_bound(folder: Path, adapter: str | os.PathLike[str], *, force: bool) -> dict[str, Any]:
    """Describe an adapter beside the base that it is to be served on, refusing one of another base."""
    checkpoint = Checkpoint.open(folder)
    found = find_adapter(folder, adapter)
    read_bound_adapter(found, checkpoint, force=force)
    facts = _describe_adapter(found)
    bound = facts["base_fingerprint"] == checkpoint.fingerprint
    return {**facts, "bound_to_this_base": bound, "forced": not bound}


def _describe_merged(folder: Path, *, verify: bool) -> dict[str, Any]:
    record = read_json(folder / MERGED_NAME)
    facts: dict[str, Any] = {"kind": "merged export", "path": str(folder), "ours": True, **record}
    facts["modules"] = len(record.get("modules") or [])
    if verify:
        facts["certificate"] = _verified(folder)
        facts["verified"] = True
    return facts


def _describe_onnx(folder: Path, *, verify: bool) -> dict[str, Any]:
    record = read_record(folder)
    grids = collections.Counter(
        (module.spec, module.blocks.bits, module.blocks.block_size, module.blocks.accuracy_level)
        for module in record.modules.values()
    )
    facts: dict[str, Any] = {
        "kind": "onnx export",
        "path": str(folder),
        "ours": True,
        "style": record.style,
        "two_bit": record.two_bit,
        "opset": record.opset,
        "exporter": record.exporter,
        "base_fingerprint": record.base_fingerprint,
        "quantized_modules": len(record.modules),
        "notes": list(record.notes),
        "graph_bytes": sum(path.stat().st_size for path in folder.glob("model.onnx*") if path.is_file()),
        "grids": [
            {
                "bits": spec.bits,
                "group_size": spec.group_size,
                "symmetric": spec.symmetric,
                "container_bits": bits,
                "block_size": size,
                "accuracy_level": level,
                "modules": count,
            }
            for (spec, bits, size, level), count in grids.items()
        ],
    }
    home = folder / ADAPTERS_NAME
    if home.is_dir():
        facts["adapters"] = sorted(place.name for place in home.iterdir() if (place / ONNX_ADAPTER_NAME).is_file())
    if verify:
        facts["certificate"] = _verified(folder)
        facts["verified"] = True
    return facts


def _describe_onnx_adapter(folder: Path, *, verify: bool) -> dict[str, Any]:
    require_packages()
    from cloq_export.formats.onnx.adapter import read_onnx_adapter

    adapter = read_onnx_adapter(folder)
    facts: dict[str, Any] = {
        "kind": "onnx adapter",
        "path": str(folder),
        "ours": True,
        "base_model": adapter.config.get("base_model_name_or_path"),
        "base_fingerprint": adapter.base_fingerprint,
        "modules": len(adapter.pairs),
        "ranks": _counted(collections.Counter(pair.rank for pair in adapter.pairs.values())),
        "parameters": _parameters(adapter),
        "adapter_bytes": (folder / ONNX_ADAPTER_NAME).stat().st_size,
    }
    if verify and (folder / CERTIFICATE_NAME).is_file():
        facts["certificate"] = _verified(folder)
    return facts


def _verified(folder: Path) -> dict[str, Any]:
    """Repeat a certificate and say what that covered."""
    repeated = verify_certificate(folder)
    certificate = repeated.pop("certificate")
    return {"layout": certificate["layout"], "forced": certificate.get("forced", []), **repeated}


def _refuse_other_layers(run: RunDirectory, packed: str) -> None:
    """Check that the layers of a run are those that its checkpoint packs."""
    kept = combine_digests({name: layer_digest(file.read_codes()) for name, file in run.layer_files().items()})
    if kept != packed:
        raise FormatError(
            f"the layers of {run.path} are {kept}, but its checkpoint packs {packed}; write the checkpoint again with: "
            f"cloq export {run.path}"
        )


def _describe_checkpoint(checkpoint: Checkpoint, *, verify: bool) -> dict[str, Any]:
    specs = collections.Counter(checkpoint.specs.values())
    grids = [
        {"bits": spec.bits, "group_size": spec.group_size, "symmetric": spec.symmetric, "modules": count}
        for spec, count in sorted(specs.items(), key=lambda item: (-item[1], item[0].bits, item[0].group_size))
    ]
    main, folder = checkpoint.grids.default, checkpoint.folder
    facts: dict[str, Any] = {
        "kind": "checkpoint",
        "path": str(folder),
        "ours": checkpoint.is_ours,
        "architecture": _architecture(checkpoint.config),
        "layout": checkpoint.grids.layout.name,
        "bits": main.bits,
        "group_size": main.group_size,
        "symmetric": main.symmetric,
        "quantized_modules": len(checkpoint.specs),
        "base_fingerprint": checkpoint.grids.base_fingerprint,
        "files": sorted({file.path.name for file in checkpoint.files.values()}),
        "companions": [path.relative_to(folder).as_posix() for path in companion_files(folder)],
        **_sizes(checkpoint, None),
    }
    facts = {name: value for name, value in facts.items() if not name.endswith("_with_adapter") or value is not None}
    facts.pop("adapter_bytes")
    if len(grids) > 1:
        facts["grids"] = grids
    if checkpoint.notes:
        facts["notes"] = list(checkpoint.notes)
    if verify:
        # Before the certificate, which only knows that a file changed: a base that is another one is said first.
        facts["base_fingerprint"] = _computed_fingerprint(checkpoint)
        facts["verified"] = True
        if (checkpoint.folder / CERTIFICATE_NAME).is_file():
            facts["certificate"] = _verified(checkpoint.folder)
        elif checkpoint.is_ours:
            facts["certificate"] = "none: only the fingerprint was computed; `cloq export` writes one"
    return facts


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


def _describe_adapter(folder: Path) -> dict[str, Any]:
    adapter = read_adapter(folder)
    ranks = collections.Counter(pair.rank for pair in adapter.pairs.values())
    dtypes = sorted({str(pair.lora_A.dtype).removeprefix("torch.") for pair in adapter.pairs.values()})
    return {
        "kind": "adapter",
        "path": str(folder),
        "ours": adapter.base_fingerprint is not None,
        "base_model": adapter.config.get("base_model_name_or_path"),
        "base_fingerprint": adapter.base_fingerprint,
        "modules": len(adapter.pairs),
        "ranks": _counted(ranks),
        "dtype": ", ".join(dtypes),
        "parameters": _parameters(adapter),
        "adapter_bytes": bytes_of(read_safetensors_header(folder / ADAPTER_WEIGHTS_NAME)[0].values()),
    }


def _sizes(checkpoint: Checkpoint, adapter: Path | None) -> dict[str, Any]:
    sizes = dict.fromkeys((*_SIZES.values(), "float_part_bytes"), 0)
    float_codes: collections.Counter[str] = collections.Counter()
    floats, roles = set(checkpoint.float_names()), checkpoint.grids.layout.roles
    for name, header in checkpoint.headers.items():
        size = bytes_of([header])
        if name in floats:
            sizes["float_part_bytes"] += size
            float_codes[header[0]] += size
        else:
            sizes[_SIZES[roles[name.rpartition(".")[2]]]] += size
    weights = sum(math.prod(checkpoint.features(module)) for module in checkpoint.specs)
    coded = sizes["code_bytes"] + sizes["scale_bytes"] + sizes["zero_bytes"]
    float_bits = _DTYPE_BITS.get(float_codes.most_common(1)[0][0], 8) if float_codes else 16
    adapter_bytes = None
    if adapter is not None:
        adapter_bytes = bytes_of(read_safetensors_header(adapter / ADAPTER_WEIGHTS_NAME)[0].values())
    return {
        "quantized_weights": weights,
        **sizes,
        "checkpoint_bytes": coded + sizes["index_bytes"] + sizes["float_part_bytes"],
        "adapter_bytes": adapter_bytes,
        "float_bytes": sizes["float_part_bytes"] + weights * float_bits // 8,
        "bits_per_weight": 8 * coded / weights,
        "bits_per_weight_with_adapter": None if adapter_bytes is None else 8 * (coded + adapter_bytes) / weights,
    }


def bytes_of(headers: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    # An unknown dtype is one byte or less (the eight-bit floats).
    return sum(math.prod(shape) * _DTYPE_BITS.get(code, 8) // 8 for code, shape in headers)


def _counted(counts: Mapping[int, int]) -> str:
    """Return "64" or, where they differ, "64 (200 modules), 16 (10 modules)"."""
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{value} ({count} modules)" for value, count in sorted(counts.items(), reverse=True))


def _parameters(adapter: Adapter) -> int:
    return sum(pair.lora_A.numel() + pair.lora_B.numel() for pair in adapter.pairs.values())
