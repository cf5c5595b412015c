"""The float linears of a decoder graph, and which module each of them computes."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from cloq_export.errors import FormatError
from cloq_export.files.tensor_writer import tensor_bytes
from cloq_export.types import QuantizedLayer, QuantSpec


class UnmatchedLinearError(FormatError):
    """The float graph does not compute a module by a MatMul of its own."""


@dataclasses.dataclass(frozen=True)
class GraphLayers:
    """The quantized layers that go into a graph, read one at a time.

    Args:
        specs: full module name -> its grid.
        shapes: full module name -> (out, in).
        read: gives one layer.
    """

    specs: Mapping[str, QuantSpec]
    shapes: Mapping[str, tuple[int, int]]
    read: Callable[[str], QuantizedLayer]


@dataclasses.dataclass(frozen=True)
class FloatLinear:
    """A MatMul with a constant weight: (in, out), or (out, in) behind a Transpose."""

    node: ir.Node
    weight: ir.Value
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Return (out, in)."""
        assert self.weight.const_value is not None
        rows, columns = (int(size) for size in self.weight.const_value.shape)
        return (rows, columns) if self.transposed else (columns, rows)

    def digest(self) -> str:
        """Return the hash of the weight as (out, in) float32."""
        tensor = self.weight.const_value
        assert tensor is not None
        digest = _digest(np.ascontiguousarray(tensor.numpy() if self.transposed else tensor.numpy().T).data)
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()
        return digest


def match_linears(graph: ir.Graph, layers: GraphLayers) -> dict[str, FloatLinear]:
    """Return the MatMul that computes each module, found by the bytes of its weight."""
    wanted = set(layers.shapes.values())
    found: dict[str, list[FloatLinear]] = collections.defaultdict(list)
    for linear in _float_linears(graph):
        if linear.shape in wanted:
            found[linear.digest()].append(linear)
    modules: dict[str, list[str]] = collections.defaultdict(list)
    for module in layers.specs:
        modules[_digest(tensor_bytes(layers.read(module).dequantize()))].append(module)
    matched: dict[str, FloatLinear] = {}
    for digest, names in modules.items():
        linears = found.get(digest, [])
        for module in names:
            # Equal weights at several places are told apart by name.
            own = linears if len(names) == len(linears) == 1 else [each for each in linears if _named(each, module)]
            if len(own) != 1:
                what = "no MatMul" if not own else f"{len(own)} MatMuls"
                raise UnmatchedLinearError(
                    f"the float graph has {what} with the weight of {module}; it computes that module in another way."
                )
            matched[module] = own[0]
    return {module: matched[module] for module in layers.specs}


def _float_linears(graph: ir.Graph) -> Iterator[FloatLinear]:
    for node in graph:
        if node.op_type != "MatMul" or node.domain:
            continue
        weight, transposed = node.inputs[1], False
        producer = weight.producer() if weight is not None else None
        if producer is not None and producer.op_type == "Transpose" and list(_permutation(producer)) == [1, 0]:
            weight, transposed = producer.inputs[0], True
        if weight is None or weight.is_graph_input() or weight.const_value is None:
            continue
        tensor = weight.const_value
        if len(tensor.shape) == 2 and tensor.dtype == ir.DataType.FLOAT:
            yield FloatLinear(node, weight, transposed)


def _permutation(node: ir.Node) -> Sequence[int]:
    attribute = node.attributes.get("perm")
    return [1, 0] if attribute is None else attribute.as_ints()


def _named(linear: FloatLinear, module: str) -> bool:
    """Return whether a node's name and a module's agree in their numbers and the module's last word."""
    name = linear.node.name or ""
    same_numbers = re.findall(r"\d+", name) == re.findall(r"\d+", module)
    return same_numbers and module.rpartition(".")[2] in re.split(r"[/.]", name)


def _digest(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()
