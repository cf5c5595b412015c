"""Pairs of experts in PEFT's form for fused tensors: written, attached by PEFT to float and packed models, trained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import peft
import pytest
import torch
import transformers
from rich.console import Console

import cloq_export
import cloq_export.formats.peft as formats_of_peft
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.errors import FormatError, UsageError
from cloq_export.formats.peft import product_difference, read_adapter
from cloq_export.models.experts import fused_experts
from cloq_export.models.source import open_model
from cloq_export.recipe import Recipe
from cloq_export.verbs.export import export
from cloq_export.verbs.inspect import inspect
from cloq_export.verbs.options import ExportOptions
from cloq_export.verbs.run import run as make_run

TOLERANCE = 1e-4  # of a log-probability, what the project promises in float32
# Files with experts one by one and fused; dense layers and shared experts of names that PEFT takes for experts; gate
# and up alternating and transposed; tokens sorted by expert; experts without a gate.
FAMILIES = ("mixtral", "qwen3-moe", "gpt-oss", "llama4", "deepseek-v3", "nemotron-h")

RecipeFor = Callable[..., Recipe]


def log_probabilities(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)  # type: ignore[no-any-return]


def float_model(recipe: Recipe, run: RunDirectory) -> Any:
    """Return the source with the weights of the codes in the place of its own, experts split."""
    model: Any = open_model(recipe.model).model
    with torch.no_grad():
        for module in run.completed_modules():
            model.get_submodule(module).weight.copy_(run.read_layer(module).quantized.dequantize())
    return model


def stacked(run: RunDirectory, folder: Path, console: Console) -> Path:
    export(run.path, ExportOptions(format="peft", expert_pairs="stacked", out=folder), console=console)
    return folder


# PEFT says that it ignores the rank of a parameter that is not the common one, and follows it.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match any:RuntimeWarning")
@pytest.mark.parametrize(
    ("family", "shared"),
    [
        pytest.param(family, shared, marks=() if family == "mixtral" and not shared else pytest.mark.slow)
        for family in FAMILIES
        for shared in (False, True)
    ],
)
def test_peft_attaches_it_to_the_float_and_to_the_packed_model(
    family: str, shared: bool, recipe_for: RecipeFor, tmp_path: Path, silent: Console
) -> None:
    recipe = recipe_for(family, bits=2, expert_rank=2, expert_shared_a=shared)
    make_run(recipe, tmp_path / "run", console=silent)
    run = RunDirectory.open(tmp_path / "run")
    folder = stacked(run, tmp_path / "adapter", silent)
    expected = log_probabilities(cloq_export.load(run.path, adapter="cloq"))
    assert (expected - log_probabilities(cloq_export.load(run.path))).abs().max() > 0.05

    model = float_model(recipe, run)
    with fused_experts(model):
        attached = peft.PeftModel.from_pretrained(model, folder)
        names = [name for name, _ in attached.named_parameters() if ".lora_A." in name]
        assert not any(".experts.0." in name for name in names)
        assert (log_probabilities(attached) - expected).abs().max() <= TOLERANCE
    packed = transformers.AutoModelForCausalLM.from_pretrained(run.checkpoint_path, dtype=torch.float32)
    attached = peft.PeftModel.from_pretrained(packed, folder)
    assert (log_probabilities(attached) - expected).abs().max() <= TOLERANCE
    assert (log_probabilities(cloq_export.load(run.path, folder)) - expected).abs().max() <= TOLERANCE

    config = json.loads((folder / "adapter_config.json").read_text())
    schema = json.loads((Path(formats_of_peft.__file__).parent / "schema.json").read_text())
    for name in ("adapter_config", "cloq_adapter"):
        jsonschema.Draft202012Validator(schema).validate(json.loads((folder / f"{name}.json").read_text()))
    gated = [name for name in config["target_parameters"] if name.endswith("experts.gate_up_proj")]
    ranks = {config["rank_pattern"].get(name, config["r"]) for name in gated}
    assert ranks == (set() if family == "nemotron-h" else {2 if shared else 4})
    # What is read back is what the run has, and an attached one can be saved again with a pair for each layer.
    pairs = read_adapter(run.adapter_path("cloq")).pairs
    read = read_adapter(folder).pairs
    assert read.keys() == pairs.keys()
    assert max(product_difference(read[name], pairs[name]) for name in pairs) < 2**-10
    attached.save_pretrained(tmp_path / "saved")
    assert read_adapter(tmp_path / "saved").pairs.keys() == pairs.keys()
    assert inspect(folder).to_json()


@pytest.mark.slow
def test_the_shared_a_is_the_closed_form_of_both_weights(
    recipe_for: RecipeFor, tmp_path: Path, silent: Console
) -> None:
    """Together, no pair of that rank leaves less: neither the two of their own, one behind the other, of half of it."""
    errors: dict[tuple[bool, int], float] = {}
    for shared, rank in ((False, 2), (True, 2), (False, 1)):
        recipe = recipe_for(
            "mixtral", bits=2, expert_rank=rank, expert_shared_a=shared, error_aware=0.0, adapter_dtype="float32"
        )
        make_run(recipe, tmp_path / f"{shared}-{rank}", console=silent)
        run = RunDirectory.open(tmp_path / f"{shared}-{rank}")
        certificates = {one.module: one for one in run.certificates()}
        name = "model.layers.0.mlp.experts.1."
        gate, up = (certificates[f"{name}{part}"] for part in ("gate_proj", "up_proj"))
        errors[shared, rank] = gate.error_adapted**2 + up.error_adapted**2
        pairs = [run.read_layer(f"{name}{part}").lora for part in ("gate_proj", "up_proj")]
        assert pairs[0] is not None
        assert pairs[1] is not None
        assert torch.equal(pairs[0].lora_A, pairs[1].lora_A) is shared
        assert gate.error_adapted < gate.error_quantized
    assert errors[False, 2] < errors[True, 2] < errors[False, 1]


def test_training_reaches_every_expert_that_a_token_reaches(
    recipe_for: RecipeFor, tmp_path: Path, silent: Console
) -> None:
    recipe = recipe_for("mixtral", bits=2, rank=0)
    make_run(recipe, tmp_path / "run", console=silent)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint", dtype=torch.float32)
    targets = ["experts.gate_up_proj", "experts.down_proj", "self_attn.q_proj.weight"]
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_parameters=targets, rank_pattern={"gate_up_proj": 3}, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config)
    ids = torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[2] < losses[0]
    adapted = {name: each for name, each in model.named_parameters() if ".lora_B." in name}
    assert {name.rpartition(".lora_B.")[0].rpartition(".")[2] for name in adapted} == {
        *("gate_proj", "up_proj", "down_proj", "q_proj")
    }
    assert {each.shape[1] for name, each in adapted.items() if "gate_proj" in name} == {3}
    assert {each.shape[1] for name, each in adapted.items() if "down_proj" in name} == {2}
    assert all(each.abs().max() > 0 for each in adapted.values())


def test_what_does_not_fit_is_refused_in_one_line(recipe_for: RecipeFor, tmp_path: Path, silent: Console) -> None:
    make_run(recipe_for("mixtral", bits=2, expert_rank=2), tmp_path / "run", console=silent)
    run = RunDirectory.open(tmp_path / "run")
    options = ExportOptions(expert_pairs="stacked", out=tmp_path / "out")
    with pytest.raises(UsageError, match=r"`expert_pairs` is 'stacked', which engines that read gptq_v2 do not take"):
        export(run.path, dataclasses.replace(options, format="gptq_v2"), console=silent)
    with pytest.raises(UsageError, match=r"`expert_pairs` is 'fused'; allowed are single, stacked"):
        export(run.path, dataclasses.replace(options, format="peft", expert_pairs="fused"), console=silent)
    assert not (tmp_path / "out").exists()
    folder = stacked(run, tmp_path / "adapter", silent)
    base = transformers.AutoModelForCausalLM.from_pretrained(run.checkpoint_path, dtype=torch.float32)
    with pytest.raises(FormatError, match=r"target_parameters names experts\.w1, and MixtralForCausalLM has no expert"):
        peft.get_peft_model(base, peft.LoraConfig(target_parameters=["experts.w1"]))
    binding = folder / "cloq_adapter.json"
    held = json.loads(binding.read_text())
    first, *others = held["stacked_experts"]
    for change, message in (
        ([{**first, "experts": 3}, *others], r"gives rank 4 and cloq_adapter\.json 3 experts"),
        ([{**first, "experts": -1}, *others], "stacked_experts is damaged; copy the adapter again"),
        ([{**first, "ranks": [1, 2]}, *others], r"has rank 4, not 3; it is damaged"),
        ([], "target_parameters names .*, a tensor of which nothing says how experts lie in it"),
        ({}, "stacked_experts is a dict; expected a list"),
    ):
        binding.write_text(json.dumps({**held, "stacked_experts": change}))
        with pytest.raises(FormatError, match=message) as caught:
            read_adapter(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refine": "block"}, "refine=block gives each of them an A of its own"),
        ({"init": "svd"}, "init=svd gives each"),
        ({"low_rank_rounds": 1}, "low_rank_rounds=1 gives each"),
        ({"expert_rank": 0}, "expert_rank is 0; give it a rank"),
    ],
)
def test_a_shared_a_beside_other_choices_is_refused(
    options: dict[str, Any], message: str, recipe_for: RecipeFor, tmp_path: Path, silent: Console
) -> None:
    recipe = recipe_for("mixtral", **{"expert_rank": 2, "expert_shared_a": True, **options})
    with pytest.raises(UsageError, match=message):
        make_run(recipe, tmp_path / "run", console=silent)
    assert not (tmp_path / "run").exists()
