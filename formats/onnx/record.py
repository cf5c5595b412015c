"""What stands beside the graph: cloq_onnx.json, its writing and its reading without trust; SPEC.md section 4."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cloq_export.errors import CloqError, FormatError
from cloq_export.files.safe_json import read_json
from cloq_export.files.safe_paths import require_inside
from cloq_export.formats.onnx.blocks import EXACT, INT8, STYLES, TWO_BIT, BlockGrid, Style, TwoBit
from cloq_export.types import QuantSpec

RECORD_NAME = "cloq_onnx.json"
RECORD_FORMAT = "cloq-onnx"
FORMAT_VERSION = 1
GRAPH_NAME = "model.onnx"
DATA_NAME = "model.onnx.data"
ADAPTER_NAME = "adapter.onnx_adapter"

_LONGEST_NAME = 512
_LARGEST_SIDE = 1 << 31

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class GraphOptions:
    """How a graph is written.

    Args:
        style: how its linears compute: "matmulnbits" or "qdq".
        two_bit: how 2-bit codes are stored.
        opset: of the standard operators; None takes the least that works, at least that of the float graph.
        progress: called with (tensors written, tensors in all).
    """

    style: Style = "matmulnbits"
    two_bit: TwoBit = "exact"
    opset: int | None = None
    progress: Progress | None = None


@dataclasses.dataclass(frozen=True)
class ModuleRecord:
    """One quantized linear of a graph.

    Args:
        spec: its grid.
        shape: (out, in).
        blocks: how the grid lies in the graph.
    """

    spec: QuantSpec
    shape: tuple[int, int]
    blocks: BlockGrid


@dataclasses.dataclass(frozen=True)
class GraphRecord:
    """What cloq_onnx.json says.

    Args:
        base_fingerprint: of the quantized base.
        style: how the linears compute.
        two_bit: how 2-bit codes are stored.
        opset: of the standard operators.
        exporter: what made the float graph, e.g. "onnxruntime-genai 0.18.0".
        modules: full module name -> what lies in the graph.
        notes: what was done to the grids so that the operators take them, one sentence each.
        needs_adapter: the codes were made for what their adapter leaves of the weights; alone they say nothing.
    """

    base_fingerprint: str
    style: Style
    two_bit: TwoBit
    opset: int
    exporter: str
    modules: Mapping[str, ModuleRecord]
    notes: tuple[str, ...] = ()
    needs_adapter: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the content of cloq_onnx.json."""
        return {
            "format": RECORD_FORMAT,
            "format_version": FORMAT_VERSION,
            "base_fingerprint": self.base_fingerprint,
            "style": self.style,
            "two_bit": self.two_bit,
            "opset": self.opset,
            "exporter": self.exporter,
            "notes": list(self.notes),
            **({"needs_adapter": True} if self.needs_adapter else {}),
            "modules": {
                name: {
                    "bits": module.spec.bits,
                    "group_size": module.spec.group_size,
                    "symmetric": module.spec.symmetric,
                    "shape": list(module.shape),
                    "container_bits": module.blocks.bits,
                    "block_size": module.blocks.block_size,
                    "accuracy_level": module.blocks.accuracy_level,
                }
                for name, module in self.modules.items()
            },
        }


def is_onnx_export(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder holds an ONNX export that this package wrote, of whatever version."""
    try:
        return read_json(Path(folder) / RECORD_NAME).get("format") == RECORD_FORMAT
    except FormatError:
        return False


def read_record(folder: str | os.PathLike[str]) -> GraphRecord:
    """Read cloq_onnx.json without trusting it.

    Args:
        folder: the export.

    Raises:
        FormatError: it is missing, damaged, or of another version.
    """
    path = Path(folder) / RECORD_NAME
    content = read_json(require_inside(Path(folder), path))
    if content.get("format") != RECORD_FORMAT or content.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{path} says format {content.get('format')!r:.80}, version {content.get('format_version')!r:.80}; this "
            f"program reads {RECORD_FORMAT!r}, version {FORMAT_VERSION}. Update cloq_export."
        )
    fingerprint, exporter = (_text(path, content, key) for key in ("base_fingerprint", "exporter"))
    style, two_bit, opset = content.get("style"), content.get("two_bit"), content.get("opset", 0)
    notes, modules = content.get("notes"), content.get("modules")
    if style not in STYLES or two_bit not in TWO_BIT or not _is_count(opset):
        raise FormatError(
            f"{path} says style {style!r:.40}, two_bit {two_bit!r:.40}, opset {opset!r:.40}; the file is damaged."
        )
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise FormatError(f"{path}: notes are {notes!r:.80}; the file is damaged.")
    needs_adapter = content.get("needs_adapter", False)
    if not isinstance(needs_adapter, bool):
        raise FormatError(f"{path}: needs_adapter is {needs_adapter!r:.80}; the file is damaged.")
    if not isinstance(modules, dict) or not modules:
        raise FormatError(f"{path} names no quantized module; the file is damaged.")
    read = {name: _module(path, name, entry, style) for name, entry in modules.items()}
    return GraphRecord(fingerprint, style, two_bit, opset, exporter, read, tuple(notes), needs_adapter)


def _module(path: Path, name: str, entry: Any, style: Style) -> ModuleRecord:
    damaged = FormatError(f"{path}: the entry of {name[:80]!r} is {entry!r:.120}; the file is damaged.")
    if not name.isprintable() or len(name) > _LONGEST_NAME or not isinstance(entry, dict):
        raise damaged
    shape = entry.get("shape")
    numbers: list[Any] = [entry.get(key) for key in ("container_bits", "block_size", "accuracy_level")]
    if not isinstance(shape, list) or len(shape) != 2 or not all(_is_count(value) for value in (*shape, *numbers)):
        raise damaged
    bits, block_size, level = numbers
    if bits not in (2, 4, 8) or level not in (EXACT, INT8) or not isinstance(entry.get("symmetric"), bool):
        raise damaged
    try:
        spec = QuantSpec(entry["bits"], entry["group_size"], entry["symmetric"])
        spec.group_count(shape[1])
    except (CloqError, KeyError, TypeError):
        raise damaged from None
    # Blocks lie within a group; only those of a row-long one may reach beyond the last input.
    crossing = spec.group_count(shape[1]) > 1 and spec.columns_per_group(shape[1]) % block_size
    if spec.bits > bits or crossing:
        raise damaged
    return ModuleRecord(
        spec, (shape[0], shape[1]), BlockGrid(style, bits, block_size, -(-shape[1] // block_size), level)
    )


def _text(path: Path, content: Mapping[str, Any], key: str) -> str:
    value = content.get(key)
    if not isinstance(value, str) or not value or not value.isprintable() or len(value) > _LONGEST_NAME:
        raise FormatError(f"{path}: {key} is {value!r:.80}; the file is damaged.")
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < _LARGEST_SIDE
