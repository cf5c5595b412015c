"""Fingerprints: which quantized base an adapter belongs to, and which files a run was made from."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cloq_export.errors import FormatError, SourceError
from cloq_export.files.tensor_writer import tensor_bytes
from cloq_export.types import QuantizedLayer

_BUFFER = 4 * 1024 * 1024


def base_fingerprint(layers: Iterable[tuple[str, QuantizedLayer]]) -> str:
    """Return the fingerprint of a quantized base: a hash over every layer's name, grid, codes, scales and zeros.

    Layers are read one at a time and may come in any order. The canonical form is hashed, not a layout, so the same
    base has the same fingerprint however it is packed.

    Args:
        layers: (module name, layer) pairs, each name once.

    Returns:
        "sha256:" and 64 hexadecimal digits.

    Raises:
        FormatError: a module comes twice.
    """
    digests: dict[str, str] = {}
    for module, layer in layers:
        if module in digests:
            raise FormatError(f"the module {module} comes twice; a base holds each layer once.")
        digests[module] = layer_digest(layer)
    return combine_digests(digests)


def layer_digest(layer: QuantizedLayer) -> str:
    """Return the hexadecimal SHA-256 of one layer's grid, shape, codes, scales and zeros.

    Args:
        layer: the layer; codes (out, in) uint8, scales (out, groups) float16, zeros (out, groups) uint8 are hashed in
            this order, row by row, scales as little-endian bytes.

    Returns:
        64 hexadecimal digits.
    """
    spec = layer.spec
    head = {
        "bits": spec.bits,
        "group_size": spec.group_size,
        "symmetric": spec.symmetric,
        "out": layer.out_features,
        "in": layer.in_features,
    }
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode("ascii"))
    for tensor in (layer.codes, layer.scales, layer.zeros):
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def combine_digests(digests: Mapping[str, str]) -> str:
    """Return the base fingerprint from the digests of its layers, in sorted order of module names.

    Args:
        digests: module name -> `layer_digest` of the layer.

    Returns:
        "sha256:" and 64 hexadecimal digits.
    """
    total = hashlib.sha256()
    for module in sorted(digests):
        total.update(f"{module}\0{digests[module]}\n".encode())
    return f"sha256:{total.hexdigest()}"


@dataclasses.dataclass(frozen=True)
class FileDigest:
    """What a fingerprint knows of a file: its name from the folder on, its size and the SHA-256 of its bytes."""

    name: str
    size: int
    sha256: str


def file_digests(paths: Iterable[str | os.PathLike[str]], *, home: Path | None = None) -> list[FileDigest]:
    """Return the digests of files, which are read in pieces.

    Args:
        paths: the files.
        home: the folder that their names are taken from; None takes the last part of each.

    Raises:
        SourceError: a file is missing or cannot be read.
    """
    digests = []
    buffer = bytearray(_BUFFER)
    view = memoryview(buffer)
    for path in map(Path, paths):
        digest = hashlib.sha256()
        size = 0
        try:
            with open(path, "rb", buffering=0) as file:
                while count := file.readinto(view):
                    digest.update(view[:count])
                    size += count
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror or error}; check the path.") from error
        name = path.name if home is None else path.relative_to(home).as_posix()
        digests.append(FileDigest(name, size, digest.hexdigest()))
    return digests


def file_fingerprint(digests: Iterable[FileDigest]) -> str:
    """Return a hash over the names and the content of files, independent of their order and of their folder.

    Args:
        digests: of the files.

    Returns:
        "sha256:" and 64 hexadecimal digits.
    """
    total = hashlib.sha256()
    for name, size, hexdigest in sorted((each.name, each.size, each.sha256) for each in digests):
        total.update(f"{name}\0{size}\0{hexdigest}\n".encode())
    return f"sha256:{total.hexdigest()}"


def added_files(digests: Sequence[FileDigest], fingerprint: str) -> tuple[str, ...]:
    """Return the names of the one or two files without which others would have a fingerprint; empty if none are.

    Args:
        digests: of all files.
        fingerprint: that is looked for.
    """
    for count in (1, 2):
        for left_out in itertools.combinations(digests, count):
            if file_fingerprint(each for each in digests if each not in left_out) == fingerprint:
                return tuple(each.name for each in left_out)
    return ()
