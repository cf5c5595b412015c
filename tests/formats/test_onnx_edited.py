"""Graphs and records that were edited or damaged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper
from onnx_graphs import NAMES, layers_of, write_export

from cloq_export.errors import FormatError
from cloq_export.files.atomic import write_json
from cloq_export.formats.onnx.opset import check_graph
from cloq_export.formats.onnx.reading import OnnxExport
from cloq_export.formats.onnx.record import DATA_NAME, GRAPH_NAME, RECORD_NAME, read_record
from cloq_export.types import QuantSpec


def edit(folder: Path, change: Any) -> None:
    model = onnx.load(str(folder / GRAPH_NAME), load_external_data=False)
    change(model)
    (folder / GRAPH_NAME).write_bytes(model.SerializeToString())


def first_quantized(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == "MatMulNBits")


def set_attribute(name: str, value: int) -> Any:
    def change(model: onnx.ModelProto) -> None:
        next(entry for entry in first_quantized(model).attribute if entry.name == name).i = value

    return change


def add_index(model: onnx.ModelProto) -> None:
    first_quantized(model).input.append(f"{NAMES[0]}.zeros")


def drop_zeros(model: onnx.ModelProto) -> None:
    del first_quantized(model).input[3]


def swap_weights(model: onnx.ModelProto) -> None:
    first, second = [node for node in model.graph.node if node.op_type == "MatMulNBits"][:2]
    first.input[1], second.input[1] = second.input[1], first.input[1]


def remove_one(model: onnx.ModelProto) -> None:
    model.graph.node.remove(first_quantized(model))


def open_weights(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info(f"{NAMES[0]}.codes", TensorProto.UINT8, None))


def forget_base(model: onnx.ModelProto) -> None:
    del model.metadata_props[:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_attribute("accuracy_level", 4), "does not compute model.layers.0.up_proj as its record says"),
        (set_attribute("block_size", 16), "does not compute model.layers.0.up_proj as its record says"),
        (add_index, "does not compute model.layers.0.up_proj as its record says"),
        (drop_zeros, "does not compute model.layers.0.up_proj as its record says"),
        (swap_weights, "does not compute model.layers.0.up_proj as its record says"),
        (remove_one, "has 2 quantized linears, its record 3; the graph was edited"),
        (open_weights, "lacks model.layers.0.up_proj.codes as"),
        (forget_base, "says its base is None, its record sha256:"),
    ],
)
def test_an_edited_graph_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    out = write_export(tmp_path, layers_of(QuantSpec(4, 32)))
    edit(out, change)
    with pytest.raises(FormatError, match=message):
        OnnxExport.open(out)


def test_weights_that_lie_elsewhere_or_end_early_are_refused(tmp_path: Path) -> None:
    out = write_export(tmp_path, layers_of(QuantSpec(4, 32)))
    whole = (out / DATA_NAME).read_bytes()
    (out / DATA_NAME).write_bytes(whole[:1000])
    with pytest.raises(FormatError, match="the file is truncated"):
        dict(OnnxExport.open(out).read_layers())
    (out / DATA_NAME).write_bytes(whole)

    def lead_out(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "../secret"

    edit(out, lead_out)
    with pytest.raises(FormatError, match="the graph was edited"):
        dict(OnnxExport.open(out).read_layers())
    (out / GRAPH_NAME).write_bytes(b"\xff" * 64)
    with pytest.raises(FormatError, match="is truncated or no ONNX graph"):
        OnnxExport.open(out)


def test_a_record_says_where_codes_need_their_adapter(tmp_path: Path) -> None:
    out = write_export(tmp_path, layers_of(QuantSpec(4, 32)))
    assert not OnnxExport.open(out).needs_adapter
    record = dataclasses.replace(read_record(out), needs_adapter=True)
    write_json(out / RECORD_NAME, record.to_json())
    assert read_record(out) == record
    assert OnnxExport.open(out).needs_adapter


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format_version", 2),
        ("style", "other"),
        ("opset", "22"),
        ("notes", "text"),
        ("modules", {}),
        ("modules", {"m": {"bits": 4}}),
        ("base_fingerprint", "a\nb"),
        ("needs_adapter", "yes"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    out = write_export(tmp_path, layers_of(QuantSpec(4, 32)))
    content = json.loads((out / RECORD_NAME).read_text())
    write_json(out / RECORD_NAME, {**content, key: value})
    with pytest.raises(FormatError, match=r"damaged|no quantized module|Update cloq_export"):
        read_record(out)


@pytest.mark.parametrize(
    ("key", "value"), [("bits", 5), ("shape", [64]), ("container_bits", 2), ("block_size", 0), ("block_size", 64)]
)
def test_a_damaged_module_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    out = write_export(tmp_path, layers_of(QuantSpec(4, 32)))
    content = json.loads((out / RECORD_NAME).read_text())
    content["modules"][NAMES[0]][key] = value
    write_json(out / RECORD_NAME, content)
    with pytest.raises(FormatError, match=r"the entry of 'model\.layers\.0\.up_proj' is .*; the file is damaged"):
        read_record(out)


def test_the_checker_of_onnx_refuses_a_broken_graph(tmp_path: Path) -> None:
    out = write_export(tmp_path, layers_of(QuantSpec(4, 32)))
    check_graph(out)

    def dangle(model: onnx.ModelProto) -> None:
        next(node for node in model.graph.node if node.op_type == "Tanh").input[0] = "nowhere"

    edit(out, dangle)
    with pytest.raises(FormatError, match="onnx's checker refuses"):
        check_graph(out)
    assert not [path for path in out.iterdir() if path.name.endswith(".checked")]
