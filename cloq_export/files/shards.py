"""Many tensors in weight files of bounded size, named as transformers names them, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from cloq_export.errors import ShapeError
from cloq_export.files.atomic import write_json
from cloq_export.files.tensor_writer import TensorFileWriter, header_bytes

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


class ShardWriter:
    """The weight files of a folder, planned from the headers of all tensors and then filled in any order.

    Args:
        folder: where the files go; a folder that is not read before it is complete.
        bundles: tensors that belong into one file, as name -> (dtype code of safetensors, shape); the files take the
            bundles in this order.
        max_bytes: largest file; a bundle that is larger has a file of its own.

    Raises:
        ShapeError: a tensor is announced twice.
        RunDirectoryError: the disk is full, or the folder cannot be written.
    """

    def __init__(
        self, folder: Path, bundles: Iterable[Mapping[str, tuple[str, tuple[int, ...]]]], max_bytes: int
    ) -> None:
        shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
        filled = 0
        for bundle in bundles:
            size = sum(header_bytes(header) for header in bundle.values())
            if shards[-1] and filled + size > max_bytes:
                shards.append({})
                filled = 0
            twice = sorted(name for name in bundle if any(name in shard for shard in shards))
            if twice:
                raise ShapeError(f"tensor {twice[0]!r} is announced twice.")
            shards[-1] |= bundle
            filled += size
        self._folder = folder
        self._total_bytes = sum(header_bytes(header) for shard in shards for header in shard.values())
        self._file_of: dict[str, str] = {}
        self._waiting: dict[str, int] = {}
        self._headers: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
        self._open: dict[str, TensorFileWriter] = {}
        for number, shard in enumerate(shards, start=1):
            name = WEIGHTS_NAME if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            self._file_of |= dict.fromkeys(shard, name)
            self._headers[name] = shard
            self._waiting[name] = len(shard)

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put tensors into their files; a file gets its name with its last tensor.

        Raises:
            ShapeError: a tensor was not announced as it is, or comes twice.
            RunDirectoryError: the disk is full.
        """
        for name, tensor in tensors.items():
            file = self._file_of.get(name)
            if file is None or not self._waiting[file]:
                raise ShapeError(f"tensor {name!r} was not announced, or comes twice.")
            if file not in self._open:
                self._open[file] = TensorFileWriter(self._folder / file, self._headers[file], {"format": "pt"})
            self._open[file].write(name, tensor)
            self._waiting[file] -= 1
            if not self._waiting[file]:
                self._open.pop(file).close()

    def close(self) -> None:
        """Write the index if there are several files.

        Raises:
            ShapeError: an announced tensor did not come.
            RunDirectoryError: the disk is full.
        """
        lacking = [file for file, count in self._waiting.items() if count]
        if lacking:
            raise ShapeError(f"{lacking[0]} lacks {self._waiting[lacking[0]]} tensors that were announced.")
        if len(self._waiting) > 1:
            metadata = {"total_size": self._total_bytes}
            write_json(self._folder / INDEX_NAME, {"metadata": metadata, "weight_map": self._file_of})

    def discard(self) -> None:
        """Close what is open and leave no unfinished file behind."""
        for writer in self._open.values():
            writer.discard()
        self._open.clear()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.discard()
