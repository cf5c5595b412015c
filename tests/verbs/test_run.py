"""From a model folder to files, and back: what is loaded is what was computed, on what the layers really meet."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from rich.console import Console
from torch import nn

import cloq_export
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.artifact.run_layers import StoredLayer
from cloq_export.cli.gates import measured_value
from cloq_export.engines.packed_linear import PackedLinear
from cloq_export.engines.transformers.loading import dequantized_model
from cloq_export.errors import RecipeError, RunDirectoryError, ShapeError, UsageError
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.models.source import open_model
from cloq_export.quantize.grid import fit_grid, round_to_grid
from cloq_export.recipe import Recipe
from cloq_export.texts.corpora import sample_windows, tokenize_text
from cloq_export.verbs.adapt import adapt
from cloq_export.verbs.evaluate import evaluate
from cloq_export.verbs.inspect import inspect as inspect_folder
from cloq_export.verbs.options import EvaluateOptions
from cloq_export.verbs.quantize import quantize
from cloq_export.verbs.run import run as make_run
from cloq_export.verbs.summary import RunSummary

TOLERANCE = 1e-4  # of a log-probability, what the project promises in float32
INDEPENDENT, ERROR_AWARE = {"error_aware": 0.0}, {"error_aware": 0.5}
modes = pytest.mark.parametrize("mode", [INDEPENDENT, ERROR_AWARE], ids=["independent", "error-aware"])

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


@pytest.fixture(autouse=True)
def _several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut four windows of 32 tokens into two batches, as real calibration sets are."""
    monkeypatch.setattr("cloq_export.compress.strategies.TOKENS_PER_BATCH", 64)


@pytest.fixture
def run_recipe(tmp_path: Path, silent: Console) -> Callable[..., tuple[RunDirectory, RunSummary]]:
    def run(recipe: Recipe, name: str = "run") -> tuple[RunDirectory, RunSummary]:
        summary = make_run(recipe, tmp_path / name, console=silent)
        return RunDirectory.open(tmp_path / name), summary

    return run


def stored_layers(run: RunDirectory) -> dict[str, StoredLayer]:
    return {module: run.read_layer(module) for module in sorted(run.completed_modules())}


def block_linears(model: nn.Module) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name and name.rpartition(".")[2] != "gate"
    }


def reference_model(recipe: Recipe, layers: Mapping[str, StoredLayer], *, adapted: bool) -> Any:
    """Return the source with `Q + B A` in place of each weight, made without any code that writes or reads layouts."""
    model = open_model(recipe.model).model
    with torch.no_grad():
        for module, layer in layers.items():
            weight = layer.quantized.dequantize()
            if adapted and layer.lora is not None:
                weight = weight + layer.lora.lora_B.float() @ layer.lora.lora_A.float() * layer.lora.scaling
            model.get_submodule(module).weight.copy_(weight)
    return model


def log_probabilities(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 17, (2, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=ids).logits.float(), dim=-1)


def assert_close(model: Any, reference: Any, tolerance: float = TOLERANCE) -> None:
    expected = log_probabilities(reference)
    assert expected.std() > 0.5, "a flat distribution would hide a wrong weight"
    assert (log_probabilities(model) - expected).abs().max() <= tolerance


@modes
@pytest.mark.parametrize(("family", "options"), CASES, ids=[family for family, _ in CASES])
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


def calibration_windows(recipe: Recipe) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(recipe.model)
    ids = tokenize_text(tokenizer, Path(recipe.calibration).read_text())
    return sample_windows(ids, recipe.samples, recipe.seqlen, recipe.seed)


def inputs_met(model: nn.Module, modules: Iterable[str], windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what each linear of a whole model is given on the windows, (tokens, in) float64."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]).double())
        )
        for name in modules
    ]
    with torch.no_grad():
        model(windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
@pytest.mark.parametrize(
    "mode",
    [INDEPENDENT, {**ERROR_AWARE, "float_share": 0.5}, {**ERROR_AWARE, "float_share": 1.0}],
    ids=["independent", "half paired", "all paired"],
)
def test_certificates_hold_on_what_the_layers_really_meet(
    family: str, mode: dict[str, float], recipe_for: RecipeFor, run_recipe: Any
) -> None:
    """Every figure again in float64, from whole models: the float one, and the compressed one as it is served."""
    recipe = recipe_for(family, bits=2, overrides={"*.layers.1.*": {"bits": 4}}, **mode)
    run, _ = run_recipe(recipe)
    layers = stored_layers(run)
    source = open_model(recipe.model).model
    windows = calibration_windows(recipe)
    exact = inputs_met(source, layers, windows)
    # In the error-aware mode a layer is calibrated behind the compressed layers before it, which is where it serves.
    met = inputs_met(reference_model(recipe, layers, adapted=True), layers, windows) if recipe.error_aware else exact
    paired = int(recipe.float_share * windows.numel())
    for module, layer in layers.items():
        weight = source.get_submodule(module).weight.detach().double()
        gram = met[module].T @ met[module]
        damping = recipe.damping * gram.diagonal().mean()
        damped = gram + damping * torch.eye(len(gram), dtype=torch.float64)
        # The drift is told by the first batches, those that run through the float model too.
        told, away = met[module][:paired], (exact[module] - met[module])[:paired]
        told_gram = told.T @ told
        told_gram += recipe.damping * told_gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        # Wider codes take less of the share, 2 / bits of it.
        share = recipe.error_aware * {2: 1.0, 4: 0.5}[layer.quantized.spec.bits]
        target = weight + share * torch.linalg.solve(told_gram, told.T @ away @ weight.T).T
        root = torch.linalg.cholesky(damped)

        def error_of(difference: torch.Tensor, root: torch.Tensor = root, target: torch.Tensor = target) -> float:
            return float((difference @ root).norm() / (target @ root).norm())

        certificate = layer.certificate
        assert certificate is not None
        assert layer.lora is not None
        quantized = layer.quantized.dequantize().double()
        product = layer.lora.lora_B.double() @ layer.lora.lora_A.double()
        left_over = torch.linalg.svdvals((target - quantized) @ root)[recipe.rank :]
        largest = [torch.linalg.svdvals(matrix @ root)[0] for matrix in (target - quantized - product, target)]
        expected = {
            "error_quantized": error_of(target - quantized),
            "error_adapted": error_of(target - quantized - product),
            "error_bound": float(left_over.norm() / (target @ root).norm()),
            "damping": float(damping),
            "effective_rank": float(gram.trace() ** 2 / gram.square().sum()),
        }
        # The drift may be summed from operands rounded to bfloat16, eight bits.
        tolerance = 1e-2 if recipe.error_aware else 2e-3
        assert {key: getattr(certificate, key) for key in expected} == pytest.approx(expected, rel=tolerance), module
        # By subspace iteration, which stays a few percent below where singular values crowd.
        assert certificate.spectral_error_adapted == pytest.approx(float(largest[0] / largest[1]), rel=3e-2)
        assert certificate.error_bound <= certificate.error_adapted * (1 + 1e-6)
        assert certificate.error_adapted <= 1.01 * certificate.error_bound
        assert certificate.error_adapted < certificate.error_quantized
        assert certificate.tokens == windows.numel()
        assert certificate.rank == 4
        assert certificate.notes == ()
        assert certificate.target == (f"error-aware target, share {share}" if share else "float weight")
    report = run.read_report("layers")["layers"]
    assert [entry["module"] for entry in report] == [certificate.module for certificate in run.certificates()]


def test_the_error_aware_mode_brings_the_output_closer(recipe_for: RecipeFor, run_recipe: Any) -> None:
    """Not a promise for every model, but a sign the right way round: here it lowers the error behind the last block."""
    errors = {}
    for name, mode in (("independent", INDEPENDENT), ("error-aware", ERROR_AWARE)):
        recipe = recipe_for("llama", bits=2, samples=16, **mode)
        run, _ = run_recipe(recipe, name)
        windows = calibration_windows(recipe)
        source = open_model(recipe.model).model
        served = reference_model(recipe, stored_layers(run), adapted=True)
        with torch.no_grad():
            behind = [model.model(windows, use_cache=False).last_hidden_state for model in (source, served)]
        errors[name] = float((behind[0] - behind[1]).norm())
    assert errors["error-aware"] < 0.98 * errors["independent"]


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


@modes
def test_bfloat16_arithmetic_gives_nearly_the_same_statistics(
    mode: dict[str, float], recipe_for: RecipeFor, run_recipe: Any
) -> None:
    exact, rounded = (
        run_recipe(recipe_for("llama", bits=4, precision=precision, **mode), precision)[0].certificates()
        for precision in ("float32", "bfloat16")
    )
    for one, other in zip(exact, rounded, strict=True):
        assert one != other
        # bfloat16 keeps eight bits of each activation; damping is a mean over them, the error a small difference.
        assert one.damping == pytest.approx(other.damping, rel=0.05)
        assert one.error_adapted == pytest.approx(other.error_adapted, rel=0.2)


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


# The same steps one at a time.


@pytest.mark.parametrize("rank", [4, 8])
def test_quantize_then_adapt_is_run(
    rank: int, tmp_path: Path, recipe_for: RecipeFor, silent: Console, contents: Callable[[Path], dict[str, str]]
) -> None:
    """In the independent mode the codes do not know of adapters, so both ways end with the same bytes."""
    overrides = {"*.o_proj": {"bits": 3}, "model.layers.0.mlp.up_proj": {"skip": True}}
    recipe = recipe_for("llama", bits=2, rank=rank, overrides=overrides)
    make_run(recipe, tmp_path / "whole", console=silent)
    summary = quantize(recipe, tmp_path / "steps", console=silent)
    steps = RunDirectory.open(tmp_path / "steps")
    assert steps.state == "quantized"
    assert steps.adapters.names == []
    assert contents(steps.checkpoint_path)
    assert summary.perplexity is None
    assert summary.next[0] == f"cloq adapt {tmp_path / 'steps'} --rank {rank}"
    adapt(tmp_path / "steps", {"rank": rank}, console=silent)

    whole = RunDirectory.open(tmp_path / "whole")
    for module, layer in stored_layers(whole).items():
        alone = steps.read_layer(module)
        assert torch.equal(alone.quantized.codes, layer.quantized.codes)
        assert torch.equal(alone.quantized.scales, layer.quantized.scales)
        assert torch.equal(alone.quantized.zeros, layer.quantized.zeros)
        assert alone.lora is None
    for part in ("adapters", "checkpoint"):
        assert contents(tmp_path / "whole" / part) == contents(tmp_path / "steps" / part)
    assert not list((tmp_path / "steps").glob("work/*"))


@modes
def test_a_second_adapter_for_the_same_codes(
    mode: dict[str, float], tmp_path: Path, recipe_for: RecipeFor, run_recipe: Any, silent: Console
) -> None:
    recipe = recipe_for("llama", bits=2, **mode)
    run, _ = run_recipe(recipe)
    first = {module: layer.lora for module, layer in stored_layers(run).items()}
    summary = adapt(run.path, {"rank": 16, "adapter_name": "wide"}, console=silent)
    assert run.adapters.names == ["cloq", "wide"]
    assert summary.files["adapter wide"] == str(run.adapter_path("wide"))
    layers = stored_layers(run)
    assert all(torch.equal(layers[m].lora.lora_A, lora.lora_A) for m, lora in first.items())  # type: ignore[union-attr]
    wide, cloq = cloq_export.load(run.path, adapter="wide"), cloq_export.load(run.path, adapter="cloq")
    assert wide.model.layers[0].mlp.up_proj.lora_A["default"].weight.shape == (16, 64)
    errors = [entry["error_adapted"] for entry in run.read_report("adapter-wide")["layers"]]
    if not recipe.error_aware:  # there each adapter has targets of its own
        assert all(error < narrow.error_adapted for error, narrow in zip(errors, run.certificates(), strict=True))
    exact = log_probabilities(open_model(recipe.model).model)
    distance = [float((log_probabilities(model) - exact).square().mean()) for model in (wide, cloq)]
    assert distance[0] < distance[1]


def test_what_adapt_refuses(
    tmp_path: Path, recipe_for: RecipeFor, run_recipe: Any, silent: Console, contents: Callable[[Path], dict[str, str]]
) -> None:
    run, _ = run_recipe(recipe_for("llama"))
    before = contents(run.path)
    with pytest.raises(UsageError, match="bits would change the codes, and adapt keeps them; allowed are rank, init"):
        adapt(run.path, {"bits": 3}, console=silent)
    with pytest.raises(UsageError, match="the rank is 0"):
        adapt(run.path, {"rank": 0}, console=silent)
    with pytest.raises(UsageError, match="'cloq' was made together with the codes; give the new one another name"):
        adapt(run.path, {"rank": 8}, console=silent)
    with pytest.raises(ShapeError, match=r"rank 100 is above 32, the smaller side of this 32 x 64 layer"):
        adapt(run.path, {"rank": 100, "adapter_name": "wide"}, console=silent)
    with pytest.raises(RunDirectoryError, match="does not exist, so it is not a run"):
        adapt(tmp_path / "nowhere", {"rank": 8}, console=silent)
    after = contents(run.path)
    assert {name: digest for name, digest in after.items() if not name.startswith("work/")} == before
    # A mistake is no obstacle to the right command.
    adapt(run.path, {"rank": 8, "adapter_name": "wide"}, console=silent)
    assert run.adapters.names == ["cloq", "wide"]


def test_evaluate_gives_what_run_measured(
    recipe_for: RecipeFor, run_recipe: Any, silent: Console, texts: dict[str, str]
) -> None:
    recipe = recipe_for("llama", bits=3)
    run, summary = run_recipe(recipe)
    options = EvaluateOptions(texts["eval_text"], 16, 4)
    measured = evaluate(run.path, options, console=silent)
    assert measured.to_json() == summary.perplexity.to_json()
    alone = evaluate(run.checkpoint_path, options, console=silent)
    assert alone.perplexity.models["quantized"].perplexity == measured.perplexity.models["quantized"].perplexity
    assert "float" not in alone.perplexity.models
    assert alone.notes == ("the float model was not measured: name it with `reference`",)
    beside = evaluate(run.checkpoint_path, dataclasses.replace(options, reference=recipe.model), console=silent)
    assert beside.perplexity.models["float"] == measured.perplexity.models["float"]
    for name in ("float", "quantized", "adapter"):
        assert math.isfinite(measured.perplexity.models[name].standard_error)
    quantized, adapted = (measured.perplexity.models[name].to_float for name in ("quantized", "adapter"))
    assert quantized.estimate == adapted.estimate == "exact"
    assert quantized.tokens == 4 * 15
    assert 0 < adapted.kl_mean < quantized.kl_mean < quantized.kl_max
    assert "to_float" not in measured.to_json()["float"]
    assert measured.to_json()["adapter"]["to_float"]["token_mult_prob_error"] > 1
    assert measured_value("kl", measured.to_json()) == adapted.kl_mean
    assert measured_value("kl", alone.to_json()) is None


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


# Texts.


@pytest.fixture
def _no_wikitext(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    (tmp_path / "no-data").mkdir()
    monkeypatch.setenv("CLOQ_DATA", str(tmp_path / "no-data"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("_no_wikitext")
def test_the_demo_falls_back_to_the_embedded_text_and_says_so(
    tmp_path: Path, recipe_for: RecipeFor, silent: Console
) -> None:
    recipe = recipe_for("llama", calibration="wikitext2", eval_text="wikitext2")
    summary = make_run(recipe, tmp_path / "run", demo=True, console=silent)
    assert "calibrates on the first four fifths of the text embedded in Python" in summary.notes[0]
    assert summary.perplexity.text.endswith("last fifth")
    with pytest.raises(cloq_export.CloqError, match=r"wikitext.*(`calibration`|CLOQ_DATA)"):
        make_run(recipe, tmp_path / "other", console=silent)
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("_no_wikitext")
def test_adapt_uses_the_text_that_the_demo_fell_back_to(
    tmp_path: Path, recipe_for: RecipeFor, silent: Console, contents: Callable[[Path], dict[str, str]]
) -> None:
    recipe = recipe_for("llama", calibration="wikitext2", eval_text="wikitext2")
    make_run(recipe, tmp_path / "whole", demo=True, console=silent)
    quantize(recipe, tmp_path / "steps", demo=True, console=silent)
    adapt(tmp_path / "steps", {"rank": 4}, console=silent)
    assert contents(tmp_path / "whole" / "adapters") == contents(tmp_path / "steps" / "adapters")
