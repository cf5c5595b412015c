"""From a model folder to files, and back: what is loaded is what was computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from layers_as_made import TOLERANCE, assert_close, block_linears, log_probabilities, reference_model, stored_layers
from rich.console import Console
from run_modes import ERROR_AWARE, INDEPENDENT, modes
from torch import nn

import cloq_export
from cloq_export.engines.packed_linear import PackedLinear
from cloq_export.engines.transformers.loading import dequantized_model
from cloq_export.errors import RecipeError
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.models.source import open_model
from cloq_export.quantize.grid import fit_grid, round_to_grid
from cloq_export.recipe import Recipe
from cloq_export.verbs.inspect import inspect as inspect_folder
from cloq_export.verbs.run import run as make_run

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"bits": 2}),
    ("qwen2", {"bits": 3}),
    ("qwen3", {"bits": 4, "split": "balanced"}),
    ("gemma2", {"bits": 8, "adapter_dtype": "bfloat16"}),
    ("phi3", {"bits": 3, "symmetric": True}),
    ("gpt-neox", {"bits": 2, "group_size": -1, "adapter_dtype": "float32"}),
    ("opt", {"bits": 4, "group_size": -1, "symmetric": True}),
    ("plain-experts", {"bits": 2, "group_size": 16, "expert_rank": 4}),
]
RecipeFor = Callable[..., Recipe]


@pytest.mark.parametrize(
    ("family", "options", "mode"),
    [
        pytest.param(family, options, mode, id=f"{family}-{name}", marks=() if fast else pytest.mark.slow)
        for number, (family, options) in enumerate(CASES)
        # Every family once, with one mode and the other in turn.
        for name, mode, fast in (
            ("independent", INDEPENDENT, number % 2 == 0),
            ("error-aware", ERROR_AWARE, number % 2 == 1),
        )
    ],
)
def test_what_is_loaded_is_what_was_computed(
    family: str, options: dict[str, Any], mode: dict[str, float], recipe_for: RecipeFor, run_recipe: Any
) -> None:
    recipe = recipe_for(family, **options, **mode)
    run, summary = run_recipe(recipe)
    assert run.state == "done"
    layers = stored_layers(run)
    source = open_model(recipe.model).model
    assert set(layers) == block_linears(source)
    for layer in layers.values():
        assert (layer.quantized.spec.bits, layer.quantized.spec.symmetric) == (recipe.bits, recipe.symmetric)
        assert layer.lora is not None
        assert str(layer.lora.lora_A.dtype) == f"torch.{recipe.adapter_dtype}"

    served = cloq_export.load(run.path, adapter="cloq")
    assert {
        name.removesuffix(".base_layer") for name, module in served.named_modules() if isinstance(module, PackedLinear)
    } == set(layers)
    adapted = reference_model(recipe, layers, adapted=True)
    assert_close(served, adapted)
    assert_close(dequantized_model(run.path, "cloq", merged=False), adapted)
    plain = reference_model(recipe, layers, adapted=False)
    assert_close(cloq_export.load(run.path), plain)
    assert not torch.allclose(log_probabilities(plain), log_probabilities(adapted), atol=TOLERANCE)

    upstream = peft.PeftModel.from_pretrained(plain, run.adapter_path("cloq"))
    assert_close(upstream, served)

    assert summary.layers.count == len(layers)
    assert summary.perplexity.to_json() == run.read_report("evaluation")
    assert summary.perplexity.tokens == 4 * 15
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.checkpoint_path)
    assert (
        tokenizer("w1 w2")["input_ids"]
        == transformers.AutoTokenizer.from_pretrained(recipe.model)("w1 w2")["input_ids"]
    )


@modes
def test_overrides_choose_bits_groups_ranks_and_what_stays_float(
    mode: dict[str, float], recipe_for: RecipeFor, run_recipe: Any
) -> None:
    overrides = {
        "*.1.mlp.down_proj": {"skip": True},
        "*.down_proj": {"bits": 4, "group_size": -1},
        "*.q_proj": {"rank": 0},
        "*.k_proj": {"rank": 8, "bits": 3},
        "model.layers.0.*": {"skip": False},
    }
    recipe = recipe_for("llama", bits=2, overrides=overrides, **mode)
    run, summary = run_recipe(recipe)
    layers = stored_layers(run)
    source = open_model(recipe.model).model
    assert block_linears(source) - set(layers) == {"model.layers.1.mlp.down_proj"}
    assert summary.layers.bits == {"2": 10, "3": 2, "4": 1}
    assert summary.layers.group_size == {"-1": 1, "32": 12}
    assert summary.layers.rank == {"0": 2, "4": 9, "8": 2}
    for module, layer in layers.items():
        kind = module.rpartition(".")[2]
        spec = layer.quantized.spec
        assert spec.bits == {"down_proj": 4, "k_proj": 3}.get(kind, 2)
        assert spec.group_size == (-1 if kind == "down_proj" else 32)
        rank = {"q_proj": 0, "k_proj": 8}.get(kind, 4)
        assert (layer.lora.rank if layer.lora else 0) == rank
        certificate = layer.certificate
        assert certificate is not None
        assert certificate.rank == rank
        if not rank:
            assert certificate.error_adapted == certificate.error_bound == certificate.error_quantized
    served = cloq_export.load(run.path, adapter="cloq")
    assert type(served.model.layers[1].mlp.down_proj) is nn.Linear
    assert torch.equal(served.model.layers[1].mlp.down_proj.weight, source.model.layers[1].mlp.down_proj.weight)
    assert_close(served, reference_model(recipe, layers, adapted=True))
    described = inspect_folder(run.path, verify=True).to_json()
    assert described["kind"] == "run"


def test_a_pattern_that_matches_nothing_and_a_model_that_is_all_skipped(
    tmp_path: Path, recipe_for: RecipeFor, silent: Console
) -> None:
    with pytest.raises(RecipeError, match=r"'\*\.out_proj' matches no linear layer; names look like 'model\.layers\.0"):
        make_run(recipe_for("llama", overrides={"*.out_proj": {"bits": 4}}), tmp_path / "one", console=silent)
    with pytest.raises(RecipeError, match="every linear layer is skipped"):
        make_run(recipe_for("llama", overrides={"*": {"skip": True}}), tmp_path / "two", console=silent)


@modes
def test_an_expert_that_no_token_reaches_is_rounded_and_says_so(
    mode: dict[str, float], recipe_for: RecipeFor, run_recipe: Any
) -> None:
    recipe = recipe_for("plain-experts", bits=4, expert_rank=4, **mode)
    run, summary = run_recipe(recipe)
    source = open_model(recipe.model).model
    layers = stored_layers(run)
    unreached = [module for module in layers if ".experts.3." in module]
    assert len(unreached) == 6
    for module in unreached:
        certificate, lora, quantized = layers[module].certificate, layers[module].lora, layers[module].quantized
        assert certificate is not None
        assert lora is not None
        assert certificate.notes == (
            "no calibration token reached this layer: rounded to nearest, no adapter correction",
        )
        assert (certificate.method, certificate.tokens, certificate.damping) == ("rtn", 0, 0.0)
        assert certificate.error_adapted == certificate.error_quantized < 0.2
        assert not lora.lora_B.any()
        assert lora.lora_A.any()
        weight = source.get_submodule(module).weight.detach()
        scales, zeros = fit_grid(weight, quantized.spec, recipe.grid)
        spread = [values.float().repeat_interleave(32, dim=1) for values in (scales, zeros)]
        assert torch.equal(quantized.codes, round_to_grid(weight, *spread, 15).to(torch.uint8))
    # The other experts and the attention are calibrated: together they saw every token.
    reached = [layers[f"model.layers.0.mlp.experts.{number}.up_proj"].certificate for number in range(3)]
    assert sum(certificate.tokens for certificate in reached if certificate is not None) == 4 * 32
    assert all(certificate is not None and certificate.method == "optq" for certificate in reached)
    assert "and" in summary.layers.warnings[-1]
    notes = [note for entry in run.read_report("layers")["layers"] for note in entry["notes"]]
    assert sum("no calibration token" in note for note in notes) == 6
    assert sum("H has at most rank" in note for note in notes) > 0


def test_routers_stay_float(recipe_for: RecipeFor, run_recipe: Any) -> None:
    recipe = recipe_for("plain-experts")
    run, _ = run_recipe(recipe)
    held = read_safetensors(run.checkpoint_path / "model.safetensors")[0]
    source = open_model(recipe.model).model
    for index in range(2):
        name = f"model.layers.{index}.mlp.gate.weight"
        assert torch.equal(held[name], source.get_parameter(name))


@pytest.mark.parametrize("method", ["rtn", "magr"])
def test_the_other_methods(method: str, recipe_for: RecipeFor, run_recipe: Any) -> None:
    recipe = recipe_for("llama", bits=3, method=method, grid="minmax", svd="full", refit=method == "magr")
    run, _ = run_recipe(recipe)
    layers = stored_layers(run)
    assert {layer.certificate.method for layer in layers.values() if layer.certificate} == {method}
    assert_close(cloq_export.load(run.path, adapter="cloq"), reference_model(recipe, layers, adapted=True))
    if method == "rtn":
        weight = open_model(recipe.model).model.get_submodule("model.layers.1.mlp.up_proj").weight.detach()
        quantized = layers["model.layers.1.mlp.up_proj"].quantized
        assert (weight - quantized.dequantize()).abs().max() <= 0.51 * quantized.scales.float().max()


def test_half_precision_sources_keep_their_dtype(
    model_folder: Callable[..., Path], recipe_for: RecipeFor, run_recipe: Any
) -> None:
    recipe = recipe_for("llama", model=str(model_folder("llama", torch.bfloat16)))
    run, _ = run_recipe(recipe)
    held = read_safetensors(run.checkpoint_path / "model.safetensors")[0]
    assert {tensor.dtype for name, tensor in held.items() if "norm" in name or "embed" in name} == {torch.bfloat16}
    assert cloq_export.load(run.path).dtype == torch.bfloat16
    assert_close(
        cloq_export.load(run.path, adapter="cloq", dtype=torch.float32),
        reference_model(recipe, stored_layers(run), adapted=True),
    )


def test_rank_0_makes_no_adapter(recipe_for: RecipeFor, run_recipe: Any) -> None:
    recipe = recipe_for("llama", rank=0)
    run, summary = run_recipe(recipe)
    assert run.adapters.names == []
    assert set(summary.perplexity.models) >= {"float", "quantized"}
    assert "adapter" not in summary.perplexity.models
    assert_close(cloq_export.load(run.path), reference_model(recipe, stored_layers(run), adapted=False))


def test_small_shards(recipe_for: RecipeFor, run_recipe: Any) -> None:
    recipe = recipe_for("qwen2", max_shard_size="20KB")
    run, _ = run_recipe(recipe)
    assert len(list(run.checkpoint_path.glob("model-*.safetensors"))) > 2
    assert_close(cloq_export.load(run.path, adapter="cloq"), reference_model(recipe, stored_layers(run), adapted=True))


def test_the_version_1_layout_serves_the_same(recipe_for: RecipeFor, run_recipe: Any) -> None:
    recipe = recipe_for("llama", bits=2, symmetric=True, format="gptq")
    run, _ = run_recipe(recipe)
    config = json.loads((run.checkpoint_path / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == "gptq"
    assert_close(cloq_export.load(run.path, adapter="cloq"), reference_model(recipe, stored_layers(run), adapted=True))


def test_few_tokens_for_the_width_are_said(recipe_for: RecipeFor, run_recipe: Any) -> None:
    run, summary = run_recipe(recipe_for("llama", samples=1, seqlen=24))
    assert any("24 calibration tokens are fewer than the 96 inputs of the widest layer" in n for n in summary.notes)
    notes = {note for certificate in run.certificates() for note in certificate.notes}
    assert "24 calibration tokens for 64 inputs: H has at most rank 24, damping decides the rest" in notes


def test_the_summary_says_where_things_are_and_what_they_take(recipe_for: RecipeFor, run_recipe: Any) -> None:
    recipe = recipe_for("llama", bits=3)
    run, summary = run_recipe(recipe)
    assert json.loads(json.dumps(summary.to_json(), allow_nan=False))["bits"] == 3
    assert summary.recipe.preset_name == recipe.preset_name
    for path in summary.files.values():
        assert Path(path).exists()
    weights = sum(layer.quantized.codes.numel() for layer in stored_layers(run).values())
    stored = sum(layer.quantized.stored_bits for layer in stored_layers(run).values())
    assert summary.stored["bits_per_weight_base"] == pytest.approx(stored / weights)
    assert summary.stored["bits_per_weight_with_adapter"] > summary.stored["bits_per_weight_base"]
    worst = max(run.certificates(), key=lambda certificate: certificate.error_adapted)
    assert summary.layers.worst_module == worst.module
    assert set(summary.seconds) == {"read model", "forward and statistics", "solve", "write", "measure"}
    assert summary.to_json()["peak_memory_bytes"] > 0
