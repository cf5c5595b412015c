"""Integers read back out of a graph, trusting nothing about it."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from google.protobuf.message import DecodeError

from cloq_export.errors import FormatError
from cloq_export.files.safe_json import read_json
from cloq_export.files.safe_paths import require_inside
from cloq_export.formats.onnx.blocks import unpack_blocks
from cloq_export.formats.onnx.graph import FINGERPRINT_KEY, PARTS, part_headers
from cloq_export.formats.onnx.opset import MICROSOFT
from cloq_export.formats.onnx.record import DATA_NAME, GRAPH_NAME, GraphRecord, ModuleRecord, read_record
from cloq_export.types import QuantizedLayer, QuantSpec

CONFIG_NAME = "config.json"
LAYOUT = "onnx"

# A graph without its weights is far smaller; protobuf itself ends at 2 GiB.
_LARGEST_GRAPH = 512 * 1024 * 1024
_QUANTIZED = frozenset({"MatMulNBits", "DequantizeLinear"})


@dataclasses.dataclass(frozen=True)
class OnnxExport:
    """An ONNX export whose record and graph are read and compared, and whose weights are not read yet.

    Args:
        folder: the folder.
        record: content of cloq_onnx.json.
        config: content of config.json.
        tensors: name -> initializer, external ones without their bytes.
    """

    folder: Path
    record: GraphRecord
    config: Mapping[str, Any]
    tensors: Mapping[str, onnx.TensorProto]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> OnnxExport:
        """Open an export.

        Args:
            path: the folder.

        Raises:
            FormatError: a file is missing or damaged, or graph and record disagree.
        """
        folder = Path(path)
        record = read_record(folder)
        config = read_json(require_inside(folder, folder / CONFIG_NAME))
        model = _read_graph(require_inside(folder, folder / GRAPH_NAME))
        noted = {entry.key: entry.value for entry in model.metadata_props}.get(FINGERPRINT_KEY)
        if noted != record.base_fingerprint:
            raise FormatError(
                f"{folder / GRAPH_NAME} says its base is {noted!r:.80}, its record {record.base_fingerprint}; the "
                "graph was edited or comes from another export: write it again."
            )
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        _check_nodes(model.graph, record, tensors, str(folder / GRAPH_NAME))
        return cls(folder, record, config, tensors)

    @property
    def specs(self) -> dict[str, QuantSpec]:
        """Return module -> grid."""
        return {name: module.spec for name, module in self.record.modules.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return module -> (out, in)."""
        return {name: module.shape for name, module in self.record.modules.items()}

    @property
    def noted_fingerprint(self) -> str:
        """Return the base fingerprint that record and graph carry, whatever the weights are."""
        return self.record.base_fingerprint

    @property
    def layout_name(self) -> str:
        """Return the name of the layout."""
        return LAYOUT

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of the quantized base."""
        return self.record.base_fingerprint

    @property
    def needs_adapter(self) -> bool:
        """Return whether the codes were made for what their adapter leaves of the weights."""
        return self.record.needs_adapter

    def read_layer(self, module: str) -> QuantizedLayer:
        """Return the integers of one module.

        Raises:
            FormatError: the weights are damaged, or hold what no export of ours does.
        """
        entry = self.record.modules[module]
        headers = part_headers(entry.blocks, entry.shape)
        codes, zeros = (
            torch.frombuffer(bytearray(self._bytes(f"{module}.{part}")), dtype=torch.uint8)
            for part in ("codes", "zeros")
        )
        scales = torch.frombuffer(bytearray(self._bytes(f"{module}.scales")), dtype=torch.float32)
        if entry.blocks.style == "matmulnbits":
            codes, zeros = codes.view(headers["codes"][1]), zeros.view(headers["zeros"][1])
        return unpack_blocks(
            (codes, scales.view(headers["scales"][1]), zeros),
            entry.blocks,
            entry.spec,
            entry.shape,
            name=f"{self.folder / GRAPH_NAME}: {module}",
        )

    def read_layers(self) -> Iterator[tuple[str, QuantizedLayer]]:
        """Yield (module, layer), one in memory at a time.

        Raises:
            FormatError: as `read_layer`.
        """
        for module in self.record.modules:
            yield module, self.read_layer(module)

    def float_matrices(self, rows: int, columns: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the graph's float32 matrices of one shape, those that it holds transposed turned back.

        Args:
            rows: of a matrix.
            columns: likewise.

        Yields:
            (name, (rows, columns) float32), one in memory at a time.

        Raises:
            FormatError: the weights are damaged.
        """
        for name, tensor in self.tensors.items():
            shape = tuple(tensor.dims)
            if tensor.data_type == onnx.TensorProto.FLOAT and shape in ((rows, columns), (columns, rows)):
                matrix = torch.frombuffer(bytearray(self._bytes(name)), dtype=torch.float32).view(shape)
                yield name, matrix if shape == (rows, columns) else matrix.T

    def _bytes(self, name: str) -> bytes:
        tensor = self.tensors[name]
        size = _stored_bytes(tensor)
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            data = tensor.raw_data
        else:
            place = {entry.key: entry.value for entry in tensor.external_data}
            offset, length = (_whole(place.get(key)) for key in ("offset", "length"))
            if place.get("location") != DATA_NAME or offset is None or length != size:
                raise FormatError(f"{self.folder / GRAPH_NAME}: {name} lies at {place!r:.160}; the graph was edited.")
            try:
                with open(require_inside(self.folder, self.folder / DATA_NAME), "rb") as file:
                    file.seek(offset)
                    data = file.read(size)
            except OSError as error:
                raise FormatError(
                    f"{self.folder / DATA_NAME} cannot be read: {error.strerror or error}; write the export again."
                ) from None
        if len(data) != size:
            raise FormatError(
                f"{self.folder / DATA_NAME} ends before {name}; the file is truncated: fetch or write it again."
            )
        return data


def _read_graph(path: Path) -> onnx.ModelProto:
    try:
        if path.stat().st_size > _LARGEST_GRAPH:
            raise FormatError(f"{path} is larger than {_LARGEST_GRAPH >> 20} MiB; that is no graph of ours.")
        return onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}; check the path.") from None
    except (DecodeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise FormatError(f"{path} is truncated or no ONNX graph ({reason}); fetch or write it again.") from None


def _check_nodes(graph: onnx.GraphProto, record: GraphRecord, tensors: Mapping[str, Any], source: str) -> None:
    """Refuse a graph that computes a module in another way than its record says."""
    users: dict[str, list[onnx.NodeProto]] = collections.defaultdict(list)
    quantized = 0
    for node in graph.node:
        for name in node.input:
            users[name].append(node)
        quantized += node.op_type in _QUANTIZED
    if quantized != len(record.modules):
        raise FormatError(
            f"{source} has {quantized} quantized linears, its record {len(record.modules)}; the graph was edited: "
            "write the export again."
        )
    # The default of a graph input can be replaced from outside.
    replaceable = {value.name for value in graph.input}
    for module, entry in record.modules.items():
        names = [f"{module}.{part}" for part in PARTS]
        headers = part_headers(entry.blocks, entry.shape)
        for name, part in zip(names, PARTS, strict=True):
            tensor = tensors.get(name)
            dtype, shape = headers[part]
            if tensor is None or tensor.data_type != int(dtype) or tuple(tensor.dims) != shape or name in replaceable:
                raise FormatError(
                    f"{source} lacks {name} as {shape} {dtype.name}; the graph was edited: write the export again."
                )
        nodes = users[names[0]]
        if len(nodes) != 1 or not _computes(nodes[0], entry, names) or any(users[name] != nodes for name in names):
            raise FormatError(
                f"{source} does not compute {module} as its record says; the graph was edited: write the export again."
            )


def _computes(node: onnx.NodeProto, entry: ModuleRecord, names: list[str]) -> bool:
    blocks = entry.blocks
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    if blocks.style == "qdq":
        expected = {"axis": 0, "block_size": blocks.block_size}
        return node.op_type == "DequantizeLinear" and list(node.input) == names and attributes == expected
    expected = {
        "K": entry.shape[1],
        "N": entry.shape[0],
        "bits": blocks.bits,
        "block_size": blocks.block_size,
        "accuracy_level": blocks.accuracy_level,
    }
    return (
        (node.domain, node.op_type) == (MICROSOFT, "MatMulNBits")
        and list(node.input)[1:] == names
        and attributes == expected
    )


def _stored_bytes(tensor: onnx.TensorProto) -> int:
    """Return how many bytes an initializer of ours takes."""
    count = 1
    for size in tensor.dims:
        count *= size
    bits = {
        onnx.TensorProto.FLOAT: 32,
        onnx.TensorProto.UINT8: 8,
        onnx.TensorProto.UINT4: 4,
        onnx.TensorProto.UINT2: 2,
    }[tensor.data_type]
    return -(-count * bits // 8)


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 20 else None
