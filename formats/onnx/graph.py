"""Surgery on a decoder graph: its float linears become block-quantized ones that carry a run's integers; see SPEC.md.

All graph work is onnx_ir's, all checking onnx's own checker's. Weights are read and written one at a time.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from cloq_export.errors import FormatError, UsageError
from cloq_export.files.tensor_writer import tensor_bytes
from cloq_export.formats.onnx.blocks import INT8, BlockGrid, Style, TwoBit, choose_blocks, pack_blocks
from cloq_export.formats.onnx.record import DATA_NAME, GRAPH_NAME, GraphRecord, ModuleRecord
from cloq_export.types import QuantizedLayer, QuantSpec

MICROSOFT = "com.microsoft"
FINGERPRINT_KEY = "cloq_base_fingerprint"
PARTS = ("codes", "scales", "zeros")

# Type of a code in a DequantizeLinear -> the first opset that knows it there with blocks.
_CODE_TYPES = {2: (ir.DataType.UINT2, 25), 4: (ir.DataType.UINT4, 21), 8: (ir.DataType.UINT8, 21)}
# Opset -> the first version of the file format that may import it, where that is more than exporters write by default.
_IR_VERSIONS = ((25, 13), (24, 12), (23, 11), (21, 10))
# ONNX Runtime registers these in the standard domain, where onnx's checker does not know them.
_RUNTIME_OPERATORS = frozenset({"SimplifiedLayerNormalization"})

Progress = Callable[[int, int], None]


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
class _FloatLinear:
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
        found = _digest(np.ascontiguousarray(tensor.numpy() if self.transposed else tensor.numpy().T).data)
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()
        return found


def plan_blocks(
    layers: GraphLayers, *, style: Style, two_bit: TwoBit
) -> tuple[dict[str, ModuleRecord], tuple[str, ...]]:
    """Return how every layer will lie in a graph, and what that changes, in words.

    Args:
        layers: the layers; none is read.
        style: of the graph.
        two_bit: how 2-bit codes are stored.

    Returns:
        (module -> record, notes).

    Raises:
        ShapeError: a grid fits no legal block.
        UsageError: compact storage was asked for, and there is nothing to store in it.
    """
    modules = {
        name: ModuleRecord(
            spec,
            layers.shapes[name],
            choose_blocks(spec, layers.shapes[name][1], style=style, two_bit=two_bit, name=name),
        )
        for name, spec in layers.specs.items()
    }
    if two_bit == "compact" and not any(spec.bits == 2 for spec in layers.specs.values()):
        raise UsageError("--two-bit compact was given, but no layer has 2 bits; leave it out.")
    return modules, tuple(_notes(modules.values(), style))


def needed_opset(modules: Mapping[str, ModuleRecord], style: Style) -> int:
    """Return the least opset that has the types of a graph's linears; 1 if only ONNX Runtime's own are used."""
    if style == "matmulnbits":
        return 1
    return max(_CODE_TYPES[module.blocks.bits][1] for module in modules.values())


def quantize_graph(
    source: Path,
    folder: Path,
    layers: GraphLayers,
    *,
    style: Style,
    two_bit: TwoBit,
    opset: int | None,
    base_fingerprint: str,
    exporter: str,
    progress: Progress | None = None,
) -> GraphRecord:
    """Write a decoder graph whose linears carry the integers of layers, and inputs for LoRA pairs.

    The float graph must hold Q itself, the dequantized weights: each module is found by the bytes of its weight, so no
    convention about names can put the integers of one layer into the place of another.

    Args:
        source: the float graph.
        folder: where model.onnx and model.onnx.data are written.
        layers: the quantized layers.
        style: "matmulnbits" or "qdq".
        two_bit: how 2-bit codes are stored.
        opset: of the standard operators; None takes the least that works, at least that of the float graph.
        base_fingerprint: of the layers, noted in the graph.
        exporter: what made the float graph.
        progress: called with (tensors written, tensors in all).

    Returns:
        What was written; the record itself is not written.

    Raises:
        ShapeError: a grid fits no legal block.
        UsageError: the opset lacks a type, or an operator of the float graph is another one in it.
        UnmatchedLinearError: a module is no MatMul of the float graph.
        FormatError: the result does not pass onnx's checker.
    """
    modules, notes = plan_blocks(layers, style=style, two_bit=two_bit)
    model = ir.load(source)
    chosen = _set_opset(model, needed_opset(modules, style), opset)
    linears = _match(model.graph, layers)
    model.opset_imports.setdefault(MICROSOFT, 1)
    last: dict[str, tuple[torch.Tensor, ...]] = {}

    def packed(module: str) -> tuple[torch.Tensor, ...]:
        if module not in last:
            last.clear()
            last[module] = pack_blocks(layers.read(module), modules[module].blocks)
        return last[module]

    for module, linear in linears.items():
        _replace(model.graph, module, modules[module], linear, packed)
    model.metadata_props[FINGERPRINT_KEY] = base_fingerprint
    model.graph.sort()
    _save(model, folder, progress)
    check_graph(folder)
    return GraphRecord(base_fingerprint, style, two_bit, chosen, exporter, modules, notes)


def lora_names(module: str) -> tuple[str, str]:
    """Return the names of the graph inputs that take a module's A (in, rank) and its scaled B (rank, out)."""
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def check_graph(folder: Path) -> None:
    """Let onnx's checker read a graph from disk.

    Operators that ONNX Runtime registers in the standard domain are looked at as its own, which the checker leaves
    alone; the loader of ONNX Runtime knows them.

    Raises:
        FormatError: the checker refuses it.
    """
    model = onnx.load(str(folder / GRAPH_NAME), load_external_data=False)
    for node in model.graph.node:
        if not node.domain and node.op_type in _RUNTIME_OPERATORS:
            node.domain = MICROSOFT
    # Beside the original, because the checker looks for the external data there.
    place = folder / f".{GRAPH_NAME}.checked"
    try:
        onnx.save(model, str(place))
        onnx.checker.check_model(str(place))
    except (onnx.checker.ValidationError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise FormatError(f"onnx's checker refuses {folder / GRAPH_NAME}: {reason}") from None
    finally:
        place.unlink(missing_ok=True)


def _notes(modules: Any, style: Style) -> Iterator[str]:
    """Yield what the grids had to undergo, one sentence for each kind, with the number of modules."""
    kinds: collections.Counter[str] = collections.Counter()
    for module in modules:
        spec, blocks = module.spec, module.blocks
        if blocks.bits > spec.bits:
            kinds[f"{spec.bits}-bit codes lie in {blocks.bits}-bit containers, which the operator has"] += 1
        span = spec.columns_per_group(module.shape[1])
        if span != blocks.block_size:
            whole = "one group per output channel" if spec.group_count(module.shape[1]) == 1 else f"groups of {span}"
            kinds[f"{whole} in blocks of {blocks.block_size} inputs, scales and zeros repeated"] += 1
        if blocks.blocks * blocks.block_size != module.shape[1]:
            kinds[f"{module.shape[1]} inputs are filled up to {blocks.blocks * blocks.block_size} by zeros"] += 1
        if not blocks.fused:
            kinds[
                f"groups of {span} fit no block that ONNX Runtime computes from codes with: it makes the float weight "
                "at every call, which is slow"
            ] += 1
        if blocks.accuracy_level == INT8:
            kinds[
                "2-bit codes stay 2-bit (compact), computed with activations rounded to int8 in blocks "
                f"(accuracy_level {INT8}): fast, and about 0.5% off in each layer"
            ] += 1
        elif spec.bits == 8 and style == "matmulnbits":
            kinds["8-bit codes with float32 activations (accuracy_level 1) are exact and slow on a CPU"] += 1
        elif style == "matmulnbits":
            kinds["activations stay float32 (accuracy_level 1): exact, not the fastest"] += 1
    for text, count in kinds.items():
        yield f"{text} ({count} modules)"
    if style == "qdq":
        yield (
            "ONNX Runtime rounds the activations of a qdq graph to int8 unless the session option "
            "session.qdq_matmulnbits_accuracy_level is 1; genai_config.json sets it, other loaders must"
        )


def _set_opset(model: ir.Model, needed: int, wanted: int | None) -> int:
    """Let the graph import an opset in which its operators mean the same, and return it."""
    present = model.opset_imports.get("", 1)
    chosen = max(needed, present) if wanted is None else wanted
    newest = onnx.defs.onnx_opset_version()
    if chosen < needed:
        raise UsageError(
            f"opset {chosen} has no DequantizeLinear for these codes; {needed} is the least: choose --opset {needed} "
            "or more, or --style matmulnbits."
        )
    if not 1 <= chosen <= newest:
        raise UsageError(f"opset {chosen} is unknown to the installed onnx; it knows 1 to {newest}.")
    if chosen != present:
        used = {node.op_type for node in model.graph.all_nodes() if not node.domain} - _RUNTIME_OPERATORS
        for operator in sorted(used):
            if not _means_the_same(operator, present, chosen):
                raise UsageError(
                    f"{operator} is another operator in opset {chosen} than in {present}, which the float graph was "
                    f"exported with; choose --opset {present}, or leave it out."
                )
        model.opset_imports[""] = chosen
        least = next((version for opset, version in _IR_VERSIONS if chosen >= opset), 0)
        model.ir_version = max(model.ir_version, least)
    return chosen


def _means_the_same(operator: str, first: int, second: int) -> bool:
    """Return whether an operator of two opsets differs at most by what types it takes, and takes more in the later."""
    try:
        older, newer = (onnx.defs.get_schema(operator, opset) for opset in sorted((first, second)))
    except onnx.defs.SchemaError:
        return False
    if older.since_version == newer.since_version:
        return True
    if second < first:
        return False  # the graph may use a type that only the later one takes

    def signature(schema: Any) -> Any:
        return (
            [(item.name, item.option, item.type_str) for item in (*schema.inputs, *schema.outputs)],
            sorted(
                (name, attribute.type, attribute.required, attribute.default_value.SerializeToString())
                for name, attribute in schema.attributes.items()
            ),
        )

    types = [{item.type_param_str: set(item.allowed_type_strs) for item in s.type_constraints} for s in (older, newer)]
    wider = types[0].keys() == types[1].keys() and all(types[0][key] <= types[1][key] for key in types[0])
    return wider and signature(older) == signature(newer)


def _match(graph: ir.Graph, layers: GraphLayers) -> dict[str, _FloatLinear]:
    """Return the MatMul that computes each module, found by the bytes of its weight."""
    wanted = set(layers.shapes.values())
    found: dict[str, list[_FloatLinear]] = collections.defaultdict(list)
    for linear in _float_linears(graph):
        if linear.shape in wanted:
            found[linear.digest()].append(linear)
    modules: dict[str, list[str]] = collections.defaultdict(list)
    for module in layers.specs:
        modules[_digest(tensor_bytes(layers.read(module).dequantize()))].append(module)
    matched: dict[str, _FloatLinear] = {}
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


def _float_linears(graph: ir.Graph) -> Iterator[_FloatLinear]:
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
            yield _FloatLinear(node, weight, transposed)


def _permutation(node: ir.Node) -> Sequence[int]:
    attribute = node.attributes.get("perm")
    return [1, 0] if attribute is None else attribute.as_ints()


def _named(linear: _FloatLinear, module: str) -> bool:
    """Return whether a node's name and a module's agree in their numbers and the module's last word."""
    name = linear.node.name or ""
    same_numbers = re.findall(r"\d+", name) == re.findall(r"\d+", module)
    return same_numbers and module.rpartition(".")[2] in re.split(r"[/.]", name)


def _replace(
    graph: ir.Graph,
    module: str,
    record: ModuleRecord,
    linear: _FloatLinear,
    packed: Callable[[str], tuple[torch.Tensor, ...]],
) -> None:
    """Put a quantized linear with inputs for a LoRA pair into the place of a float one."""
    node, grid = linear.node, record.blocks
    inputs, old = node.inputs[0], node.outputs[0]
    parts = [_part(graph, module, record, index, packed) for index in range(len(PARTS))]
    if grid.style == "matmulnbits":
        new = [
            ir.node(
                "MatMulNBits",
                [inputs, *parts],
                {
                    "K": record.shape[1],
                    "N": record.shape[0],
                    "bits": grid.bits,
                    "block_size": grid.block_size,
                    "accuracy_level": grid.accuracy_level,
                },
                domain=MICROSOFT,
                name=f"{module}/MatMulNBits",
            )
        ]
    else:
        dequantize = ir.node(
            "DequantizeLinear",
            parts,
            {"axis": 0, "block_size": grid.block_size},
            name=f"{module}/DequantizeLinear",
        )
        dequantize.outputs[0].name = f"{module}.weight"
        new = [dequantize, ir.node("MatMul", [inputs, dequantize.outputs[0]], name=f"{module}/MatMul")]
    new[-1].outputs[0].name = f"{module}.base"
    lora_a, lora_b = (
        _lora_input(graph, name, shape)
        for name, shape in zip(lora_names(module), ((record.shape[1], None), (None, record.shape[0])), strict=True)
    )
    down = ir.node("MatMul", [inputs, lora_a], name=f"{module}/lora_A")
    down.outputs[0].name = f"{module}.lora_A"
    up = ir.node("MatMul", [down.outputs[0], lora_b], name=f"{module}/lora_B")
    up.outputs[0].name = f"{module}.lora_B"
    add = ir.node("Add", [new[-1].outputs[0], up.outputs[0]], name=f"{module}/Add")
    graph.insert_before(node, [*new, down, up, add])
    result = add.outputs[0]
    name, result.type, result.shape = old.name, old.type, old.shape
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    turned = node.inputs[1].producer() if node.inputs[1] is not None else None
    graph.remove(node, safe=True)
    result.name = name
    if turned is not None and not turned.outputs[0].uses():
        graph.remove(turned, safe=True)
    if not linear.weight.uses() and linear.weight.name in graph.initializers:
        del graph.initializers[linear.weight.name]


def _part(
    graph: ir.Graph,
    module: str,
    record: ModuleRecord,
    index: int,
    packed: Callable[[str], tuple[torch.Tensor, ...]],
) -> ir.Value:
    """Return an initializer whose numbers are made when it is written."""
    dtype, shape = part_headers(record.blocks, record.shape)[PARTS[index]]
    name = f"{module}.{PARTS[index]}"

    def make() -> ir.TensorProtocol:
        array = packed(module)[index].numpy()
        if dtype in (ir.DataType.UINT4, ir.DataType.UINT2):
            return ir.PackedTensor(array, dtype, shape=ir.Shape(shape), name=name)
        return ir.Tensor(array.reshape(shape), dtype, name=name)

    tensor = ir.LazyTensor(make, dtype, ir.Shape(shape), name=name)
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def part_headers(grid: BlockGrid, shape: tuple[int, int]) -> dict[str, tuple[ir.DataType, tuple[int, ...]]]:
    """Return part -> (type, shape) of a layer's initializers.

    Args:
        grid: how the layer is stored.
        shape: its (out, in).
    """
    out_features, in_features = shape
    if grid.style == "qdq":
        dtype = _CODE_TYPES[grid.bits][0]
        blocks = (grid.blocks, out_features)
        return {
            "codes": (dtype, (in_features, out_features)),
            "scales": (ir.DataType.FLOAT, blocks),
            "zeros": (dtype, blocks),
        }
    return {
        "codes": (ir.DataType.UINT8, (out_features, grid.blocks, grid.block_size * grid.bits // 8)),
        "scales": (ir.DataType.FLOAT, (out_features, grid.blocks)),
        "zeros": (ir.DataType.UINT8, (out_features, -(-grid.blocks * grid.bits // 8))),
    }


def _lora_input(graph: ir.Graph, name: str, shape: tuple[int | None, int | None]) -> ir.Value:
    """Return a graph input whose default is a matrix of rank 0."""
    empty = np.zeros([size or 0 for size in shape], dtype=np.float32)
    # Every module's rank has a name of its own: adapters may mix ranks.
    symbol = f"rank of {name.rsplit('.lora_', 1)[0]}"
    value = ir.Value(
        name=name,
        shape=ir.Shape([symbol if size is None else size for size in shape]),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.Tensor(empty, name=name),
    )
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value


def _save(model: ir.Model, folder: Path, progress: Progress | None) -> None:
    def report(_tensor: Any, info: Any) -> None:
        if progress is not None:
            progress(info.index + 1, info.total)

    ir.save(model, folder / GRAPH_NAME, external_data=DATA_NAME, size_threshold_bytes=1024, callback=report)


def _digest(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()
