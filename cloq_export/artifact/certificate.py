"""The equality certificate: what an export holds is what the run made, read back from disk and compared bit for bit."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.checkpoint_writer import FloatPart, LayerSource
from cloq_export.artifact.covered_files import (
    LONGEST_NAME,
    FileEntry,
    covered_files,
    entries_of,
    refuse_changed_files,
    refuse_extras,
)
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.errors import FormatError
from cloq_export.files.atomic import write_json
from cloq_export.files.fingerprint import combine_digests, layer_digest
from cloq_export.files.safe_json import read_json
from cloq_export.files.safe_paths import require_inside
from cloq_export.files.tensor_writer import tensor_bytes
from cloq_export.files.versions import environment
from cloq_export.formats.onnx.packages import require_packages
from cloq_export.types import QuantizedLayer

CERTIFICATE_NAME = "cloq_certificate.json"
CERTIFICATE_FORMAT = "cloq-certificate"
FORMAT_VERSION = 1

# Exports of float weights: their files are compared, and there are no codes to unpack.
WITHOUT_CODES = ("merged", "peft", "onnx-adapter")
ONNX = "onnx"

# People edit the card of a published model; nothing in it is served.
_NOT_COVERED = (CERTIFICATE_NAME, "README.md")


@dataclasses.dataclass(frozen=True)
class Certificate:
    """The content of cloq_certificate.json.

    Args:
        layout: of the export.
        base_fingerprint: of the quantized base that it holds or comes from.
        modules: full module name -> what was compared; "sha256" is of its layer, or of the bytes that the folder holds.
        files: name in the folder -> what lies there.
        versions: of the software that wrote it.
        facts: what else was noted, e.g. adapters that were taken by force.
    """

    layout: str
    base_fingerprint: str
    modules: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, FileEntry]
    versions: Mapping[str, Any]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the content of cloq_certificate.json."""
        return {
            "format": CERTIFICATE_FORMAT,
            "format_version": FORMAT_VERSION,
            "layout": self.layout,
            "base_fingerprint": self.base_fingerprint,
            "modules": dict(self.modules),
            "files": {name: dataclasses.asdict(entry) for name, entry in self.files.items()},
            "versions": dict(self.versions),
            **self.facts,
        }


@dataclasses.dataclass(frozen=True)
class Repeated:
    """What was compared again, without a difference.

    Args:
        files: how many were compared.
        modules: how many were.
        not_covered: files of the hub that lie beside them; the card may be edited and is not counted.
        digests: module -> `layer_digest`; empty where there are no codes.
    """

    files: int
    modules: int
    not_covered: tuple[str, ...]
    digests: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return what was compared as a JSON object."""
        return {
            "files": self.files,
            "modules": self.modules,
            "not_covered": list(self.not_covered),
            "digests": dict(self.digests),
        }


@dataclasses.dataclass(frozen=True)
class RepeatedCertificate(Repeated):
    """A certificate that was repeated and holds."""

    certificate: Certificate

    def to_json(self) -> dict[str, Any]:
        """Return what was compared as a JSON object."""
        forced = self.certificate.facts.get("forced", [])
        return {"layout": self.certificate.layout, "forced": forced, **super().to_json()}


def certified_layer(layer: QuantizedLayer) -> dict[str, Any]:
    """Return what a certificate says of a layer that was read back."""
    return {
        "bits": layer.spec.bits,
        "group_size": layer.spec.group_size,
        "symmetric": layer.spec.symmetric,
        "shape": [layer.out_features, layer.in_features],
        "sha256": layer_digest(layer),
    }


def certify_checkpoint(
    folder: Path,
    layers: LayerSource,
    floats: FloatPart | None,
    *,
    base_fingerprint: str,
    facts: Mapping[str, Any] | None = None,
) -> Certificate:
    """Read a quantized checkpoint back from disk, compare it with what was to be written, and write its certificate.

    Args:
        folder: the checkpoint, complete.
        layers: what was to be written; codes, scales and zeros are compared bit for bit.
        floats: the float part that was to be written, compared bit for bit; None compares the layers alone.
        base_fingerprint: of the layers.
        facts: more to note, e.g. adapters that were taken by force.

    Returns:
        The certificate, as it stands in the folder.

    Raises:
        FormatError: a tensor read back differs from the one that was to be written.
    """
    checkpoint = Checkpoint.open(folder)
    if set(checkpoint.specs) != set(layers.specs):
        odd = sorted(set(checkpoint.specs) ^ set(layers.specs))[0]
        raise FormatError(f"{folder} and the layers that it was made from differ in which modules they have: {odd}.")
    modules: dict[str, Any] = {}
    for module in layers.specs:
        read, meant = checkpoint.read_layer(module), layers.read(module)
        refuse_difference(read, meant, f"{folder}: {module}")
        modules[module] = certified_layer(read)
    for name in () if floats is None else floats.headers:
        if not same_bits(checkpoint.read(name), floats.read(name)):  # type: ignore[union-attr]
            raise FormatError(f"{folder}: {name} was read back with other numbers than were written; check the disk.")
    computed = combine_digests({module: entry["sha256"] for module, entry in modules.items()})
    if not computed == base_fingerprint == checkpoint.grids.base_fingerprint:
        raise FormatError(
            f"{folder} was read back as the base {computed}, its config says {checkpoint.grids.base_fingerprint}, and "
            f"{base_fingerprint} was to be written; write it again."
        )
    needed = {"needs_adapter": True} if checkpoint.needs_adapter else {}
    return write_certificate(
        folder, checkpoint.grids.layout.name, base_fingerprint, modules, {**(facts or {}), **needed}
    )


def write_certificate(
    folder: Path, layout: str, base_fingerprint: str, modules: Mapping[str, Any], facts: Mapping[str, Any] | None = None
) -> Certificate:
    """Write the certificate of an export that was compared by other means, e.g. one of float weights.

    Args:
        folder: the export, complete.
        layout: its layout.
        base_fingerprint: of the quantized base that it comes from.
        modules: full module name -> what was compared; "sha256" is of the bytes that the folder holds.
        facts: more to note.

    Returns:
        The certificate, as it stands in the folder.
    """
    files = {name: FileEntry.of(path) for name, path in covered_files(folder, _NOT_COVERED)}
    certificate = Certificate(layout, base_fingerprint, dict(modules), files, environment(), dict(facts or {}))
    write_json(folder / CERTIFICATE_NAME, certificate.to_json())
    return certificate


def verify_certificate(
    folder: str | os.PathLike[str], *, left_out: Callable[[str], bool] | None = None
) -> RepeatedCertificate:
    """Repeat what the certificate of an export says: every file, every layer, the base.

    Args:
        folder: the export.
        left_out: tells whether the caller ignores a file of this name, which may then lie there.

    Returns:
        The certificate and what was compared.

    Raises:
        FormatError: there is no certificate, or a file, a layer or the base differs from it, or something lies in the
            folder that it does not name: a file of any suffix, a link, a device. Empty folders are fine.
    """
    folder = Path(folder)
    certificate = read_certificate(folder)
    extra = _refuse_other_files(folder, certificate, left_out)
    modules = certificate.modules
    digests: dict[str, str] = {}
    if certificate.layout not in WITHOUT_CODES:
        quantized = _open_quantized(folder, certificate.layout)
        digests = {module: layer_digest(layer) for module, layer in quantized.read_layers()}
        for module in sorted(set(digests) | set(modules)):
            if digests.get(module) != modules.get(module, {}).get("sha256"):
                raise FormatError(
                    f"{folder}: the codes, scales or zeros of {module!r:.120} are not those that were certified; "
                    "write the export again."
                )
        computed = combine_digests(digests)
        noted = quantized.noted_fingerprint
        if len({computed, certificate.base_fingerprint, noted}) > 1:
            raise FormatError(
                f"{folder} holds the base {computed}, its config says {noted!r:.80} and its "
                f"certificate {certificate.base_fingerprint!r:.80}; write the export again."
            )
    return RepeatedCertificate(len(certificate.files), len(modules), tuple(extra), digests, certificate)


def _refuse_other_files(
    folder: Path, certificate: Certificate, left_out: Callable[[str], bool] | None = None
) -> list[str]:
    """Refuse files that are not those that a certificate names, and return those that may lie beside them."""
    names = [name for name in entries_of(folder) if left_out is None or not left_out(name)]
    extra = refuse_extras(folder, names, certificate.files, _NOT_COVERED)
    refuse_changed_files(folder, names, certificate.files)
    return extra


def verify_run(run: RunDirectory) -> Repeated:
    """Compare the checkpoint of a run with the layers that the run keeps, and its files with its own certificate.

    Args:
        run: the run.

    Returns:
        What was compared; of files, the layers, each a file of its own.

    Raises:
        FormatError: a layer of the checkpoint is not the one that the run keeps, its config names another base, or
            something lies in its folder that its certificate does not name. Checkpoints of older versions have none.
    """
    checkpoint = Checkpoint.open(run.path)
    kept = {name: layer_digest(file.read_codes()) for name, file in run.layer_files().items()}
    packed = {module: layer_digest(layer) for module, layer in checkpoint.read_layers()}
    for module in sorted(set(kept) | set(packed)):
        if kept.get(module) != packed.get(module):
            raise FormatError(
                f"{checkpoint.folder}: {module!r:.120} is not the layer that {run.path} keeps; write the checkpoint "
                f"again with: cloq export {run.path}"
            )
    if checkpoint.noted_fingerprint != combine_digests(packed):
        raise FormatError(
            f"{checkpoint.folder} holds the base {combine_digests(packed)} and its config says "
            f"{checkpoint.noted_fingerprint!r:.80}; write the checkpoint again with: cloq export {run.path}"
        )
    beside: list[str] = []
    if (checkpoint.folder / CERTIFICATE_NAME).is_file():
        beside = _refuse_other_files(checkpoint.folder, read_certificate(checkpoint.folder))
    return Repeated(len(kept), len(packed), tuple(beside), packed)


class _Quantized(Protocol):
    """What a certificate repeats: the integers of a folder, and the base that the folder itself names."""

    @property
    def noted_fingerprint(self) -> str | None: ...

    def read_layers(self) -> Iterator[tuple[str, QuantizedLayer]]: ...


def _open_quantized(folder: Path, layout: str) -> _Quantized:
    if layout != ONNX:
        return Checkpoint.open(folder)
    require_packages()
    from cloq_export.formats.onnx.reading import OnnxExport

    return OnnxExport.open(folder)


def read_certificate(folder: Path) -> Certificate:
    """Return the certificate of an export without repeating it.

    Raises:
        FormatError: there is none, or it is damaged or of another version.
    """
    path = folder / CERTIFICATE_NAME
    if not path.is_file():
        raise FormatError(
            f"{folder} has no {CERTIFICATE_NAME}, so nothing says that it equals what was trained; write the export "
            "again with cloq export or cloq convert."
        )
    content = read_json(require_inside(folder, path))
    if content.get("format") != CERTIFICATE_FORMAT or content.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{path} says format {content.get('format')!r:.80}, version {content.get('format_version')!r:.80}; this "
            f"program reads {CERTIFICATE_FORMAT!r}, version {FORMAT_VERSION}. Update cloq_export."
        )
    for key, kind in (("layout", str), ("base_fingerprint", str), ("modules", dict), ("files", dict)):
        if not isinstance(content.get(key), kind):
            raise FormatError(f"{path}: {key} is {content.get(key)!r:.80}; the file is damaged.")
    for key in ("modules", "files"):
        for name, entry in content[key].items():
            if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
                raise FormatError(f"{path}: {key} has no hash for {name[:80]!r}; the file is damaged.")
    for name in content["files"]:
        inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        if not inside or not name.isprintable() or len(name) > LONGEST_NAME:
            raise FormatError(f"{path} names the file {name[:80]!r}; expected names inside the folder.")
    files = {name: FileEntry(entry.get("bytes"), entry["sha256"]) for name, entry in content["files"].items()}
    named = ("format", "format_version", "layout", "base_fingerprint", "modules", "files", "versions")
    facts = {key: value for key, value in content.items() if key not in named}
    versions = content.get("versions", {})
    return Certificate(content["layout"], content["base_fingerprint"], content["modules"], files, versions, facts)


def refuse_difference(read: QuantizedLayer, meant: QuantizedLayer, name: str) -> None:
    """Refuse a layer that is not bit for bit the one that was meant.

    Raises:
        FormatError: the grid, a code, a scale or a zero differs.
    """
    if read.spec != meant.spec:
        raise FormatError(f"{name} was read back with the grid {read.spec}; {meant.spec} was written.")
    for field in ("codes", "scales", "zeros"):
        if not same_bits(getattr(read, field), getattr(meant, field)):
            raise FormatError(f"{name}: the {field} read back differ from those written; check the disk, write again.")


def same_bits(read: torch.Tensor, meant: torch.Tensor) -> bool:
    """Return whether two tensors have one dtype, one shape and the same bytes (so that -0 is not 0, and NaN is NaN)."""
    if read.dtype != meant.dtype or read.shape != meant.shape:
        return False
    mine, theirs = (
        torch.frombuffer(view, dtype=torch.uint8) if len(view) else torch.empty(0, dtype=torch.uint8)
        for view in (tensor_bytes(read), tensor_bytes(meant))
    )
    return bool(torch.equal(mine, theirs))
