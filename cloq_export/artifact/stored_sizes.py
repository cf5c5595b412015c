"""What a checkpoint and its adapters take on disk, from headers alone."""

from __future__ import annotations

import collections
import dataclasses
import math
import os
from collections.abc import Iterable
from pathlib import Path

from cloq_export.artifact.adapters import AdapterShelf
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.files.safe_tensors import read_safetensors_header
from cloq_export.formats.peft.codec import WEIGHTS_NAME as ADAPTER_WEIGHTS_NAME

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


@dataclasses.dataclass(frozen=True)
class StoredSizes:
    """What a checkpoint and one of its adapters take on disk.

    Args:
        quantized_weights: number of weights of the quantized linears.
        code_bytes: of their codes.
        scale_bytes: of their scales.
        zero_bytes: of their zeros.
        index_bytes: of an index such as `g_idx`, which carries no information in these layouts.
        float_part_bytes: of tensors that are not quantized.
        checkpoint_bytes: of all of these.
        adapter_bytes: of A and B; None without an adapter.
        float_bytes: of the same model unquantized, in the dtype of its float part.
        bits_per_weight: codes, scales and zeros over the quantized weights.
        bits_per_weight_with_adapter: A and B added, over the same weights; None without an adapter.
    """

    quantized_weights: int
    code_bytes: int
    scale_bytes: int
    zero_bytes: int
    index_bytes: int
    float_part_bytes: int
    checkpoint_bytes: int
    adapter_bytes: int | None
    float_bytes: int
    bits_per_weight: float
    bits_per_weight_with_adapter: float | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, adapter: Path | None = None) -> StoredSizes:
        """Return the sizes of an opened checkpoint.

        Args:
            checkpoint: the checkpoint.
            adapter: folder of an adapter; None counts none.

        Raises:
            FormatError: a file is missing or damaged.
        """
        sizes: collections.Counter[str] = collections.Counter()
        float_codes: collections.Counter[str] = collections.Counter()
        floats, roles = set(checkpoint.float_names()), checkpoint.grids.layout.roles
        for name, header in checkpoint.headers.items():
            size = bytes_of([header])
            if name in floats:
                float_codes[header[0]] += size
            else:
                sizes[roles[name.rpartition(".")[2]]] += size
        weights = sum(math.prod(checkpoint.features(module)) for module in checkpoint.specs)
        coded, floating = sizes["codes"] + sizes["scales"] + sizes["zeros"], float_codes.total()
        float_bits = _DTYPE_BITS.get(float_codes.most_common(1)[0][0], 8) if float_codes else 16
        of_adapter = None if adapter is None else adapter_bytes(adapter)
        return cls(
            quantized_weights=weights,
            code_bytes=sizes["codes"],
            scale_bytes=sizes["scales"],
            zero_bytes=sizes["zeros"],
            index_bytes=sizes["index"],
            float_part_bytes=floating,
            checkpoint_bytes=coded + sizes["index"] + floating,
            adapter_bytes=of_adapter,
            float_bytes=floating + weights * float_bits // 8,
            bits_per_weight=8 * coded / weights,
            bits_per_weight_with_adapter=None if of_adapter is None else 8 * (coded + of_adapter) / weights,
        )


def stored_sizes(path: str | os.PathLike[str], adapter: str | os.PathLike[str] | None = None) -> StoredSizes:
    """Return what a checkpoint and one of its adapters take on disk.

    Args:
        path: a run directory or a checkpoint folder.
        adapter: an adapter folder, or the name of an adapter that lies in the folder; None counts none.

    Raises:
        FormatError: a file is missing or damaged.
        RunDirectoryError: the run has no such adapter.
    """
    return StoredSizes.of(Checkpoint.open(path), None if adapter is None else AdapterShelf.of(path).find(adapter))


def adapter_bytes(folder: Path) -> int:
    """Return what A and B of an adapter folder take.

    Raises:
        FormatError: the file is missing or damaged.
    """
    return bytes_of(read_safetensors_header(folder / ADAPTER_WEIGHTS_NAME)[0].values())


def bytes_of(headers: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    """Return what tensors take, from their (dtype code of safetensors, shape)."""
    # An unknown dtype is one byte or less (the eight-bit floats).
    return sum(math.prod(shape) * _DTYPE_BITS.get(code, 8) // 8 for code, shape in headers)
