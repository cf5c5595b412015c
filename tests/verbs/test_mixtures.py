"""Mixtures of experts from a model folder to files and back, against the family's own fused computation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from tiny_mixtures import MIXTURES

import cloq_export
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.engines.packed_linear import PackedLinear
from cloq_export.errors import UnsupportedModelError
from cloq_export.files.safe_tensors import read_safetensors_header
from cloq_export.models.experts import fused_experts, split_experts
from cloq_export.models.source import open_model
from cloq_export.recipe import Recipe
from cloq_export.verbs.export import export as write_export
from cloq_export.verbs.options import ExportOptions
from cloq_export.verbs.run import run as make_run
from cloq_export.verbs.summary import RunSummary

TOLERANCE = 1e-4  # of a log-probability, what the project promises in float32
KINDS = ("qwen3-moe", "mixtral", "gpt-oss", "llama4", "deepseek-v3")
FAST = ("mixtral", "gpt-oss", "deepseek-v3")
# The error-aware mode goes through blocks in another way; a family of each kind of storage is enough for it.
CASES = [
    pytest.param(family, error_aware, marks=() if family in FAST and error_aware == 0.0 else pytest.mark.slow)
    for family in MIXTURES
    for error_aware in (0.0, 0.5)
    if family in KINDS or error_aware == 0.0
]

RecipeFor = Callable[..., Recipe]
RunRecipe = Callable[[Recipe], tuple[RunDirectory, RunSummary]]


@pytest.fixture(autouse=True)
def _several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut four windows of 32 tokens into two batches, as real calibration sets are."""
    monkeypatch.setattr("cloq_export.compress.strategies.TOKENS_PER_BATCH", 64)


@pytest.fixture
def run_recipe(tmp_path: Path, silent: Console) -> RunRecipe:
    def run(recipe: Recipe) -> tuple[RunDirectory, RunSummary]:
        summary = make_run(recipe, tmp_path / "run", console=silent)
        return RunDirectory.open(tmp_path / "run"), summary

    return run


def log_probabilities(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)  # type: ignore[no-any-return]


def reference(recipe: Recipe, run: RunDirectory, *, adapted: bool) -> torch.Tensor:
    """Return what the source says with `Q + B A` in place of each weight, its experts fused as its class has them."""
    model: Any = open_model(recipe.model).model
    with torch.no_grad():
        for module in run.completed_modules():
            layer = run.read_layer(module)
            weight = layer.quantized.dequantize()
            if adapted and layer.lora is not None:
                weight = weight + layer.lora.product()
            model.get_submodule(module).weight.copy_(weight)
    with fused_experts(model):
        return log_probabilities(model)


@pytest.mark.parametrize(("family", "error_aware"), CASES)
def test_what_is_loaded_is_what_the_family_computes_from_the_codes(
    family: str, error_aware: float, recipe_for: RecipeFor, run_recipe: RunRecipe, tmp_path: Path, silent: Console
) -> None:
    recipe = recipe_for(family, bits=4, error_aware=error_aware)
    run, _ = run_recipe(recipe)
    expected = reference(recipe, run, adapted=True)
    assert expected.std() > 0.5, "a flat distribution would hide a wrong weight"
    served = cloq_export.load(run.path, adapter="cloq")
    assert (log_probabilities(served) - expected).abs().max() <= TOLERANCE
    experts = {name for name in run.completed_modules() if ".experts." in name}
    assert {
        name for name, module in served.named_modules() if isinstance(module, PackedLinear) and ".experts." in name
    } == experts
    layers = {".".join(name.split(".")[:3]) for name in experts}
    assert len(experts) == len(layers) * 4 * (2 if family == "nemotron-h" else 3)
    write_export(run.path, ExportOptions(format="compressed_tensors", out=tmp_path / "export"), console=silent)
    exported = cloq_export.load(tmp_path / "export", adapter=tmp_path / "export" / "adapters" / "cloq")
    assert (log_probabilities(exported) - expected).abs().max() <= TOLERANCE


def test_adapters_of_experts_are_asked_for(recipe_for: RecipeFor, run_recipe: RunRecipe) -> None:
    recipe = recipe_for("qwen3-moe", bits=2, expert_rank=2)
    run, summary = run_recipe(recipe)
    ranks = {name: run.read_layer(name).certificate.rank for name in run.completed_modules()}
    assert {rank for name, rank in ranks.items() if ".experts." in name} == {2}
    assert {rank for name, rank in ranks.items() if ".experts." not in name} == {4}
    assert not [note for note in summary.notes if "adapter" in note]
    served = cloq_export.load(run.path, adapter="cloq")
    assert (log_probabilities(served) - reference(recipe, run, adapted=True)).abs().max() <= TOLERANCE


def test_experts_without_adapters_are_said(recipe_for: RecipeFor, run_recipe: RunRecipe) -> None:
    run, summary = run_recipe(recipe_for("qwen3-moe"))
    assert "12 linear layers of experts get no adapter; `expert_rank` gives them one" in summary.notes
    assert all(run.read_layer(name).lora is None for name in run.completed_modules() if ".experts." in name)


def test_files_hold_single_experts_under_the_names_of_the_hub(recipe_for: RecipeFor, run_recipe: RunRecipe) -> None:
    run, _ = run_recipe(recipe_for("mixtral"))
    held = read_safetensors_header(run.checkpoint_path / "model.safetensors")[0]
    assert "model.layers.0.block_sparse_moe.experts.3.w1.qweight" in held
    assert "model.layers.0.block_sparse_moe.gate.weight" in held
    assert not [name for name in held if ".mlp." in name]


def test_routers_are_named_among_what_is_not_quantized(
    recipe_for: RecipeFor, run_recipe: RunRecipe, tmp_path: Path, silent: Console
) -> None:
    run, _ = run_recipe(recipe_for("mixtral", bits=4))
    write_export(run.path, ExportOptions(format="compressed_tensors", out=tmp_path / "export"), console=silent)
    ignored = json.loads((tmp_path / "export" / "config.json").read_text())["quantization_config"]["ignore"]
    # An engine's router is a linear layer, and would be looked for among the quantized ones.
    assert {f"model.layers.{number}.block_sparse_moe.gate" for number in (0, 1)} <= set(ignored)


def certificates(run: RunDirectory, name: str) -> list[Any]:
    return [run.read_layer(f"{name}.{number}.gate_proj").certificate for number in range(4)]


@pytest.mark.parametrize("error_aware", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_all_tokens_calibrate_every_expert_on_demand(
    error_aware: float, recipe_for: RecipeFor, run_recipe: RunRecipe
) -> None:
    run, _ = run_recipe(recipe_for("mixtral", experts="all", error_aware=error_aware))
    assert [one.tokens for one in certificates(run, "model.layers.0.mlp.experts")] == [128] * 4
    assert not [note for one in run.certificates() for note in one.notes if "expert" in note]


@pytest.mark.parametrize("error_aware", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_an_expert_that_saw_too_few_tokens_is_lent_others_and_says_so(
    error_aware: float, tmp_path: Path, recipe_for: RecipeFor, silent: Console
) -> None:
    """One router never chooses the last expert; all that it is calibrated on are other tokens of its block."""
    recipe = recipe_for("mixtral", bits=4, error_aware=error_aware)
    model = transformers.AutoModelForCausalLM.from_pretrained(recipe.model)
    with torch.no_grad():
        gate = model.model.layers[0].mlp.gate.weight
        gate[3] = 0.0
        gate[1], gate[2] = -gate[0], gate[0]
    model.save_pretrained(tmp_path / "model")
    for path in Path(recipe.model).glob("token*"):
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    make_run(recipe.changed({"model": str(tmp_path / "model")}), tmp_path / "run", console=silent)
    run = RunDirectory.open(tmp_path / "run")
    seen = certificates(run, "model.layers.0.mlp.experts")
    assert sum(one.tokens for one in seen) == 2 * 4 * 32
    for one in seen:
        share = math.floor(0.5 + 100 * max(0, 64 - one.tokens) / 64)
        said = f"{one.tokens} calibration tokens reached this expert, too few for 64 inputs: {share}% of H is of other"
        assert any(note.startswith(said) for note in one.notes) == (one.tokens < 64)
    starved = min(seen, key=lambda one: one.tokens)
    assert starved.tokens < 64
    # It is solved like any other, where a layer that no token reaches is rounded to nearest.
    assert starved.method == "optq"
    assert starved.error_quantized < 0.2


def test_merged_weights_of_a_family_whose_files_hold_fused_experts_are_refused(
    recipe_for: RecipeFor, run_recipe: RunRecipe, tmp_path: Path, silent: Console
) -> None:
    run, _ = run_recipe(recipe_for("gpt-oss"))
    with pytest.raises(UnsupportedModelError, match=r"GptOssForCausalLM reads experts fused .* `format=gptq_v2`"):
        write_export(run.path, ExportOptions(format="merged", out=tmp_path / "merged"), console=silent)
    assert not (tmp_path / "merged").exists()


def test_merged_weights_are_read_by_transformers_itself(
    recipe_for: RecipeFor, run_recipe: RunRecipe, tmp_path: Path, silent: Console
) -> None:
    recipe = recipe_for("mixtral", expert_rank=2)
    run, _ = run_recipe(recipe)
    write_export(run.path, ExportOptions(format="merged", out=tmp_path / "merged", dtype="float16"), console=silent)
    merged, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    # Not the logits: rounding may send a token to another expert.
    split_experts(merged)
    for module in run.completed_modules():
        layer = run.read_layer(module)
        assert layer.lora is not None
        expected = layer.quantized.dequantize() + layer.lora.product()
        # Half a unit in the last place of float16, and float32's own rounding.
        torch.testing.assert_close(merged.get_submodule(module).weight, expected, rtol=2**-11 + 1e-5, atol=1e-7)
