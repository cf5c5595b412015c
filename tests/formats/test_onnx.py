"""ONNX graphs: golden blocks, every grid through ONNX Runtime, adapters that switch, edited graphs refused."""

from __future__ import annotations

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
from onnx_graphs import (
    FOLDER,
    NAMES,
    close,
    expected,
    graph_layers,
    inputs_for,
    layers_of,
    pairs_of,
    random_layer,
    session,
    write_export,
    write_float_graph,
)

from cloq_export.errors import BindingError, FormatError, UsageError
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
from cloq_export.formats.onnx.graph import lora_names, quantize_graph
from cloq_export.formats.onnx.matching import UnmatchedLinearError
from cloq_export.formats.onnx.reading import OnnxExport
from cloq_export.formats.onnx.record import DATA_NAME, GRAPH_NAME, RECORD_NAME, GraphOptions, read_record
from cloq_export.types import QuantSpec


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
    # Activations in 255 steps of the largest in a block: about 0.5% off in each of three layers, more at the worst.
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
        assert not close(found, alone, 1e-2), "the adapter changes nothing that its check could miss"
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
            source, tmp_path, graph_layers(other), GraphOptions(), base_fingerprint="sha256:x", exporter="toy"
        )


@pytest.mark.parametrize(
    ("options", "bits", "message"),
    [
        ({"style": "qdq", "opset": 20}, 4, "opset 20 has no DequantizeLinear for these codes; 21 is the least"),
        ({"style": "qdq", "two_bit": "compact", "opset": 22}, 2, "opset 22 has no Dequant.*; 25 is the least"),
        ({"opset": 12}, 4, "Identity is another operator in opset 12 than in 22"),
        ({"opset": 999}, 4, "opset 999 is unknown to the installed onnx"),
        ({"two_bit": "compact"}, 4, "`two_bit=compact` was given, but no layer has 2 bits"),
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
