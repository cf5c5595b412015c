"""Conversions, foreign checkpoints, and wrappers with names of their own: the same integers in every layout."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from read_integers import assert_same_integers, foreign, logits
from rich.console import Console

import cloq_export
import cloq_export.formats.merged
from cloq_export.artifact.certificate import verify_certificate
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.engines.transformers.loading import dequantized_model
from cloq_export.errors import (
    BindingError,
    FormatError,
    RecipeError,
    RunDirectoryError,
    UnsupportedModelError,
    UsageError,
)
from cloq_export.files.safe_tensors import read_safetensors_header
from cloq_export.formats.peft import write_adapter
from cloq_export.types import LoraPair
from cloq_export.verbs.adapt import adapt
from cloq_export.verbs.adapt_checkpoint import adapt_checkpoint
from cloq_export.verbs.convert import convert
from cloq_export.verbs.export import export as write_export
from cloq_export.verbs.inspect import inspect as inspect_folder
from cloq_export.verbs.options import ExportOptions
from cloq_export.verbs.run import run as make_run


@pytest.mark.parametrize("layout", ["gptq_v2", "compressed_tensors", "compressed_tensors_padded"])
def test_a_checkpoint_goes_round_through_every_layout(
    tmp_path: Path, made_run: Any, silent: Console, contents: Any, layout: str
) -> None:
    run = made_run("qwen2", bits=3, overrides={"*.o_proj": {"skip": True}, "*.down_proj": {"bits": 4}})
    first, there, back = tmp_path / "first", tmp_path / "there", tmp_path / "back"
    write_export(run, ExportOptions(out=first), console=silent)
    convert(first, ExportOptions(format=layout, out=there), console=silent)
    assert_same_integers(first, there)
    assert verify_certificate(there).not_covered == ()
    assert torch.equal(logits(cloq_export.load(there, "cloq")), logits(cloq_export.load(run, "cloq")))
    convert(there, ExportOptions(format="gptq_v2", out=back), console=silent)
    one, other = contents(first), contents(back)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "adapters/cloq/adapter_model.safetensors"):
        assert one[name] == other[name], name


def test_a_wrong_label_is_overruled(tmp_path: Path, made_run: Any, silent: Console) -> None:
    run, wrong = made_run(bits=4), tmp_path / "wrong"
    shutil.copytree(run / "checkpoint", wrong)
    config = json.loads((wrong / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq"
    del config["quantization_config"]["cloq"]
    (wrong / "config.json").write_text(json.dumps(config))
    options = ExportOptions(format="gptq_v2", out=tmp_path / "right")
    summary = convert(wrong, options, read_as="gptq_v2", console=silent)
    assert "read as gptq_v2, although its config may say otherwise" in summary.notes
    assert_same_integers(run, tmp_path / "right")
    with pytest.raises(FormatError, match="cannot be read as 'compressed_tensors'; allowed are gptq_v2, gptq"):
        convert(wrong, options, read_as="compressed_tensors", console=silent)


def test_what_convert_refuses(tmp_path: Path, made_run: Any, silent: Console) -> None:
    run = made_run(bits=4)
    with pytest.raises(UsageError, match="no folder was given; say where the checkpoint is written with `out=FOLDER`"):
        convert(run, ExportOptions(format="gptq"), console=silent)
    with pytest.raises(UsageError, match="cannot be converted in place"):
        convert(run, ExportOptions(format="gptq", out=run), console=silent)
    with pytest.raises(FormatError, match="does not exist"):
        convert(tmp_path / "nowhere", ExportOptions(format="gptq", out=tmp_path / "o"), console=silent)
    leaky = tmp_path / "leaky"
    shutil.copytree(run / "checkpoint", leaky)
    (tmp_path / "secret").write_text("key")
    (leaky / "tokenizer_extra.json").symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError, match="is a link that leads out of"):
        convert(leaky, ExportOptions(format="gptq_v2", out=tmp_path / "o"), console=silent)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("format", ["gptq_v2", "compressed_tensors"])
def test_a_foreign_checkpoint_gets_an_adapter(
    tmp_path: Path, made_run: Any, recipe_for: Any, silent: Console, texts: dict[str, str], contents: Any, format: str
) -> None:
    run = made_run(bits=2, format=format, overrides={"*.up_proj": {"bits": 4}})
    checkpoint = foreign(run, tmp_path / "foreign")
    recipe = recipe_for("llama", rank=8, bits=8)  # what the recipe says of grids does not matter
    summary = adapt_checkpoint(checkpoint, recipe, tmp_path / "run", console=silent)
    assert summary.recipe.bits == 2
    assert_same_integers(tmp_path / "run", checkpoint)
    measured = summary.perplexity.models
    assert measured["adapter"].perplexity < measured["quantized"].perplexity
    assert RunDirectory.open(tmp_path / "run").recipe.codes_from == str(checkpoint)
    # It is a run like any other.
    before = contents(tmp_path / "run")
    adapt_checkpoint(checkpoint, recipe, tmp_path / "run", console=silent)
    assert contents(tmp_path / "run") == before
    adapt(tmp_path / "run", {"rank": 2, "adapter_name": "thin"}, console=silent)
    write_export(tmp_path / "run", ExportOptions(out=tmp_path / "out"), console=silent)
    assert inspect_folder(tmp_path / "out", verify=True).to_json()["certificate"]["modules"] == 14


def test_what_a_foreign_checkpoint_may_not_be(
    tmp_path: Path, made_run: Any, recipe_for: Any, silent: Console, model_folder: Any
) -> None:
    checkpoint = foreign(made_run(bits=2), tmp_path / "foreign")

    def adapted(recipe: Any) -> None:
        adapt_checkpoint(checkpoint, recipe, tmp_path / "run", console=silent)

    with pytest.raises(FormatError, match=r"belong to (another|different) model"):
        adapted(recipe_for("gpt-neox"))
    with pytest.raises(RecipeError, match=r"the override of bits for .* would change the codes"):
        adapted(recipe_for("llama", overrides={"*.q_proj": {"bits": 4}}))
    with pytest.raises(FormatError, match="is not a quantized checkpoint"):
        adapt_checkpoint(model_folder("llama"), recipe_for("llama"), tmp_path / "run", console=silent)
    assert not (tmp_path / "run").exists()
    adapted(recipe_for("llama"))
    other = foreign(made_run(bits=3), tmp_path / "other")
    shutil.rmtree(checkpoint)
    shutil.copytree(other, checkpoint)
    with pytest.raises(RunDirectoryError, match="holds another run"):
        adapted(recipe_for("llama"))


TRAVELS = {
    "preprocessor_config.json": '{"image_processor_type": "Gemma3ImageProcessor"}',
    "processor_config.json": '{"processor_class": "Gemma3Processor"}',
    "additional_chat_templates/tool_use.jinja": "{{ messages }}",
    "chat_template.jinja": "{{ messages }}",
    "tekken.json": "{}",
    "NOTICE": "said by somebody",
}
STAYS = {"modeling_gemma3.py": "raise SystemExit", "training_args.bin": "pickle", "notes.txt": "mine"}


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]) -> Path:
    """Return the folder of a wrapper with processors and named templates."""
    folder = Path(shutil.copytree(model_folder("gemma3"), tmp_path_factory.mktemp("wrapper") / "model"))
    (folder / "additional_chat_templates").mkdir()
    for name, text in {**TRAVELS, **STAYS}.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("format", ["gptq_v2", "compressed_tensors", "merged"])
def test_a_wrappers_export_has_its_files_and_its_names(
    tmp_path: Path, made_run: Any, wrapper: Path, silent: Console, format: str
) -> None:
    run = made_run("gemma3", model=str(wrapper), bits=4)
    out = tmp_path / "out"
    write_export(run, ExportOptions(format=format, out=out), console=silent)
    for name, text in TRAVELS.items():
        assert (out / name).read_text() == text
    assert not any((out / name).exists() for name in STAYS)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForConditionalGeneration"]
    assert set(TRAVELS) <= set(verify_certificate(out).certificate.files)
    names = {name.rpartition(".")[0] for name in cloq_tensors(out)}
    assert names == {name.rpartition(".")[0] for name in cloq_tensors(wrapper)}
    if format == "merged":
        model, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        expected = logits(dequantized_model(run, "cloq"))
        assert float((logits(model.float().eval()) - expected).abs().max() / expected.abs().max()) < 0.02


def cloq_tensors(folder: Path) -> set[str]:
    return {name for path in folder.glob("*.safetensors") for name in read_safetensors_header(path)[0]}


def test_an_adapter_for_a_foreign_wrapper_fits_its_checkpoint(
    tmp_path: Path, made_run: Any, wrapper: Path, recipe_for: Any, silent: Console
) -> None:
    run = made_run("gemma3", model=str(wrapper), bits=4)
    foreign = tmp_path / "foreign"
    write_export(run, ExportOptions(format="compressed_tensors", out=foreign), console=silent)
    shutil.rmtree(foreign / "adapters")
    (foreign / "cloq_certificate.json").unlink()
    config = json.loads((foreign / "config.json").read_text())
    del config["quantization_config"]["cloq"]
    (foreign / "config.json").write_text(json.dumps(config))
    recipe = recipe_for("gemma3", model=str(wrapper), codes_from=str(foreign))
    make_run(recipe, tmp_path / "run", console=silent)
    assert_same_integers(tmp_path / "run", foreign)
    served = logits(cloq_export.load(foreign, tmp_path / "run" / "adapters" / "cloq"))
    torch.testing.assert_close(served, logits(cloq_export.load(tmp_path / "run", "cloq")))
    converted = tmp_path / "converted"
    convert(foreign, ExportOptions(format="gptq_v2", out=converted), console=silent)
    assert_same_integers(converted, foreign)
    assert (converted / "processor_config.json").is_file()


def test_a_wrapper_is_no_decoder_graph(tmp_path: Path, made_run: Any, wrapper: Path, silent: Console) -> None:
    pytest.importorskip("onnxruntime_genai")
    run = made_run("gemma3", model=str(wrapper), bits=4)
    with pytest.raises(
        UnsupportedModelError, match=r"is a wrapper of the type gemma3, and an ONNX export is a decoder"
    ):
        write_export(run, ExportOptions(format="onnx", out=tmp_path / "out"), console=silent)
    assert not (tmp_path / "out").exists()


def test_a_merged_export_writes_a_tied_head_with_a_pair_apart(tmp_path: Path, made_run: Any, silent: Console) -> None:
    run = made_run(bits=4)
    generator = torch.Generator().manual_seed(3)
    pair = LoraPair(0.1 * torch.randn(4, 64, generator=generator), 0.1 * torch.randn(96, 4, generator=generator), 4.0)
    adapter = tmp_path / "adapter"
    write_adapter(adapter, {"lm_head": pair}, base_model="", base_fingerprint=Checkpoint.open(run).fingerprint)
    options = ExportOptions(format="merged", adapters=(str(adapter),), out=tmp_path / "out")
    summary = write_export(run, options, console=silent)
    assert "lm_head.weight has a pair, so it is written apart from model.embed_tokens.weight" in summary.notes
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").float().eval()
    assert not model.config.tie_word_embeddings
    expected = logits(dequantized_model(run, adapter))
    assert float((logits(model) - expected).abs().max() / expected.abs().max()) < 0.02
    if importlib.util.find_spec("onnxruntime_genai") is not None:
        with pytest.raises(BindingError, match=r"adapts lm_head .*the graph has no inputs for it"):
            write_export(run, dataclasses.replace(options, format="onnx", out=tmp_path / "onnx"), console=silent)
