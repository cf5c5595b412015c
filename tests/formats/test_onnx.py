"""ONNX graphs: golden blocks, every grid through ONNX Runtime, adapters that switch, edited graphs refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import cloq_export.formats.onnx
from cloq_export.errors import BindingError, FormatError, ShapeError, UsageError
from cloq_export.files.atomic import write_json
from cloq_export.files.fingerprint import base_fingerprint
from cloq_export.formats.onnx.adapter import (
    ADAPTER_NAME,
    load_pairs,
    model_version,
    read_onnx_adapter,
    require_fit,
    same_pairs,
    write_onnx_adapter,
)
from cloq_export.formats.onnx.blocks import BlockGrid, choose_blocks, pack_blocks, unpack_blocks
from cloq_export.formats.onnx.graph import lora_names, quantize_graph
from cloq_export.formats.onnx.matching import GraphLayers, UnmatchedLinearError
from cloq_export.formats.onnx.opset import check_graph
from cloq_export.formats.onnx.reading import OnnxExport
from cloq_export.formats.onnx.record import DATA_NAME, GRAPH_NAME, RECORD_NAME, read_record
from cloq_export.types import LoraPair, QuantizedLayer, QuantSpec

FOLDER = Path(cloq_export.formats.onnx.__file__).parent
GOLDEN = json.loads((FOLDER / "golden" / "blocks.json").read_text())
NAMES = ("model.layers.0.up_proj", "model.layers.1.up_proj", "model.layers.1.down_proj")


def random_layer(spec: QuantSpec, out_features: int, in_features: int, seed: int) -> QuantizedLayer:
    generator = torch.Generator().manual_seed(seed)
    groups = spec.group_count(in_features)
    return QuantizedLayer(
        torch.randint(2**spec.bits, (out_features, in_features), dtype=torch.uint8, generator=generator),
        # Weights of one size at all widths.
        ((torch.rand(out_features, groups, generator=generator) * 0.2 + 0.04) / 2**spec.bits).half(),
        torch.randint(2**spec.bits, (out_features, groups), dtype=torch.uint8, generator=generator),
        spec,
    )


def golden_layer(case: dict[str, Any]) -> QuantizedLayer:
    layer = case["layer"]
    return QuantizedLayer(
        torch.tensor(layer["codes"], dtype=torch.uint8),
        torch.tensor(layer["scales"], dtype=torch.float16),
        torch.tensor(layer["zeros"], dtype=torch.uint8),
        QuantSpec(case["bits"], case["group_size"]),
    )


def test_the_golden_file_is_what_its_script_makes() -> None:
    spec = importlib.util.spec_from_file_location("generate", FOLDER / "golden" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert {name: generate.make_case(*case) for name, case in generate.CASES.items()} == GOLDEN


@pytest.mark.parametrize("name", list(GOLDEN))
def test_blocks_are_the_golden_bytes_and_come_back(name: str) -> None:
    case = GOLDEN[name]
    layer = golden_layer(case)
    grid = choose_blocks(
        layer.spec, layer.in_features, style=case["style"], two_bit="compact" if "compact" in name else "exact"
    )
    assert (grid.bits, grid.block_size) == (case["container_bits"], case["block_size"])
    parts = dict(zip(("codes", "scales", "zeros"), pack_blocks(layer, grid), strict=True))
    assert {part: tensor.numpy().tobytes().hex() for part, tensor in parts.items()} == case["stored"]
    read = unpack_blocks(*parts.values(), grid, layer.spec, (layer.out_features, layer.in_features))
    assert read.spec == layer.spec
    for field in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(read, field), getattr(layer, field))


@pytest.mark.parametrize("style", ["matmulnbits", "qdq"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 16, 32, 48, 512, 1536])
def test_every_grid_comes_back(style: Any, bits: int, group_size: int) -> None:
    layer = random_layer(QuantSpec(bits, group_size), 5, 1536, 0)
    grid = choose_blocks(layer.spec, 1536, style=style)
    read = unpack_blocks(*pack_blocks(layer, grid), grid, layer.spec, (5, 1536))
    assert torch.equal(read.codes, layer.codes)
    assert torch.equal(read.scales, layer.scales)
    assert torch.equal(read.zeros, layer.zeros)


def test_a_row_long_group_takes_the_block_that_is_stored_in_fewest_bytes() -> None:
    def chosen(in_features: int) -> tuple[int, int]:
        grid = choose_blocks(QuantSpec(4, -1), in_features, style="matmulnbits")
        return grid.block_size, grid.blocks

    assert [chosen(width) for width in (576, 1536, 1000, 24)] == [(64, 9), (256, 6), (256, 4), (32, 1)]


@pytest.mark.parametrize(
    ("bits", "group_size", "style", "two_bit", "message"),
    [
        (4, 24, "matmulnbits", "exact", r"groups of 24 inputs, .* 16, 32, 64, 128 or 256 fits; .*--style qdq"),
        (2, 16, "matmulnbits", "compact", r"groups of 16 inputs, .* 32, 64 or 128 fits; .*--two-bit exact"),
        (2, 24, "matmulnbits", "compact", r"--two-bit exact --style qdq"),
        (2, 16, "qdq", "compact", r"--two-bit exact, or"),
    ],
)
def test_groups_without_a_block_are_refused(bits: int, group_size: int, style: Any, two_bit: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        choose_blocks(QuantSpec(bits, group_size), 192, style=style, two_bit=two_bit)


def test_blocks_that_were_tampered_with_are_refused() -> None:
    layer = random_layer(QuantSpec(3, 64), 4, 128, 0)
    grid = choose_blocks(QuantSpec(3, -1), 104, style="matmulnbits")
    short = random_layer(QuantSpec(3, -1), 4, 104, 0)
    codes, scales, zeros = pack_blocks(short, grid)
    codes[0, -1, -1] = 1
    with pytest.raises(FormatError, match="the padding behind the last input is not zero"):
        unpack_blocks(codes, scales, zeros, grid, short.spec, (4, 104))
    narrow = BlockGrid("matmulnbits", 4, 32, 4, 1)
    codes, scales, zeros = pack_blocks(layer, narrow)
    for change in (1.5, 1 + 2**-12):
        other = scales.clone()
        other[1, 1] *= change
        with pytest.raises(FormatError, match="differ in scale or zero, or a scale is no float16 number"):
            unpack_blocks(codes, other, zeros, narrow, layer.spec, (4, 128))
    codes[0, 0, 0] |= 8
    with pytest.raises(FormatError, match=r"the largest code is .*; 3 bits hold"):
        unpack_blocks(codes, scales, zeros, narrow, layer.spec, (4, 128))


# A toy graph: y = down(tanh(up1(tanh(up0(x))))), its weights Q itself, as an exporter writes them.
def layers_of(spec: QuantSpec, width: int = 96, *, seed: int = 0) -> dict[str, QuantizedLayer]:
    shapes = ((64, width), (width, 64), (48, width))
    return {
        name: random_layer(spec, *shape, seed + number)
        for number, (name, shape) in enumerate(zip(NAMES, shapes, strict=True))
    }


def write_float_graph(path: Path, layers: dict[str, QuantizedLayer], *, opset: int = 22) -> Path:
    nodes, weights, last = [], [], "x"
    for number, (name, layer) in enumerate(layers.items()):
        weight = layer.dequantize().numpy()
        source = f"w{number}"
        if number == 1:  # as exporters leave a weight that they do not turn round
            nodes.append(helper.make_node("Transpose", [f"{source}.T"], [source], perm=[1, 0]))
            weights.append(numpy_helper.from_array(weight, f"{source}.T"))
        else:
            weights.append(numpy_helper.from_array(np.ascontiguousarray(weight.T), source))
        place, last_word = name.split(".")[2], name.rpartition(".")[2]
        nodes.append(helper.make_node("MatMul", [last, source], [f"h{number}"], name=f"/layers.{place}/{last_word}/M"))
        nodes.append(helper.make_node("Tanh" if number < 2 else "Identity", [f"h{number}"], [f"t{number}"]))
        last = f"t{number}"
    width = next(iter(layers.values())).in_features
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "tokens", width])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, ["batch", "tokens", 48])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path), save_as_external_data=True, location="float.data", size_threshold=0)
    return path


def graph_layers(layers: dict[str, QuantizedLayer]) -> GraphLayers:
    return GraphLayers(
        {name: layer.spec for name, layer in layers.items()},
        {name: (layer.out_features, layer.in_features) for name, layer in layers.items()},
        layers.__getitem__,
    )


def write_export(folder: Path, layers: dict[str, QuantizedLayer], **options: Any) -> Path:
    source = write_float_graph(folder / "float" / "float.onnx", layers)
    out = folder / "out"
    out.mkdir()
    settings: dict[str, Any] = {"style": "matmulnbits", "two_bit": "exact", "opset": None, **options}
    record = quantize_graph(
        source, out, graph_layers(layers), base_fingerprint=base_fingerprint(layers.items()), exporter="toy", **settings
    )
    write_json(out / RECORD_NAME, record.to_json())
    write_json(out / "config.json", {})
    return out


def session(folder: Path, level: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
    return onnxruntime.InferenceSession(str(folder / GRAPH_NAME), options, providers=["CPUExecutionProvider"])


def inputs_for(width: int = 96) -> np.ndarray:
    return torch.randn(2, 3, width, generator=torch.Generator().manual_seed(1)).numpy()


def expected(layers: dict[str, QuantizedLayer], x: np.ndarray, pairs: dict[str, LoraPair] | None = None) -> np.ndarray:
    states = torch.from_numpy(x).double()
    for number, (name, layer) in enumerate(layers.items()):
        weight = layer.dequantize(torch.float64)
        if pairs and name in pairs:
            weight = weight + pairs[name].product().double()
        states = states @ weight.T
        states = torch.tanh(states) if number < 2 else states
    return states.numpy()


def close(found: np.ndarray, wanted: np.ndarray, tolerance: float = 2e-6) -> bool:
    return bool(np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("style", ["matmulnbits", "qdq"])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 16), (3, -1), (4, -1), (4, 32), (8, 32)])
def test_onnx_runtime_computes_q(tmp_path: Path, style: Any, bits: int, group_size: int) -> None:
    layers = layers_of(QuantSpec(bits, group_size))
    out = write_export(tmp_path, layers, style=style)
    x = inputs_for()
    assert close(session(out).run(None, {"x": x})[0], expected(layers, x))
    export = OnnxExport.open(out)
    assert export.fingerprint == base_fingerprint(layers.items())
    for name, read in export.read_layers():
        assert torch.equal(read.codes, layers[name].codes)
        assert torch.equal(read.scales, layers[name].scales)
        assert torch.equal(read.zeros, layers[name].zeros)
    jsonschema.validate(json.loads((out / RECORD_NAME).read_text()), json.loads((FOLDER / "schema.json").read_text()))
    assert read_record(out).to_json() == json.loads((out / RECORD_NAME).read_text())


@pytest.mark.parametrize("style", ["matmulnbits", "qdq"])
def test_compact_rounds_activations_and_says_so(tmp_path: Path, style: Any) -> None:
    layers = layers_of(QuantSpec(2, 32))
    out = write_export(tmp_path, layers, style=style, two_bit="compact")
    x = inputs_for()
    found, wanted = session(out, level=4).run(None, {"x": x})[0], expected(layers, x)
    assert close(found, wanted, 0.05)
    assert not close(found, wanted, 1e-4), "the activations were not rounded, so the note is wrong"
    record = read_record(out)
    assert any("activations rounded to int8" in note and "(3 modules)" in note for note in record.notes)
    assert record.opset == (25 if style == "qdq" else 22)
    assert sum(part.stat().st_size for part in out.glob("model.onnx*")) < 30_000


def test_the_notes_say_what_was_done_to_the_grids(tmp_path: Path) -> None:
    notes = read_record(write_export(tmp_path, layers_of(QuantSpec(3, -1)))).notes
    assert "3-bit codes lie in 4-bit containers, which the operator has (3 modules)" in notes
    assert any(note.startswith("one group per output channel in blocks of 32 inputs") for note in notes)
    assert any("activations stay float32 (accuracy_level 1)" in note for note in notes)


def test_groups_that_only_qdq_takes(tmp_path: Path) -> None:
    layers = layers_of(QuantSpec(4, 8))
    out = write_export(tmp_path, layers, style="qdq")
    x = inputs_for()
    assert close(session(out).run(None, {"x": x})[0], expected(layers, x))
    assert any("makes the float weight at every call" in note for note in read_record(out).notes)


def pairs_of(layers: dict[str, QuantizedLayer], ranks: tuple[int, ...], seed: int) -> dict[str, LoraPair]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LoraPair(
            torch.randn(rank, layer.in_features, generator=generator) * 0.1,
            torch.randn(layer.out_features, rank, generator=generator) * 0.1,
            alpha=3.0,
        )
        for rank, (name, layer) in zip(ranks, layers.items(), strict=False)
    }


def test_adapters_of_mixed_ranks_switch_and_leave_no_trace(tmp_path: Path) -> None:
    layers = layers_of(QuantSpec(3, 32))
    out = write_export(tmp_path, layers)
    fingerprint = base_fingerprint(layers.items())
    adapters = {"first": pairs_of(layers, (4, 7, 2), 1), "second": pairs_of(layers, (5,), 2)}
    for name, pairs in adapters.items():
        write_onnx_adapter(tmp_path / name, pairs, base_model="toy", base_fingerprint=fingerprint)
    served, x = session(out), inputs_for()
    alone = served.run(None, {"x": x})[0]
    for name in ("first", "second", "first"):
        adapter = onnxruntime.LoraAdapter()
        adapter.Load(str(tmp_path / name / ADAPTER_NAME))
        options = onnxruntime.RunOptions()
        options.add_active_adapter(adapter)
        found = served.run(None, {"x": x}, options)[0]
        assert close(found, expected(layers, x, adapters[name]))
        assert not close(found, alone, 1e-2)
    assert np.array_equal(served.run(None, {"x": x})[0], alone)
    # With rank-0 inputs the graph is the base itself, not merely close to it.
    plain = onnx.load(str(out / GRAPH_NAME))
    for node in plain.graph.node:
        if node.op_type == "Add":
            node.op_type = "Identity"
            del node.input[1]
    folder = tmp_path / "plain"
    folder.mkdir()
    onnx.save(plain, str(folder / GRAPH_NAME))
    assert np.array_equal(session(folder).run(None, {"x": x})[0], alone)


def test_an_adapter_file_is_bound_read_back_and_refused_when_it_is_another(tmp_path: Path) -> None:
    layers = layers_of(QuantSpec(4, 32))
    pairs = pairs_of(layers, (4, 4, 4), 1)
    write_onnx_adapter(tmp_path / "a", pairs, base_model="toy", base_fingerprint="sha256:one", extra={"rank": 4})
    write_onnx_adapter(tmp_path / "again", pairs, base_model="toy", base_fingerprint="sha256:one", extra={"rank": 4})
    write_onnx_adapter(tmp_path / "b", pairs, base_model="toy", base_fingerprint="sha256:two")
    read = read_onnx_adapter(tmp_path / "a")
    assert same_pairs(read.pairs, pairs)
    assert (read.base_fingerprint, read.extra, read.config) == (
        "sha256:one",
        {"rank": 4},
        {"base_model_name_or_path": "toy"},
    )
    assert (tmp_path / "a" / ADAPTER_NAME).read_bytes() == (tmp_path / "again" / ADAPTER_NAME).read_bytes()
    assert load_pairs(tmp_path / "b" / ADAPTER_NAME)[1] == model_version("sha256:two") != model_version("sha256:one")
    for name, pair in pairs.items():
        assert torch.allclose(read.pairs[name].product(), pair.product(), rtol=1e-5, atol=1e-6)

    shutil.copy(tmp_path / "b" / ADAPTER_NAME, tmp_path / "a" / ADAPTER_NAME)
    with pytest.raises(FormatError, match=r"is not the file that cloq_adapter\.json binds"):
        read_onnx_adapter(tmp_path / "a")
    (tmp_path / "again" / ADAPTER_NAME).write_bytes(b"nonsense" * 40)
    with pytest.raises(FormatError, match="is damaged or no adapter of ONNX Runtime"):
        load_pairs(tmp_path / "again" / ADAPTER_NAME)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    require_fit(pairs, shapes, "it")
    with pytest.raises(BindingError, match=r"adapts model\.layers\.0\.up_proj \(64, 96\), and the graph has no inputs"):
        require_fit(pairs, {}, "it")
    with pytest.raises(BindingError, match=r"and the graph has \(1, 2\) there"):
        require_fit(pairs, dict.fromkeys(shapes, (1, 2)), "it")


def test_the_same_layers_give_the_same_bytes(tmp_path: Path) -> None:
    layers = layers_of(QuantSpec(3, 32))
    first, second = (write_export(tmp_path / name, layers) for name in ("a", "b"))
    for name in (GRAPH_NAME, DATA_NAME, RECORD_NAME):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_equal_weights_are_told_apart_by_their_place(tmp_path: Path) -> None:
    layers = layers_of(QuantSpec(4, 32), width=64)
    layers[NAMES[1]] = layers[NAMES[0]]
    out = write_export(tmp_path, layers)
    pairs = {NAMES[1]: pairs_of(layers, (4, 4), 1)[NAMES[1]]}
    x = inputs_for(64)
    feed = {"x": x} | {
        name: np.ascontiguousarray(array)
        for name, array in zip(
            lora_names(NAMES[1]),
            (pairs[NAMES[1]].lora_A.T.numpy(), (pairs[NAMES[1]].lora_B.T * pairs[NAMES[1]].scaling).numpy()),
            strict=True,
        )
    }
    assert close(session(out).run(None, feed)[0], expected(layers, x, pairs))


def test_a_module_that_the_graph_computes_in_another_way_is_refused(tmp_path: Path) -> None:
    layers = layers_of(QuantSpec(4, 32))
    source = write_float_graph(tmp_path / "float.onnx", layers)
    other = {**layers, NAMES[2]: random_layer(QuantSpec(4, 32), 48, 96, 77)}
    with pytest.raises(UnmatchedLinearError, match=r"no MatMul with the weight of model\.layers\.1\.down_proj"):
        quantize_graph(
            source,
            tmp_path,
            graph_layers(other),
            style="matmulnbits",
            two_bit="exact",
            opset=None,
            base_fingerprint="sha256:x",
            exporter="toy",
        )


@pytest.mark.parametrize(
    ("options", "bits", "message"),
    [
        ({"style": "qdq", "opset": 20}, 4, "opset 20 has no DequantizeLinear for these codes; 21 is the least"),
        ({"style": "qdq", "two_bit": "compact", "opset": 22}, 2, "opset 22 has no Dequant.*; 25 is the least"),
        ({"opset": 12}, 4, "Identity is another operator in opset 12 than in 22"),
        ({"opset": 999}, 4, "opset 999 is unknown to the installed onnx"),
        ({"two_bit": "compact"}, 4, "--two-bit compact was given, but no layer has 2 bits"),
    ],
)
def test_an_opset_or_a_storage_that_does_not_fit_is_refused(
    tmp_path: Path, options: dict[str, Any], bits: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        write_export(tmp_path, layers_of(QuantSpec(bits, 32)), **options)


def test_an_opset_may_be_raised(tmp_path: Path) -> None:
    layers = layers_of(QuantSpec(4, 32))
    out = write_export(tmp_path, layers, opset=25)
    model = onnx.load(str(out / GRAPH_NAME))
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 25, "com.microsoft": 1}
    assert model.ir_version >= 13
    x = inputs_for()
    assert close(session(out).run(None, {"x": x})[0], expected(layers, x))


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
