"""ONNX Runtime as a runtime, on a toy decoder with a cache; real exporters and a real model are slow tests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from cloq_export.artifact.certificate import verify_certificate, write_certificate
from cloq_export.artifact.checkpoint_writer import FloatPart, LayerSource
from cloq_export.artifact.inspection import describe
from cloq_export.engines.onnx import export as onnx_export
from cloq_export.engines.onnx import float_graph as onnx_float_graph
from cloq_export.engines.onnx.engine import OnnxModel
from cloq_export.engines.onnx.float_graph import FloatGraph
from cloq_export.errors import BindingError, FormatError, MissingPackageError, UnsupportedModelError, UsageError
from cloq_export.files.fingerprint import base_fingerprint
from cloq_export.formats.onnx import packages
from cloq_export.formats.onnx.adapter import write_onnx_adapter
from cloq_export.formats.onnx.matching import UnmatchedLinearError
from cloq_export.formats.onnx.record import GRAPH_NAME, RECORD_NAME, GraphOptions
from cloq_export.formats.peft import write_adapter
from cloq_export.types import LoraPair, QuantizedLayer, QuantSpec

WIDTH, HEADS, SIZE, VOCABULARY, END = 64, 2, 16, 48, 2
KEY, HEAD = "model.layers.0.k_proj", "model.layers.0.up_proj"
IDS = [5, 9, 14, 3, 40]


def toy_layers() -> dict[str, QuantizedLayer]:
    generator = torch.Generator().manual_seed(0)

    def layer(out_features: int) -> QuantizedLayer:
        return QuantizedLayer(
            torch.randint(8, (out_features, WIDTH), dtype=torch.uint8, generator=generator),
            (torch.rand(out_features, 2, generator=generator) * 0.02 + 0.01).half(),
            torch.randint(8, (out_features, 2), dtype=torch.uint8, generator=generator),
            QuantSpec(3, 32),
        )

    return {KEY: layer(HEADS * SIZE), HEAD: layer(VOCABULARY)}


def toy_embedding() -> torch.Tensor:
    return torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(1))


def toy_logits(layers: dict[str, QuantizedLayer], ids: list[int], pairs: dict[str, LoraPair]) -> torch.Tensor:
    """Return logits (n, vocabulary): head(embedding) plus the sum of the keys of all tokens so far."""

    def weight(name: str) -> torch.Tensor:
        q = layers[name].dequantize(torch.float64)
        return q + pairs[name].product().double() if name in pairs else q

    states = toy_embedding()[ids].double()
    keys = (states @ weight(KEY).T).cumsum(0).sum(-1, keepdim=True)
    return (states @ weight(HEAD).T) * torch.cos(keys)


def write_toy_graph(folder: Path, layers: dict[str, QuantizedLayer]) -> FloatGraph:
    """Write a decoder whose logits depend on every key in its cache."""
    node = helper.make_node
    constants = {
        "embedding": toy_embedding().numpy(),
        "k": np.ascontiguousarray(layers[KEY].dequantize().T.numpy()),
        "head": np.ascontiguousarray(layers[HEAD].dequantize().T.numpy()),
        "split": np.array([0, 0, HEADS, SIZE], dtype=np.int64),
        "axes": np.array([1, 3], dtype=np.int64),
        "two": np.array(2, dtype=np.int64),
        "last": np.array([-1], dtype=np.int64),
        "zero": np.array([0], dtype=np.int64),
        "far": np.array([2**31], dtype=np.int64),
        "time": np.array([1], dtype=np.int64),
    }
    nodes = [
        node("Gather", ["embedding", "input_ids"], ["states"]),
        node("MatMul", ["states", "k"], ["keys"], name="/layers.0/k_proj/MatMul"),
        node("Reshape", ["keys", "split"], ["parted"]),
        node("Transpose", ["parted"], ["turned"], perm=[0, 2, 1, 3]),
        node("Concat", ["past_key_values.0.key", "turned"], ["present.0.key"], axis=2),
        node("Concat", ["past_key_values.0.value", "turned"], ["present.0.value"], axis=2),
        node("ReduceSum", ["present.0.key", "axes"], ["sums"], keepdims=0),
        node("CumSum", ["sums", "time"], ["running"]),
        # The keys of the new tokens are the last ones.
        node("Shape", ["input_ids"], ["shape"], start=1),
        node("Neg", ["shape"], ["start"]),
        node("Slice", ["running", "start", "far", "time"], ["own"]),
        node("Unsqueeze", ["own", "last"], ["column"]),
        node("Cos", ["column"], ["gate"]),
        node("MatMul", ["states", "head"], ["raw"], name="/layers.0/up_proj/MatMul"),
        node("Mul", ["raw", "gate"], ["logits"]),
    ]
    cache = [f"past_key_values.0.{part}" for part in ("key", "value")]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "toy",
        [
            info("input_ids", TensorProto.INT64, ["batch", "tokens"]),
            *(info(name, TensorProto.FLOAT, ["batch", HEADS, "past", SIZE]) for name in cache),
        ],
        [
            info("logits", TensorProto.FLOAT, ["batch", "tokens", VOCABULARY]),
            *(
                info(name.replace("past_key_values", "present"), TensorProto.FLOAT, ["batch", HEADS, "total", SIZE])
                for name in cache
            ),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, str(folder / "toy.onnx"))
    decoder = {
        "session_options": {"log_id": "toy"},
        "head_size": SIZE,
        "num_key_value_heads": HEADS,
        "num_hidden_layers": 1,
        "inputs": {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    return FloatGraph(folder / "toy.onnx", {"model": {"decoder": decoder, "eos_token_id": END}}, "toy exporter")


def toy_floats(folder: Path) -> FloatPart:
    save_file({"embedding": toy_embedding()}, folder / "floats.safetensors")
    return FloatPart(
        {"model.embed.weight": ("F32", (VOCABULARY, WIDTH))},
        lambda name: toy_embedding(),
        {},
        (),
        lambda place: (place / "config.json").write_text('{"architectures": ["Toy"]}'),
    )


@pytest.fixture
def write_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that exports the toy with a certificate, the exporters replaced by one that writes the toy."""

    def write(name: str = "export", **options: Any) -> Path:
        layers = toy_layers()
        monkeypatch.setattr(
            onnx_export, "build_graph", lambda model, scratch, outputs: write_toy_graph(scratch, layers)
        )
        fingerprint = base_fingerprint(layers.items())

        def finish(folder: Path, report: onnx_export.OnnxReport) -> None:
            write_certificate(folder, "onnx", fingerprint, report.modules)

        onnx_export.export_onnx(
            tmp_path / name,
            LayerSource.of_mapping(layers),
            toy_floats(tmp_path),
            GraphOptions(**options),
            base_fingerprint=fingerprint,
            finish=finish,
        )
        return tmp_path / name

    return write


def toy_pairs(rank: int, seed: int, *names: str) -> dict[str, LoraPair]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in toy_layers().items()}
    return {
        name: LoraPair(
            torch.randn(rank, shapes[name][1], generator=generator) * 0.1,
            torch.randn(shapes[name][0], rank, generator=generator) * 0.1,
            alpha=3.0,
        )
        for name in names
    }


@pytest.mark.parametrize("style", ["matmulnbits", "qdq"])
def test_logits_greedy_text_and_adapters_are_those_of_the_reference(
    tmp_path: Path, write_toy: Callable[..., Path], style: str
) -> None:
    folder = write_toy(style=style)
    fingerprint = base_fingerprint(toy_layers().items())
    pairs = {"peft": toy_pairs(3, 1, KEY, HEAD), "own": toy_pairs(5, 2, HEAD), "none": {}}
    write_adapter(tmp_path / "peft", pairs["peft"], base_model="toy", base_fingerprint=fingerprint)
    write_onnx_adapter(tmp_path / "own", pairs["own"], base_model="toy", base_fingerprint=fingerprint)
    model = OnnxModel(folder, {"peft": tmp_path / "peft", "own": tmp_path / "own"}, threads=1)
    alone = model.logits(IDS)
    for name in ("peft", "own", "none", "peft"):
        adapter = None if name == "none" else name
        wanted = toy_logits(toy_layers(), IDS, pairs[name])
        assert np.abs(model.logits(IDS, adapter) - wanted.numpy()).max() < 1e-5
        logprobs = model.prompt_logprobs([IDS, IDS[:3]], [adapter, adapter])
        exact = torch.log_softmax(wanted, -1)
        assert torch.allclose(logprobs[0].double(), exact[range(4), IDS[1:]], atol=1e-5)
        assert torch.equal(logprobs[0][:2], logprobs[1])
        text = list(IDS[:2])
        for _ in range(6):
            text.append(int(toy_logits(toy_layers(), text, pairs[name])[-1].argmax()))
            if text[-1] == END:
                break
        assert model.generate([IDS[:2]], [adapter], 6) == [text[2:]]
    assert np.array_equal(model.logits(IDS), alone)
    with pytest.raises(UsageError, match=r"2 adapters were asked for at once; .* ask for one at a time"):
        model.logits(IDS, ["peft", "own"])
    with pytest.raises(UsageError, match="there is no adapter 'other'; there are peft, own"):
        model.logits(IDS, "other")
    with pytest.raises(UsageError, match="a sequence has 1 tokens"):
        model.prompt_logprobs([[1]], [None])
    with pytest.raises(UsageError, match="a prompt has no token"):
        model.generate([[]], [None], 1)
    model.close()


def test_a_qdq_export_tells_the_session_to_stay_exact(write_toy: Callable[..., Path]) -> None:
    folder = write_toy(style="qdq")
    options = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert options["session.qdq_matmulnbits_accuracy_level"] == "1"


def test_adapters_of_another_base_or_model_are_refused(tmp_path: Path, write_toy: Callable[..., Path]) -> None:
    folder = write_toy()
    write_onnx_adapter(tmp_path / "a", toy_pairs(2, 1, HEAD), base_model="toy", base_fingerprint="sha256:other")
    with pytest.raises(BindingError, match=r"a is bound to the base sha256:other, but .*cloq adapt"):
        OnnxModel(folder, {"a": tmp_path / "a"})
    assert OnnxModel(folder, {"a": tmp_path / "a"}, force=True).generate([IDS], ["a"], 1)
    pairs = {"model.layers.9.q_proj": toy_pairs(2, 1, HEAD)[HEAD]}
    fingerprint = base_fingerprint(toy_layers().items())
    write_onnx_adapter(tmp_path / "b", pairs, base_model="toy", base_fingerprint=fingerprint)
    with pytest.raises(BindingError, match="and the graph has no inputs for it"):
        OnnxModel(folder, {"b": tmp_path / "b"})


def test_an_export_is_described_and_its_certificate_repeated(write_toy: Callable[..., Path]) -> None:
    folder = write_toy()
    facts = describe(folder, verify=True).to_json()
    assert (facts["kind"], facts["exporter"], facts["opset"], facts["quantized_modules"]) == (
        "onnx export",
        "toy exporter",
        21,
        2,
    )
    assert facts["certificate"]["modules"] == 2
    assert facts["grids"] == [
        {
            "bits": 3,
            "group_size": 32,
            "symmetric": False,
            "container_bits": 4,
            "block_size": 32,
            "accuracy_level": 1,
            "modules": 2,
        }
    ]
    model = onnx.load(str(folder / GRAPH_NAME), load_external_data=False)
    next(entry for node in model.graph.node for entry in node.attribute if entry.name == "block_size").i = 16
    (folder / GRAPH_NAME).write_bytes(model.SerializeToString())
    with pytest.raises(FormatError, match=r"model\.onnx is not the file that was certified"):
        verify_certificate(folder)
    certificate = json.loads((folder / "cloq_certificate.json").read_text())
    write_certificate(folder, "onnx", certificate["base_fingerprint"], certificate["modules"])
    with pytest.raises(FormatError, match="as its record says; the graph was edited"):
        verify_certificate(folder)


def test_an_adapter_is_described(tmp_path: Path) -> None:
    write_onnx_adapter(tmp_path / "a", toy_pairs(2, 1, HEAD), base_model="toy", base_fingerprint="sha256:x")
    facts = describe(tmp_path / "a").to_json()
    assert (facts["kind"], facts["ranks"], facts["base_fingerprint"]) == ("onnx adapter", "2", "sha256:x")


def test_only_an_export_of_ours_is_replaced(tmp_path: Path, write_toy: Callable[..., Path]) -> None:
    folder = write_toy()
    before = (folder / RECORD_NAME).read_bytes()
    assert write_toy() == folder
    assert (folder / RECORD_NAME).read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


def test_the_other_exporter_takes_what_the_builder_lacks(
    write_toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    layers = toy_layers()

    def lacks(model: Path, scratch: Path, outputs: Any) -> FloatGraph:
        raise UnsupportedModelError("the builder does not know Toy.")

    def trace(model: Path, scratch: Path, reason: str) -> FloatGraph:
        made = write_toy_graph(scratch, layers)
        return FloatGraph(made.path, made.genai_config, "other exporter", (f"{reason} It was traced.",))

    folder = write_toy()
    monkeypatch.setattr(onnx_export, "build_graph", lacks)
    monkeypatch.setattr(onnx_export, "trace_graph", trace)
    report = onnx_export.export_onnx(
        folder,
        LayerSource.of_mapping(layers),
        toy_floats(tmp_path),
        GraphOptions(),
        base_fingerprint=base_fingerprint(layers.items()),
    )
    assert report.record.exporter == "other exporter"
    assert report.record.notes[-1] == "the builder does not know Toy. It was traced."

    def computes_otherwise(*_: Any, **__: Any) -> None:
        raise UnmatchedLinearError("the float graph has no MatMul")

    monkeypatch.setattr(onnx_export, "quantize_graph", computes_otherwise)
    with pytest.raises(FormatError, match="the float graph has no MatMul"):
        write_toy("other")


def fail_with(monkeypatch: pytest.MonkeyPatch, code: int, *lines: str) -> None:
    done = subprocess.CompletedProcess([], code, stdout="\n".join(lines))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)


def test_exporters_that_fail_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NovelForCausalLM"]}')
    fail_with(monkeypatch, 1, "Traceback", "NotImplementedError: The x model is not currently supported.")
    with pytest.raises(UnsupportedModelError, match=r"onnxruntime-genai .* does not know NovelForCausalLM\."):
        onnx_float_graph.build_graph(tmp_path, tmp_path)
    fail_with(monkeypatch, 1, "Traceback", "ValueError: no rope")
    with pytest.raises(FormatError, match=r"could not export NovelForCausalLM: ValueError: no rope\."):
        onnx_float_graph.build_graph(tmp_path, tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 96}')
    with pytest.raises(UnsupportedModelError, match=r"takes any linear with 96 outputs, .* for the head"):
        onnx_float_graph.build_graph(tmp_path, tmp_path, {64, 96})
    with pytest.raises(UnsupportedModelError, match=r"why\. transformers .* ValueError: no rope\. .*`format=gptq_v2`"):
        onnx_float_graph.trace_graph(tmp_path, tmp_path, "why.")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(MissingPackageError, match=r"need no-such-package, .* `pip install cloq-export\[onnx\]`"):
        packages.require_packages()


@pytest.mark.slow
def test_the_package_is_imported_without_onnx() -> None:
    code = (
        "import sys\nfor name in ('onnx', 'onnx_ir', 'onnxruntime', 'onnxruntime_genai'): sys.modules[name] = None\n"
        "import cloq_export.verbs, cloq_export.cli, cloq_export.artifact.inspection\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
