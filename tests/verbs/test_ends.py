"""Codes of head and embeddings: made, stored, read back and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console

import cloq_export
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.artifact.stored_sizes import stored_sizes
from cloq_export.engines.packed_embedding import PackedRows
from cloq_export.engines.packed_linear import PackedLinear
from cloq_export.errors import CloqError, FormatError, RecipeError, ShapeError, UnsupportedModelError, UsageError
from cloq_export.models.source import open_model
from cloq_export.quantize import QuantizeOptions, quantize_group
from cloq_export.recipe import Recipe
from cloq_export.verbs.export import export as write_export
from cloq_export.verbs.inspect import inspect
from cloq_export.verbs.options import ExportOptions
from cloq_export.verbs.recording import probe_model
from cloq_export.verbs.run import run as make_run
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verify import verify

HEAD, EMBEDDINGS = "lm_head", "model.embed_tokens"
RecipeFor = Callable[..., Recipe]
Contents = Callable[[Path], dict[str, str]]


def log_probabilities(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)  # type: ignore[no-any-return]


def reference(recipe: Recipe, run: RunDirectory) -> torch.Tensor:
    """Return what the source says with `Q + B A` in place of each weight, its head and embeddings apart."""
    model: Any = open_model(recipe.model).model
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    with torch.no_grad():
        for module in run.completed_modules():
            layer = run.read_layer(module)
            weight = layer.quantized.dequantize()
            model.get_submodule(module).weight.copy_(weight if layer.lora is None else weight + layer.lora.product())
    return log_probabilities(model)


@pytest.mark.parametrize(
    ("family", "head", "embeddings"),
    [
        pytest.param("qwen2", 8, 0, id="head", marks=pytest.mark.slow),
        pytest.param("qwen2", 0, 4, id="embeddings", marks=pytest.mark.slow),
        pytest.param("llama", 4, 4, id="tied"),
        pytest.param("gemma2", 8, 8, id="tied and scaled", marks=pytest.mark.slow),
    ],
)
def test_what_is_loaded_computes_from_the_codes(
    family: str, head: int, embeddings: int, recipe_for: RecipeFor, tmp_path: Path, silent: Console
) -> None:
    recipe = recipe_for(family, head_bits=head, embedding_bits=embeddings, format="compressed_tensors")
    summary = make_run(recipe, tmp_path / "run", console=silent)
    run = RunDirectory.open(tmp_path / "run")
    ends = {name: run.read_layer(name) for name in run.completed_modules() if ".layers." not in name}
    asked = {HEAD: head, EMBEDDINGS: embeddings}
    assert {name: layer.quantized.spec.bits for name, layer in ends.items()} == {n: b for n, b in asked.items() if b}
    assert all(layer.quantized.spec.symmetric and layer.lora is None for layer in ends.values())
    expected = reference(recipe, run)
    served = cloq_export.load(run.path, adapter="cloq")
    assert isinstance(served.get_output_embeddings(), PackedLinear) == bool(head)
    assert isinstance(served.get_input_embeddings(), PackedRows) == bool(embeddings)
    assert (log_probabilities(served) - expected).abs().max() <= 1e-4
    half = cloq_export.load(run.path, adapter="cloq", dtype=torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(recipe.model)
    assert probe_model(half, tokenizer).precision == "bfloat16", "a gate compares it by the limit of its precision"
    out = tmp_path / "export"
    write_export(run.path, ExportOptions(out=out), console=silent)
    assert (log_probabilities(cloq_export.load(out, adapter="cloq")) - expected).abs().max() <= 1e-4
    dense = cloq_export.dequantized_model(out, adapter="cloq")
    assert (log_probabilities(dense) - expected).abs().max() <= 1e-4
    config = json.loads((out / "config.json").read_text())
    assert config.get("tie_word_embeddings", True) is False
    assert HEAD in config["quantization_config"]["ignore"] or head
    weights = sum(layer.quantized.codes.numel() for layer in (run.read_layer(n) for n in run.completed_modules()))
    assert stored_sizes(out).quantized_weights == weights
    assert summary.stored["bits_per_weight_base"] == stored_sizes(run.path).bits_per_weight
    assert inspect(out, verify=True).sizes is not None


@pytest.mark.slow
def test_the_proof_holds_over_both(recipe_for: RecipeFor, tmp_path: Path, silent: Console) -> None:
    recipe = recipe_for("llama", head_bits=4, embedding_bits=4, format="compressed_tensors")
    make_run(recipe, tmp_path / "run", console=silent)
    write_export(tmp_path / "run", ExportOptions(out=tmp_path / "export"), console=silent)
    short = {"window": 16, "windows": 4, "prompts": 2, "new_tokens": 3, "liveness_tokens": 16}
    options = VerifyOptions(reference=recipe.model, text=recipe.eval_text, **short)
    report = verify(tmp_path / "export", options, console=silent)
    assert report.passed, (report.gates, report.missing)


def test_the_head_is_solved_on_what_it_meets(recipe_for: RecipeFor, tmp_path: Path, silent: Console) -> None:
    recipe = recipe_for("qwen2", head_bits=4, embedding_bits=4, format="compressed_tensors", grid="minmax")
    make_run(recipe, tmp_path / "run", console=silent)
    run = RunDirectory.open(tmp_path / "run")
    head, embeddings = run.read_layer(HEAD), run.read_layer(EMBEDDINGS)
    assert head.certificate is not None
    assert embeddings.certificate is not None
    assert (head.certificate.tokens, head.certificate.method) == (128, "optq")
    assert (embeddings.certificate.tokens, embeddings.certificate.method) == (0, "rtn")
    assert embeddings.certificate.notes == ()
    model = open_model(recipe.model).model
    for name, layer in ((HEAD, head), (EMBEDDINGS, embeddings)):
        weight = model.get_submodule(name).weight.detach()
        rounded = quantize_group([weight], layer.quantized.spec, None, QuantizeOptions(method="rtn", grid="minmax"))
        same = torch.equal(rounded.layers[0].codes, layer.quantized.codes)
        assert same == (name == EMBEDDINGS)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [5, 14, 15])
def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    stop: int, recipe_for: RecipeFor, tmp_path: Path, silent: Console, contents: Contents, monkeypatch: Any
) -> None:
    options = {"head_bits": 8, "embedding_bits": 8, "format": "compressed_tensors"}
    make_run(recipe_for("llama", **options), tmp_path / "whole", console=silent)
    write, written = RunDirectory.write_layer, []

    def write_some(self: RunDirectory, name: str, *rest: object) -> None:
        if len(written) == stop:
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, *rest)  # type: ignore[arg-type]

    streamed = recipe_for("llama", **options, stream="always")
    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "write_layer", write_some)
        with pytest.raises(KeyboardInterrupt):
            make_run(streamed, tmp_path / "stopped", console=silent)
    assert (HEAD in written) == (stop == 15)
    make_run(streamed, tmp_path / "stopped", console=silent)
    expected, found = (
        {
            name: digest
            for name, digest in contents(tmp_path / folder).items()
            if name not in ("run.json", "recipe.yaml")
        }
        for folder in ("whole", "stopped")
    )
    assert found == expected


@pytest.mark.parametrize(
    ("family", "options", "kind", "told"),
    [
        (
            "llama",
            {"head_bits": 8},
            RecipeError,
            "head_bits is 8, but head and embeddings of this model are one tensor",
        ),
        ("llama", {"embedding_bits": 4}, RecipeError, "set both head_bits and embedding_bits, or neither"),
        ("qwen2", {"embedding_bits": 8, "format": "gptq_v2"}, RecipeError, "gptq_v2 has no place for codes of embedd"),
        ("qwen2", {"head_bits": 8, "budget": 4.0}, RecipeError, "budget is about the layers of blocks alone"),
        (
            "qwen2",
            {"head_bits": 8, "group_size": 128},
            ShapeError,
            "lm_head: a layer with 64 inputs cannot be cut into",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(
    family: str,
    options: dict[str, Any],
    kind: type[CloqError],
    told: str,
    recipe_for: RecipeFor,
    tmp_path: Path,
    silent: Console,
) -> None:
    recipe = recipe_for(
        family, **{"format": "compressed_tensors", "overrides": {"*_proj": {"group_size": 32}}, **options}
    )
    with pytest.raises(kind) as error:
        make_run(recipe, tmp_path / "run", console=silent)
    assert told in str(error.value)
    assert not (tmp_path / "run").exists()


def test_widths_of_ends_are_4_and_8() -> None:
    with pytest.raises(RecipeError, match="head_bits is 3; allowed are 0, 4 and 8"):
        Recipe(head_bits=3)


def test_layouts_and_engines_without_a_place_are_refused(
    recipe_for: RecipeFor, tmp_path: Path, silent: Console
) -> None:
    recipe = recipe_for("qwen2", head_bits=4, embedding_bits=4, symmetric=True, format="compressed_tensors")
    make_run(recipe, tmp_path / "run", console=silent)
    with pytest.raises(
        FormatError, match=r"the layout gptq_v2 cannot hold model\.embed_tokens, the codes of embeddings"
    ):
        write_export(tmp_path / "run", ExportOptions(format="gptq_v2"), console=silent)
    with pytest.raises(UnsupportedModelError, match="an ONNX export has floats of embeddings alone"):
        write_export(tmp_path / "run", ExportOptions(format="onnx"), console=silent)
    with pytest.raises(
        UsageError, match=r"reads no codes of embeddings in compressed_tensors on CPU, and model\.embed_to"
    ):
        write_export(tmp_path / "run", ExportOptions(target="vllm==0.32", device="cpu"), console=silent)
    result = write_export(tmp_path / "run", ExportOptions(target="vllm==0.32"), console=silent)
    assert result.devices == ("cuda",)
    config = json.loads((result.folder / "config.json").read_text())["quantization_config"]
    # One grid for all; vLLM finds a head by its name alone, and embeddings by their class where they have no name.
    assert config["config_groups"]["group_0"]["targets"] == ["Linear", "Embedding", HEAD, EMBEDDINGS]
    assert config["ignore"] == []
