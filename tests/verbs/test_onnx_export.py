"""ONNX exports by real exporters: tiny models of two kinds, and SmolLM2, through every verb that knows them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime_genai as genai
import pytest
import torch
import transformers
from rich.console import Console

from cloq_export.artifact.certificate import verify_certificate
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.cli import main
from cloq_export.engines.onnx.engine import OnnxModel
from cloq_export.engines.transformers.loading import dequantized_model
from cloq_export.errors import BindingError, FormatError, UsageError
from cloq_export.formats.onnx.adapter import ADAPTER_NAME
from cloq_export.formats.onnx.reading import OnnxExport
from cloq_export.formats.onnx.record import GRAPH_NAME, read_record
from cloq_export.models.source import open_model
from cloq_export.parity.float_part import compare_vocabulary
from cloq_export.parity.provenance import CONTRADICTED, PROVEN
from cloq_export.recipe import Recipe
from cloq_export.verbs.adapt import adapt
from cloq_export.verbs.export import export as write_export
from cloq_export.verbs.options import ExportOptions
from cloq_export.verbs.run import run as make_run
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verify import verify

pytestmark = pytest.mark.slow

LOGITS = 5e-4  # largest difference of a logit in an exact style
PROMPT = [5, 17, 60, 9, 33, 41]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> Path:
    """Return a model none of whose linears has as many outputs as the vocabulary has tokens."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    shutil.copytree(model_folder("llama"), folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.intermediate_size = 128
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: Path, recipe_for: Any, silent: Console) -> Path:
    """Return a 3-bit run with two adapters."""
    folder = tmp_path_factory.mktemp("onnx") / "run"
    make_run(recipe_for("llama", bits=3, model=str(tiny)), folder, console=silent)
    adapt(folder, {"rank": 6, "adapter_name": "second"}, console=silent)
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, silent: Console) -> Path:
    """Return the run's ONNX export."""
    summary = write_export(run, ExportOptions(format="onnx"), console=silent)
    assert summary.folder == run / "exports" / "onnx"
    assert any("float graph of onnxruntime-genai" in note for note in summary.notes)
    assert any("3-bit codes lie in 4-bit containers" in note for note in summary.notes)
    return run / "exports" / "onnx"


def reference_logits(run: Path, adapter: str | None, ids: list[int]) -> np.ndarray:
    model = dequantized_model(run, adapter, merged=False)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].numpy()


def reference_text(run: Path, adapter: str | None, ids: list[int], count: int) -> list[int]:
    model = dequantized_model(run, adapter, merged=False)
    made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=count, pad_token_id=0)
    return made[0, len(ids) :].tolist()


def test_the_graph_holds_the_runs_integers(run: Path, exported: Path) -> None:
    meant = dict(Checkpoint.open(run).read_layers())
    found = dict(OnnxExport.open(exported).read_layers())
    assert set(found) == set(meant)
    for name, layer in found.items():
        assert layer.spec == meant[name].spec
        for field in ("codes", "scales", "zeros"):
            assert torch.equal(getattr(layer, field), getattr(meant[name], field))
    assert verify_certificate(exported).modules == len(meant)


def test_plain_onnx_runtime_serves_it_with_its_adapters_in_turn(run: Path, exported: Path) -> None:
    folders = {name: exported / "adapters" / name for name in ("cloq", "second")}
    model = OnnxModel(exported, folders)
    for adapter in (None, "cloq", "second", None):
        assert np.abs(model.logits(PROMPT, adapter) - reference_logits(run, adapter, PROMPT)).max() < LOGITS
        assert model.generate([PROMPT], [adapter], 12) == [reference_text(run, adapter, PROMPT, 12)]


def test_onnx_runtime_genai_generates_and_switches(run: Path, exported: Path) -> None:
    model = genai.Model(str(exported))
    adapters = genai.Adapters(model)
    for name in ("cloq", "second"):
        adapters.load(str(exported / "adapters" / name / ADAPTER_NAME), name)
    for adapter in (None, "cloq", "second", None):
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(PROMPT) + 12, do_sample=False)
        generator = genai.Generator(model, parameters)
        if adapter is not None:
            generator.set_active_adapter(adapters, adapter)
        generator.append_tokens(np.array(PROMPT, dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        made = generator.get_sequence(0)[len(PROMPT) :].tolist()
        assert made == reference_text(run, adapter, PROMPT, 12)[: len(made)]
        assert made


def test_the_gate_passes_and_an_edited_graph_misses_it(
    run: Path, exported: Path, tmp_path: Path, texts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = json.loads((run / "run.json").read_text())["recipe"]
    asked = f"verify {exported} --reference {recipe['model']} --runtime onnx --text {texts['eval_text']} --window 16"
    asked += " --windows 4 --prompts 4 --new-tokens 6 --liveness-tokens 16 --json"
    assert main(asked.split()) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert (report["runtime"], report["layout"]) == ("onnx", "onnx")
    assert report["metrics"]["live_modules"] == 1.0
    assert report["metrics"]["certificate"] == 1.0

    other = tmp_path / "edited"
    shutil.copytree(exported, other)
    data = bytearray((other / "model.onnx.data").read_bytes())
    data[-1] ^= 1
    (other / "model.onnx.data").write_bytes(data)
    assert main(asked.replace(str(exported), str(other)).split()) == 3
    spoken = capsys.readouterr()
    assert "is not the file that was certified" in spoken.err


def test_the_row_of_a_token_that_no_text_has_is_named(run: Path, exported: Path, tmp_path: Path) -> None:
    loaded = open_model(json.loads((run / "run.json").read_text())["recipe"]["model"])
    assert compare_vocabulary(OnnxExport.open(exported), loaded).verdict == PROVEN
    other = Path(shutil.copytree(exported, tmp_path / "edited"))
    graph = onnx.load(str(other / "model.onnx"), load_external_data=False).graph
    # Embeddings and head are one matrix here, which the builder names as it likes.
    [(name, _)] = OnnxExport.open(other).float_matrices(*loaded.model.get_input_embeddings().weight.shape)
    embeddings = next(each for each in graph.initializer if each.name == name)
    offset = int({entry.key: entry.value for entry in embeddings.external_data}["offset"])
    with open(other / "model.onnx.data", "r+b") as file:
        file.seek(offset + 3)  # sign and exponent of the first number
        last = file.read(1)
        file.seek(offset + 3)
        file.write(bytes([last[0] ^ 0x80]))
    finding = compare_vocabulary(OnnxExport.open(other), loaded)
    assert finding.verdict == CONTRADICTED
    assert finding.reason == f"{name} of the graph is no matrix of the float model"


def test_adapters_alone_are_written_and_bound(run: Path, exported: Path, tmp_path: Path, silent: Console) -> None:
    options = ExportOptions(format="onnx-adapter", adapters=("second",), out=tmp_path / "alone")
    write_export(run, options, console=silent)
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {
        ADAPTER_NAME,
        "cloq_adapter.json",
        "cloq_certificate.json",
        "README.md",
    }
    model = OnnxModel(exported, {"alone": tmp_path / "alone"})
    wanted = reference_logits(run, "second", PROMPT)
    assert np.abs(model.logits(PROMPT, "alone") - wanted).max() < LOGITS
    assert verify_certificate(tmp_path / "alone").certificate.layout == "onnx-adapter"


def test_what_does_not_go_together_is_refused(run: Path, exported: Path, tmp_path: Path, silent: Console) -> None:
    model = json.loads((run / "run.json").read_text())["recipe"]["model"]
    for options, message in (
        (VerifyOptions(model), r"is an ONNX export, whose graph computes in float32; verify it with `runtime=onnx`"),
        (VerifyOptions(model, runtime="onnx", dtype="float16"), "whose graph computes in float32"),
        (VerifyOptions(model, runtime="onnx", adapters=("none",)), "none is no adapter in"),
    ):
        with pytest.raises((UsageError, FormatError), match=message):
            verify(exported, options, console=silent)
    with pytest.raises(UsageError, match="is no ONNX export; make one with: cloq export RUN --format onnx"):
        verify(run, VerifyOptions(model, runtime="onnx"), console=silent)
    for options, message in (
        (ExportOptions(format="gptq_v2", style="qdq"), "`style` is about ONNX graphs"),
        (ExportOptions(format="onnx", style="other"), "`style` is 'other'; allowed are matmulnbits"),
        (ExportOptions(format="onnx", two_bit="compact"), "no layer has 2 bits"),
        (ExportOptions(format="onnx", style="qdq", opset=20), "opset 20 has no DequantizeLinear"),
    ):
        with pytest.raises(UsageError, match=message):
            write_export(run, options, console=silent)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_refused(
    run: Path, tiny: Path, tmp_path: Path, recipe_for: Any, silent: Console
) -> None:
    make_run(recipe_for("llama", bits=4, model=str(tiny)), tmp_path / "other", console=silent)
    options = ExportOptions(format="onnx", adapters=(str(tmp_path / "other" / "adapters" / "cloq"),))
    with pytest.raises(BindingError, match=r"is bound to the base sha256:.*cloq adapt"):
        write_export(run, options, console=silent)


def test_an_architecture_that_the_builder_lacks_is_traced(tmp_path: Path, recipe_for: Any, silent: Console) -> None:
    run = tmp_path / "run"
    make_run(recipe_for("gpt-neox", bits=4), run, console=silent)
    summary = write_export(run, ExportOptions(format="onnx", style="qdq", out=tmp_path / "out"), console=silent)
    assert any("does not know GPTNeoXForCausalLM. The float graph was traced" in note for note in summary.notes)
    assert "traced" in read_record(tmp_path / "out").exporter
    model = OnnxModel(tmp_path / "out", {"cloq": tmp_path / "out" / "adapters" / "cloq"})
    for adapter in (None, "cloq"):
        assert np.abs(model.logits(PROMPT, adapter) - reference_logits(run, adapter, PROMPT)).max() < LOGITS
        assert model.generate([PROMPT], [adapter], 8) == [reference_text(run, adapter, PROMPT, 8)]


def test_smollm2_with_four_bits_is_served_as_trained(tmp_path: Path) -> None:
    silent = Console(file=io.StringIO())
    small = {
        "model": "smollm2-demo",
        "bits": 4,
        "group_size": 64,
        "method": "rtn",
        "rank": 8,
        # Enough tokens for every layer's inputs to be known: an adapter of fewer is large where no token was, and
        # amplifies the rounding of either engine there.
        "samples": 8,
        "seqlen": 256,
    }
    more = {"calibration": "embedded", "eval_text": "embedded", "eval_windows": 1, "eval_window": 64}
    run = tmp_path / "run"
    make_run(Recipe.from_mapping({**small, **more}), run, console=silent)
    write_export(run, ExportOptions(format="onnx", out=tmp_path / "out"), console=silent)
    assert (tmp_path / "out" / GRAPH_NAME).stat().st_size < 1 << 20
    model = OnnxModel(tmp_path / "out", {"cloq": tmp_path / "out" / "adapters" / "cloq"})
    # Text, because on tokens that no text holds in such order the base alone amplifies rounding beyond the bound.
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(
        "The river rose slowly all night, and by morning the lower fields of the village lay under water."
    )["input_ids"]
    for adapter in (None, "cloq"):
        difference = np.abs(model.logits(ids, adapter) - reference_logits(run, adapter, ids)).max()
        assert difference < LOGITS, (adapter, difference)
        assert model.generate([ids], [adapter], 8) == [reference_text(run, adapter, ids, 8)]
