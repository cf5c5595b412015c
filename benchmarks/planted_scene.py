"""What a planted fault is and is given: a copy of an export, to be changed, certified again, or served wrongly."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gate_subjects import Subject


@dataclasses.dataclass(frozen=True)
class Scene:
    """Where one fault is planted.

    Args:
        subject: the healthy model with its run.
        other: another one of the same sizes, from another seed.
        export: a copy of an export of the subject's run, which may be changed.
        place: an empty folder for what lies outside.
    """

    subject: Subject
    other: Subject
    export: Path
    place: Path

    @property
    def one(self) -> Path:
        """Return the folder of a trained adapter in the export."""
        return self.export / "adapters" / "one"


# Changes what lies there; what it returns are options of `cloq verify` that differ.
Plant = Callable[[Scene], Mapping[str, Any] | None]


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        name: for people.
        gate: that must be missed.
        says: what the reason, or the error where nothing can be measured, must hold.
        plant: what makes it.
        certified: whether the export gets a fresh certificate behind it.
        serve: what serves in the place of the healthy runtime: the healthy one -> the faulty one.
        misread: what the engine alone reads wrongly: changes a copy of the export.
    """

    name: str
    gate: str
    says: str = ""
    plant: Plant | None = None
    certified: bool = False
    serve: Callable[[Any], Any] | None = None
    misread: Callable[[Path], None] | None = None


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what a JSON file says, in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_tensors(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors of a safetensors file, in place."""
    from cloq_export.files.safe_tensors import read_safetensors
    from cloq_export.files.tensor_writer import write_safetensors

    tensors, metadata = read_safetensors(path)
    held = {name: tensor.clone() for name, tensor in tensors.items()}
    change(held)
    write_safetensors(path, {name: tensor.contiguous() for name, tensor in held.items()}, metadata)


def edit_pairs(folder: Path, change: Callable[[str, Any], Any], **noted: str) -> None:
    """Change an adapter's pairs where it lies, and what is given of what is noted of it; None leaves a pair out."""
    from cloq_export.formats.peft import read_adapter, write_adapter

    read = read_adapter(folder)
    side = json.loads((folder / "cloq_adapter.json").read_text(encoding="utf-8"))
    pairs = {module: made for module, pair in read.pairs.items() if (made := change(module, pair)) is not None}
    kept = {key: side[key] for key in ("base_model", "base_fingerprint", "extra")}
    write_adapter(folder, pairs, **(kept | noted))


def edit_config(folder: Path, **values: Any) -> None:
    """Set values of an adapter's configuration."""
    edit_json(folder / "adapter_config.json", lambda content: content.update(values))


def certify_again(folder: Path) -> None:
    """Give a folder a fresh certificate of whatever it holds, as an exporter that made the fault would have."""
    from cloq_export.artifact.certificate import read_certificate, write_certificate
    from cloq_export.artifact.checkpoint import Checkpoint
    from cloq_export.files.fingerprint import combine_digests, layer_digest

    kept = read_certificate(folder)
    digests = {module: layer_digest(layer) for module, layer in Checkpoint.open(folder).read_layers()}
    base = combine_digests(digests)
    modules = {module: {**kept.modules.get(module, {}), "sha256": digest} for module, digest in digests.items()}
    if base != kept.base_fingerprint:
        # An exporter notes the base that it wrote, wherever it does.
        config = folder / "config.json"
        config.write_text(config.read_text(encoding="utf-8").replace(kept.base_fingerprint, base), encoding="utf-8")
        for adapter in sorted((folder / "adapters").iterdir()):
            edit_pairs(adapter, lambda module, pair: pair, base_fingerprint=base)
    write_certificate(folder, kept.layout, base, modules, dict(kept.facts))
