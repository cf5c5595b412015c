"""Surgery on a decoder graph: its float linears become block-quantized ones that carry a run's integers; see SPEC.md.

All graph work is onnx_ir's, all checking onnx's own checker's. Weights are read and written one at a time.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from cloq_export.errors import UsageError
from cloq_export.formats.onnx.blocks import INT8, BlockGrid, Style, TwoBit, choose_blocks, pack_blocks
from cloq_export.formats.onnx.matching import FloatLinear, GraphLayers, match_linears
from cloq_export.formats.onnx.opset import CODE_TYPES, MICROSOFT, check_graph, needed_opset, set_opset
from cloq_export.formats.onnx.record import DATA_NAME, GRAPH_NAME, GraphOptions, GraphRecord, ModuleRecord, Progress

FINGERPRINT_KEY = "cloq_base_fingerprint"
PARTS = ("codes", "scales", "zeros")


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
        raise UsageError("`two_bit=compact` was given, but no layer has 2 bits; leave it out.")
    return modules, tuple(_notes(modules.values(), style))


def quantize_graph(
    source: Path, folder: Path, layers: GraphLayers, options: GraphOptions, *, base_fingerprint: str, exporter: str
) -> GraphRecord:
    """Write a decoder graph whose linears carry the integers of layers, and inputs for LoRA pairs.

    The float graph must hold Q itself, the dequantized weights: each module is found by the bytes of its weight, so no
    convention about names can put the integers of one layer into the place of another.

    Args:
        source: the float graph.
        folder: where model.onnx and model.onnx.data are written.
        layers: the quantized layers.
        options: how the graph is written.
        base_fingerprint: of the layers, noted in the graph.
        exporter: what made the float graph.

    Returns:
        What was written; the record itself is not written.

    Raises:
        ShapeError: a grid fits no legal block.
        UsageError: the opset lacks a type, or an operator of the float graph is another one in it.
        UnmatchedLinearError: a module is no MatMul of the float graph.
        FormatError: the result does not pass onnx's checker.
    """
    style, two_bit = options.style, options.two_bit
    modules, notes = plan_blocks(layers, style=style, two_bit=two_bit)
    model = ir.load(source)
    chosen = set_opset(model, needed_opset(modules, style), options.opset)
    linears = match_linears(model.graph, layers)
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
    _save(model, folder, options.progress)
    check_graph(folder)
    return GraphRecord(base_fingerprint, style, two_bit, chosen, exporter, modules, notes)


def lora_names(module: str) -> tuple[str, str]:
    """Return the names of the graph inputs that take a module's A (in, rank) and its scaled B (rank, out)."""
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


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


def _replace(
    graph: ir.Graph,
    module: str,
    record: ModuleRecord,
    linear: FloatLinear,
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
        dtype = CODE_TYPES[grid.bits][0]
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
