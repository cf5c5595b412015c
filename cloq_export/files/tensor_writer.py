"""Safetensors files that are either whole or absent, written one tensor at a time, always with the same bytes."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cloq_export.errors import ShapeError
from cloq_export.files.atomic import partial_path, sync_folder, translate_os_errors, write_all

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Code of safetensors -> dtype."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file whole or not at all, one tensor in memory at a time.

    Args:
        path: the file; its folder exists.
        tensors: name -> tensor of any shape, on any device.
        metadata: text to keep in the header.

    Raises:
        ShapeError: a tensor has a dtype that safetensors cannot hold.
        RunDirectoryError: the disk is full, or the folder cannot be written; nothing is left behind.
    """
    with TensorFileWriter(path, {name: tensor_header(name, tensors[name]) for name in tensors}, metadata) as writer:
        for name in writer.names:
            writer.write(name, tensors[name])


def tensor_header(name: str, tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    """Return (dtype code of safetensors, shape) of a tensor.

    Raises:
        ShapeError: safetensors cannot hold its dtype.
    """
    code = _CODES.get(tensor.dtype)
    if code is None:
        raise ShapeError(f"tensor {name!r} is {tensor.dtype}, which safetensors cannot hold; convert it first.")
    return code, tuple(tensor.shape)


def header_bytes(header: tuple[str, tuple[int, ...]]) -> int:
    """Return how many bytes a tensor with this header takes."""
    return math.prod(header[1]) * DTYPES[header[0]].itemsize


class TensorFileWriter:
    """A safetensors file whose tensors come one at a time and in any order, whole in the end or not there at all.

    The library's own writer wants all tensors at once and orders the metadata by hash, so two runs differ; here
    everything is sorted: tensors by descending element size (so that each is aligned), then by name.

    Args:
        path: the file; its folder exists.
        headers: name -> (dtype code of safetensors, shape) of every tensor that will come.
        metadata: text to keep in the header.

    Raises:
        RunDirectoryError: the disk is full, or the folder cannot be written; nothing is left behind.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        headers: Mapping[str, tuple[str, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.names = sorted(headers, key=lambda name: (-DTYPES[headers[name][0]].itemsize, name))
        self._headers = headers
        self._missing = set(headers)
        content: dict[str, Any] = {}
        if metadata:
            content["__metadata__"] = {key: metadata[key] for key in sorted(metadata)}
        offset = 0
        for name in self.names:
            code, shape = headers[name]
            end = offset + header_bytes(headers[name])
            content[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        text += b" " * (-len(text) % 8)
        self._offsets = {name: 8 + len(text) + content[name]["data_offsets"][0] for name in self.names}
        self._partial = partial_path(self.path)
        with translate_os_errors(self.path):
            self._descriptor = os.open(
                self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666
            )
        try:
            with translate_os_errors(self.path):
                write_all(self._descriptor, memoryview(len(text).to_bytes(8, "little") + text))
        except BaseException:
            self.discard()
            raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor into its place.

        Raises:
            ShapeError: it is not the tensor that was announced.
            RunDirectoryError: the disk is full.
        """
        header = tensor_header(name, tensor)
        if name not in self._missing or self._headers[name] != header:
            raise ShapeError(f"tensor {name!r} {header} was not announced for {self.path}, or comes twice.")
        with translate_os_errors(self.path):
            os.lseek(self._descriptor, self._offsets[name], os.SEEK_SET)
            write_all(self._descriptor, tensor_bytes(tensor))
        self._missing.discard(name)

    def close(self) -> None:
        """Give the file its name.

        Raises:
            ShapeError: an announced tensor did not come.
            RunDirectoryError: the disk is full.
        """
        if self._missing:
            raise ShapeError(f"tensor {min(self._missing)!r} of {self.path} was announced and did not come.")
        with translate_os_errors(self.path):
            os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
            os.replace(self._partial, self.path)
            sync_folder(self.path.parent)

    def discard(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(OSError):
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1
        with contextlib.suppress(OSError):
            os.unlink(self._partial)

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            try:
                self.close()
            except BaseException:
                self.discard()
                raise
        else:
            self.discard()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor, row by row, little-endian as on every machine that torch is built for.

    Args:
        tensor: any shape, dtype and device; a contiguous tensor on the CPU is not copied.

    Returns:
        A view of one dimension, one byte an item.
    """
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
