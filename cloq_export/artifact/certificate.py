"""The equality certificate: what an export holds is what the run made, read back from disk and compared bit for bit."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.checkpoint_writer import FloatPart, LayerSource
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.errors import FormatError
from cloq_export.files.atomic import tensor_bytes, write_json
from cloq_export.files.fingerprint import combine_digests, layer_digest
from cloq_export.files.safe_json import read_json
from cloq_export.files.safe_paths import require_inside
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
# Of a file in an export; every file system allows as much.
_LONGEST_NAME = 255
# What the hub and its client lay beside the files of a model; no engine reads any of it.
_HUB_ATTRIBUTES = ".gitattributes"
_HUB_ATTRIBUTE_LINE = re.compile(r"(#.*|\S+( (filter|diff|merge)=lfs| -text)+)?")
_HUB_CACHE = re.compile(r"\.cache/huggingface/(\.gitignore|CACHEDIR\.TAG|download/.+\.(metadata|lock))")
_HUB_CACHE_BYTES = 4096
_BUFFER = 4 * 1024 * 1024


def certify_checkpoint(
    folder: Path,
    layers: LayerSource,
    floats: FloatPart | None,
    *,
    base_fingerprint: str,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Read a quantized checkpoint back from disk, compare it with what was to be written, and write its certificate.

    Args:
        folder: the checkpoint, complete.
        layers: what was to be written; codes, scales and zeros are compared bit for bit.
        floats: the float part that was to be written, compared bit for bit; None compares the layers alone.
        base_fingerprint: of the layers.
        facts: more to note, e.g. adapters that were taken by force.

    Returns:
        dict: the certificate, as it stands in the folder.

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
        modules[module] = {
            "bits": read.spec.bits,
            "group_size": read.spec.group_size,
            "symmetric": read.spec.symmetric,
            "shape": [read.out_features, read.in_features],
            "sha256": layer_digest(read),
        }
    for name in () if floats is None else floats.headers:
        if not same_bits(checkpoint.read(name), floats.read(name)):  # type: ignore[union-attr]
            raise FormatError(f"{folder}: {name} was read back with other numbers than were written; check the disk.")
    found = combine_digests({module: entry["sha256"] for module, entry in modules.items()})
    if not found == base_fingerprint == checkpoint.grids.base_fingerprint:
        raise FormatError(
            f"{folder} was read back as the base {found}, its config says {checkpoint.grids.base_fingerprint}, and "
            f"{base_fingerprint} was to be written; write it again."
        )
    return write_certificate(folder, checkpoint.grids.layout.name, base_fingerprint, modules, facts)


def write_certificate(
    folder: Path, layout: str, base_fingerprint: str, modules: Mapping[str, Any], facts: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write the certificate of an export that was compared by other means, e.g. one of float weights.

    Args:
        folder: the export, complete.
        layout: its layout.
        base_fingerprint: of the quantized base that it comes from.
        modules: full module name -> what was compared; "sha256" is of the bytes that the folder holds.
        facts: more to note.

    Returns:
        dict: the certificate, as it stands in the folder.
    """
    certificate = {
        "format": CERTIFICATE_FORMAT,
        "format_version": FORMAT_VERSION,
        "layout": layout,
        "base_fingerprint": base_fingerprint,
        "modules": dict(modules),
        "files": {name: _file_entry(path) for name, path in _covered(folder)},
        "versions": environment(),
        **(facts or {}),
    }
    write_json(folder / CERTIFICATE_NAME, certificate)
    return certificate


def verify_certificate(
    folder: str | os.PathLike[str], *, left_out: Callable[[str], bool] | None = None
) -> dict[str, Any]:
    """Repeat what the certificate of an export says: every file, every layer, the base.

    Args:
        folder: the export.
        left_out: tells of a name in the folder whether whoever asks will leave it out, so that it may lie there.

    Returns:
        dict: "certificate" (its content), "files" (how many were compared), "modules", "not_covered" (files of the hub
        that lie beside them; the card may be edited and is not counted), "digests" (module -> `layer_digest`).

    Raises:
        FormatError: there is no certificate, or a file, a layer or the base differs from it, or something lies in the
            folder that it does not name: a file of whatever suffix, a link, a device. Empty folders are fine.
    """
    folder = Path(folder)
    certificate = read_certificate(folder)
    found = [name for name in _entries(folder) if left_out is None or not left_out(name)]
    extra = _refuse_extras(folder, found, certificate["files"])
    for name, noted in sorted(certificate["files"].items()):
        path = folder / name
        if name not in found:
            twins = sorted(other for other in found if _folded(other) == _folded(name))
            seen = f" (there is {twins[0]!a:.80}, which is another name)" if twins else ""
            raise FormatError(
                f"{folder} lacks {name!r:.80}, which its certificate names{seen}; fetch or write the export again."
            )
        _refuse_no_file(folder, path)
        measured = _file_entry(path)
        if measured != noted:
            raise FormatError(
                f"{path} is not the file that was certified (sha256 {measured['sha256'][:12]}…, "
                f"{measured['bytes']} bytes; certified {noted.get('sha256')!r:.12}…, {noted.get('bytes')!r:.20} "
                "bytes); fetch or write the export again."
            )
    modules = certificate["modules"]
    digests: dict[str, str] = {}
    if certificate["layout"] not in WITHOUT_CODES:
        quantized = _open_quantized(folder, certificate["layout"])
        digests = {module: layer_digest(layer) for module, layer in quantized.read_layers()}
        for module in sorted(set(digests) | set(modules)):
            if digests.get(module) != modules.get(module, {}).get("sha256"):
                raise FormatError(
                    f"{folder}: the codes, scales or zeros of {module!r:.120} are not those that were certified; "
                    "write the export again."
                )
        computed = combine_digests(digests)
        noted = quantized.noted_fingerprint
        if len({computed, certificate["base_fingerprint"], noted}) > 1:
            raise FormatError(
                f"{folder} holds the base {computed}, its config says {noted!r:.80} and its "
                f"certificate {certificate['base_fingerprint']!r:.80}; write the export again."
            )
    return {
        "certificate": certificate,
        "files": len(certificate["files"]),
        "modules": len(modules),
        "not_covered": extra,
        "digests": digests,
    }


def verify_run(run: RunDirectory) -> dict[str, Any]:
    """Compare the checkpoint of a run with the layers that the run keeps; a run has no certificate of its own.

    Args:
        run: the run.

    Returns:
        dict: "files" (layers that were read, each a file of its own), "modules", "not_covered" (none), "digests"
        (module -> `layer_digest`).

    Raises:
        FormatError: a layer of the checkpoint is not the one that the run keeps, or its config names another base.
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
    return {"files": len(kept), "modules": len(packed), "not_covered": [], "digests": packed}


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


def read_certificate(folder: Path) -> dict[str, Any]:
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
    certificate = read_json(require_inside(folder, path))
    if certificate.get("format") != CERTIFICATE_FORMAT or certificate.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{path} says format {certificate.get('format')!r:.80}, version "
            f"{certificate.get('format_version')!r:.80}; this program reads {CERTIFICATE_FORMAT!r}, version "
            f"{FORMAT_VERSION}. Update cloq_export."
        )
    for key, kind in (("layout", str), ("base_fingerprint", str), ("modules", dict), ("files", dict)):
        if not isinstance(certificate.get(key), kind):
            raise FormatError(f"{path}: {key} is {certificate.get(key)!r:.80}; the file is damaged.")
    for key in ("modules", "files"):
        for name, entry in certificate[key].items():
            if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
                raise FormatError(f"{path}: {key} has no hash for {name[:80]!r}; the file is damaged.")
    for name in certificate["files"]:
        inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        if not inside or not name.isprintable() or len(name) > _LONGEST_NAME:
            raise FormatError(f"{path} names the file {name[:80]!r}; expected names inside the folder.")
    return certificate


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


def _covered(folder: Path) -> Iterator[tuple[str, Path]]:
    for name in _entries(folder):
        if name not in _NOT_COVERED:
            _refuse_no_file(folder, folder / name)
            yield name, folder / name


def _entries(folder: Path) -> list[str]:
    """Return the names of all that lies in a folder but folders themselves, hidden files and links included, sorted.

    A link to a folder is an entry and is not entered: what it leads to lies elsewhere.
    """

    def refuse(error: OSError) -> None:
        raise FormatError(f"{error.filename} cannot be read: {error.strerror or error}; check the path.") from error

    found = []
    for place, folders, files in os.walk(folder, onerror=refuse):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += [Path(place, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)


def _refuse_extras(folder: Path, found: Iterable[str], certified: Mapping[str, Any]) -> list[str]:
    """Refuse what a certificate does not speak of, and return what may lie there nevertheless, the card left out."""
    allowed = []
    for name in found:
        if name in certified or name == CERTIFICATE_NAME:
            continue
        path = folder / name
        if name in _NOT_COVERED or _is_of_the_hub(name, path):
            _refuse_no_file(folder, path)
            allowed += [name] if name not in _NOT_COVERED else []
            continue
        kind = _kind_of(path)
        twin = next((other for other in sorted(certified) if _folded(other) == _folded(name)), None)
        like = f", which names {twin!a:.80}, another file," if twin is not None else ""
        # An odd name is shown with its signs escaped, since it may look like one that belongs here.
        shown = path if name.isascii() and name.isprintable() else f"{folder}: {name!a:.120}"
        raise FormatError(
            f"{shown} is {kind} in the export and not in its certificate{like or ','} and engines may read it; remove "
            "it, or write the export again."
        )
    return allowed


def _refuse_no_file(folder: Path, path: Path) -> None:
    """Refuse what is no file of the folder itself; the hub's own snapshots hold links into the blobs beside them."""
    kind = _kind_of(path)
    if kind == "a file":
        return
    if kind == "a link to a file":
        require_inside(folder, path)
        blobs = [parent.parent / "blobs" for parent in folder.resolve().parents if parent.name == "snapshots"]
        if any(path.resolve().parent == blob for blob in blobs):
            return
    raise FormatError(f"{path} is {kind}, and what it leads to may change; put the file itself into the folder.")


def _kind_of(path: Path) -> str:
    try:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            mode = path.stat().st_mode
            return "a link to a folder" if stat.S_ISDIR(mode) else "a link to a file"
    except (OSError, RuntimeError):
        return "a link that leads nowhere" if path.is_symlink() else "unreadable"
    return "a file" if stat.S_ISREG(mode) else "a device, pipe or socket"


def _is_of_the_hub(name: str, path: Path) -> bool:
    """Return whether a file is one of those that the hub or its client writes, by its name and what it holds."""
    try:
        if name != _HUB_ATTRIBUTES and not _HUB_CACHE.fullmatch(name):
            return False
        if not path.is_file() or path.stat().st_size > _HUB_CACHE_BYTES:
            return False
        lines = path.read_text("utf-8").splitlines() if name == _HUB_ATTRIBUTES else []
    except (OSError, UnicodeDecodeError):
        return False
    return all(_HUB_ATTRIBUTE_LINE.fullmatch(line.strip()) for line in lines)


def _folded(name: str) -> str:
    """Return a name as file systems that tell neither case nor normal forms apart see it."""
    return unicodedata.normalize("NFKC", name).casefold()


def _file_entry(path: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "rb", buffering=0) as file:
            while piece := file.read(_BUFFER):
                digest.update(piece)
                size += len(piece)
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}; check the path.") from error
    return {"bytes": size, "sha256": digest.hexdigest()}
