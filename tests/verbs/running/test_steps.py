"""The steps of a run one at a time, on the same texts, end with the same bytes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layers_as_made import log_probabilities, stored_layers
from rich.console import Console
from run_modes import modes

import cloq_export
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.cli.gates import measured_value
from cloq_export.errors import RunDirectoryError, ShapeError, UsageError
from cloq_export.models.source import open_model
from cloq_export.recipe import Recipe
from cloq_export.verbs.adapt import adapt
from cloq_export.verbs.evaluate import evaluate
from cloq_export.verbs.options import EvaluateOptions
from cloq_export.verbs.quantize import quantize
from cloq_export.verbs.run import run as make_run

RecipeFor = Callable[..., Recipe]


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
