"""Codes that need their adapter say so everywhere, are never used alone, and come out the same after a kill."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.console import Console

import cloq_export.lab  # noqa: F401  # registers the start points
from cloq_export.artifact.certificate import read_certificate
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.engines.vllm import plan as vllm_plan
from cloq_export.engines.vllm.facts import EngineFacts
from cloq_export.engines.vllm.plugin.adapters import POLICY_VARIABLE
from cloq_export.errors import CloqError, RecipeError, UsageError
from cloq_export.parity.report import missed_gates, schema
from cloq_export.recipe import FineTuneRecipe, Recipe
from cloq_export.verbs.adapt import adapt
from cloq_export.verbs.adapt_checkpoint import adapt_checkpoint
from cloq_export.verbs.convert import convert
from cloq_export.verbs.evaluate import evaluate
from cloq_export.verbs.export import export
from cloq_export.verbs.finetune import finetune
from cloq_export.verbs.inspect import inspect as inspect_folder
from cloq_export.verbs.options import EvaluateOptions, ExportOptions, ServeOptions
from cloq_export.verbs.quantize import quantize
from cloq_export.verbs.run import run
from cloq_export.verbs.run_and_finetune import run_and_finetune
from cloq_export.verbs.serve import Serving, plan_serving
from cloq_export.verbs.summary import RunSummary
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verify import verify

WHY = "its codes were made for what its adapter leaves of the weights (low rank first), so alone they say nothing"
RecipeFor = Callable[..., Recipe]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, recipe_for: RecipeFor, silent: Console) -> tuple[Path, RunSummary]:
    """Return a 2-bit run whose codes need their adapter, and its summary; it must only be read."""
    folder = tmp_path_factory.mktemp("low-rank-first") / "run"
    return folder, run(recipe_for(bits=2, rank=8, low_rank_rounds=2), folder, console=silent)


@pytest.fixture(scope="module")
def exported(made: tuple[Path, RunSummary], tmp_path_factory: pytest.TempPathFactory, silent: Console) -> Path:
    """Return an export of it; it must only be read."""
    folder = tmp_path_factory.mktemp("exported") / "gptq_v2"
    export(made[0], ExportOptions(format="gptq_v2", out=folder), console=silent)
    return folder


def refusal(call: Callable[[], Any], kind: type[CloqError] = UsageError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_run_its_checkpoint_and_its_summary_say_it(
    made: tuple[Path, RunSummary], exported: Path, texts: dict[str, str]
) -> None:
    folder, summary = made
    certificates = RunDirectory.open(folder).certificates()
    needing = [certificate for certificate in certificates if certificate.needs_adapter]
    assert needing
    assert all(certificate.low_rank_round for certificate in needing)
    layers = RunDirectory.open(folder).read_report("layers")["layers"]
    assert [layer.get("needs_adapter", False) for layer in layers] == [each.needs_adapter for each in certificates]
    for place in (folder / "checkpoint", exported):
        config = json.loads((place / "config.json").read_text())["quantization_config"]
        assert config["cloq"]["needs_adapter"] is True
        assert Checkpoint.open(place).needs_adapter
        assert read_certificate(place).facts["needs_adapter"] is True
    assert f"this base needs its adapter: {WHY}" in (exported / "README.md").read_text()
    assert f"this base needs its adapter: {WHY}" in inspect_folder(exported).to_json()["notes"]
    alone = f"the figures of the codes without their adapter say nothing of this model: {WHY}"
    assert alone in summary.notes
    assert alone in evaluate(folder, EvaluateOptions(text=texts["eval_text"], window=16, windows=2)).notes
    models = summary.perplexity.models
    assert models["adapter"].perplexity < models["quantized"].perplexity


def test_an_ordinary_run_says_nothing_of_it(tmp_path: Path, recipe_for: RecipeFor, silent: Console) -> None:
    run(recipe_for(bits=2), tmp_path / "run", console=silent)
    for name in ("checkpoint/config.json", "checkpoint/cloq_certificate.json", "reports/layers.json"):
        text = (tmp_path / "run" / name).read_text()
        assert "needs_adapter" not in text
        assert "low_rank_round" not in text


@pytest.mark.slow
def test_other_layouts_and_new_adapters_carry_it(
    made: tuple[Path, RunSummary], exported: Path, tmp_path: Path, recipe_for: RecipeFor, silent: Console
) -> None:
    options = ExportOptions(format="compressed_tensors", out=tmp_path / "ct")
    result = convert(exported, options, console=silent)
    assert Checkpoint.open(tmp_path / "ct").needs_adapter
    assert f"this base needs its adapter: {WHY}" in result.notes
    shutil.copytree(made[0], tmp_path / "run")
    adapt(tmp_path / "run", {"rank": 12, "adapter_name": "wider"}, console=silent)
    layers = RunDirectory.open(tmp_path / "run").read_report("adapter-wider")["layers"]
    assert all(layer["needs_adapter"] for layer in layers)
    assert RunDirectory.open(tmp_path / "run").recipe.low_rank_rounds == 2
    adapt_checkpoint(tmp_path / "ct", recipe_for(rank=8), tmp_path / "kept", console=silent)
    assert Checkpoint.open(tmp_path / "kept").needs_adapter


def test_without_an_adapter_it_is_exported_with_a_note_and_never_merged(
    exported: Path, tmp_path: Path, silent: Console
) -> None:
    shutil.copytree(exported, tmp_path / "export")
    shutil.rmtree(tmp_path / "export" / "adapters")
    result = convert(tmp_path / "export", ExportOptions(format="gptq", out=tmp_path / "v1"), console=silent)
    assert f"this base needs its adapter: {WHY}; none goes along with this export" in result.notes
    merged = ExportOptions(format="merged", out=tmp_path / "merged")
    message = refusal(lambda: convert(tmp_path / "export", merged, console=silent))
    assert message == f"{tmp_path / 'export'} needs its adapter: {WHY}; merge one in with `adapters`."
    convert(exported, merged, console=silent)
    assert "needs_adapter" not in read_certificate(tmp_path / "merged").facts


def test_it_is_never_served_alone(
    made: tuple[Path, RunSummary], exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_plan, "engine_facts", lambda python: EngineFacts("0.32.0", cuda=False))
    plan = plan_serving(exported, ServeOptions(port=0, kv_cache_gib=1))
    assert json.loads(plan.environment[POLICY_VARIABLE])["needs_adapter"] is True
    assert f"the base needs its adapter, so {plan.base_name} is not served" in Serving.of(plan, None, []).notes
    shutil.copytree(exported, tmp_path / "export")
    shutil.rmtree(tmp_path / "export" / "adapters")
    message = refusal(lambda: plan_serving(tmp_path / "export", ServeOptions(port=0, kv_cache_gib=1)))
    assert message == (
        f"{tmp_path / 'export'} needs its adapter: {WHY}; serve the run or an export that holds it, or name it with "
        "`adapters=NAME=FOLDER`."
    )
    named = f"mine={exported / 'adapters' / 'cloq'}"
    assert plan_serving(tmp_path / "export", ServeOptions(port=0, kv_cache_gib=1, adapters=(named,))).default == "mine"


def test_nothing_is_trained_over_it_from_an_adapter_that_changes_nothing(
    made: tuple[Path, RunSummary], tmp_path: Path, recipe_for: RecipeFor, texts: dict[str, str], silent: Console
) -> None:
    shutil.copytree(made[0], tmp_path / "run")
    options = {"data": texts["calibration"], "name": "mine", "steps": 2, "seqlen": 16, "device": "cpu"}
    zero = FineTuneRecipe.from_mapping({**options, "start": "zero"})
    message = refusal(lambda: finetune(tmp_path / "run", zero, console=silent))
    assert message == (
        f"{tmp_path / 'run' / 'checkpoint'} needs its adapter: {WHY}; start from its own adapter, 'cloq', by leaving "
        "`start` out, or train over a run without `low_rank_rounds`."
    )
    own = FineTuneRecipe.from_mapping({**options, "precision": "float32"})
    assert finetune(tmp_path / "run", own, console=silent).start == "cloq"
    both = recipe_for(bits=2, low_rank_rounds=1, finetune={"data": texts["calibration"], "start": "zero"})
    assert refusal(lambda: run_and_finetune(both, tmp_path / "other", console=silent)) == (
        "codes of low_rank_rounds need their adapter, and the training is to start without it; leave `finetune.start` "
        "out, or `low_rank_rounds` at 0."
    )


@pytest.fixture
def verifying(recipe_for: RecipeFor, texts: dict[str, str]) -> VerifyOptions:
    return VerifyOptions(
        reference=recipe_for("llama").model,
        text=texts["eval_text"],
        window=16,
        windows=4,
        prompts=4,
        new_tokens=4,
        liveness_tokens=24,
    )


def test_verify_judges_it_with_its_adapter_alone(exported: Path, verifying: VerifyOptions, silent: Console) -> None:
    report = verify(exported, verifying, console=silent)
    content = report.to_json()
    jsonschema.validate(content, schema())
    assert report.passed, (missed_gates(report), report.missing)
    assert content["needs_adapter"] is True
    assert {row.adapter for row in report.numerics if row.measured == "served"} == {"cloq"}
    assert {row.adapter for row in report.isolation.by_adapter} == {"cloq"}
    assert {row.adapter for row in report.decoding} == {"cloq"}
    assert f"the base alone was not scored, and no limit is set on it: {WHY}" in report.notes


def test_verify_refuses_it_without_its_adapter(
    exported: Path, verifying: VerifyOptions, tmp_path: Path, silent: Console
) -> None:
    shutil.copytree(exported, tmp_path / "export")
    shutil.rmtree(tmp_path / "export" / "adapters")
    message = refusal(lambda: verify(tmp_path / "export", verifying, console=silent))
    assert message == (
        f"{tmp_path / 'export'} needs its adapter: {WHY}; verify the run or an export that holds it, or name it with "
        "`adapters=NAME=FOLDER`."
    )


LEAVE = "leave `low_rank_rounds` at 0."


def test_what_cannot_be_is_refused_before_any_work(
    made: tuple[Path, RunSummary], tmp_path: Path, recipe_for: RecipeFor, silent: Console
) -> None:
    def refused(**options: Any) -> str:
        recipe = recipe_for(bits=2, low_rank_rounds=2, **options)
        message = refusal(lambda: run(recipe, tmp_path / "run", console=silent))
        assert not (tmp_path / "run").exists()
        return message

    no_rank = (
        "low_rank_rounds takes A and B out of the weight before its codes are made, and no layer has any: the rank is "
        f"0. Make codes and adapter together, with a `rank`, or {LEAVE}"
    )
    assert refused(rank=0) == no_rank
    assert refused(codes_from=str(made[0])) == (
        f"low_rank_rounds makes codes for what A and B leave of the weight, and codes_from keeps them; {LEAVE}"
    )
    assert refused(init="svd") == (
        f"low_rank_rounds repeats CLoQ's closed form, and init is svd; take `init=cloq`, or {LEAVE}"
    )
    assert refused(refine="apiq-bw") == (
        "low_rank_rounds solves codes and adapter in turns, and refine is apiq-bw, which solves nothing; take "
        f"`refine=block`, or {LEAVE}"
    )
    recipe = recipe_for(bits=2, low_rank_rounds=2)
    assert refusal(lambda: quantize(recipe, tmp_path / "run", console=silent)) == no_rank
    message = refusal(lambda: adapt(made[0], {"low_rank_rounds": 1, "adapter_name": "b"}, console=silent))
    assert message.startswith("low_rank_rounds would change the codes, and adapt keeps them")
    for name, value, wanted in (
        ("low_rank_rounds", -1, "it must be at least 0"),
        ("low_rank_share", 0.0, "it must be above 0"),
        ("low_rank_share", 1.5, "it must be between 0 and 1"),
    ):
        assert wanted in refusal(lambda name=name, value=value: recipe_for(**{name: value}), RecipeError)
    assert Recipe.from_mapping({}, preset="paper").low_rank_rounds == 0 == Recipe().low_rank_rounds


def test_a_layer_of_its_own_rank_is_as_its_override_says(
    tmp_path: Path, recipe_for: RecipeFor, silent: Console
) -> None:
    overrides = {"*.down_proj": {"rank": 0}, "*.k_proj": {"rank": 32}}
    run(recipe_for(bits=2, rank=8, low_rank_rounds=1, overrides=overrides), tmp_path / "run", console=silent)
    certificates = {each.module: each for each in RunDirectory.open(tmp_path / "run").certificates()}
    for name, certificate in certificates.items():
        if name.endswith("down_proj"):
            assert (certificate.rank, certificate.low_rank_round) == (0, None)
        elif name.endswith("k_proj"):  # 32 outputs
            assert certificate.low_rank_round is None
            assert re.search(r"a rank of 32 would take all of this layer", " ".join(certificate.notes))
        else:
            assert certificate.low_rank_round is not None


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"error_aware": 0.5}, marks=pytest.mark.slow)], ids=["independent", "error-aware"]
)
def test_what_a_kill_left_out_is_made_again_with_the_same_bytes(
    options: dict[str, Any],
    tmp_path: Path,
    recipe_for: RecipeFor,
    silent: Console,
    contents: Callable[[Path], dict[str, str]],
) -> None:
    recipe = recipe_for(bits=2, rank=8, low_rank_rounds=2, low_rank_share=0.5, **options)
    run(recipe, tmp_path / "run", console=silent)
    expected = contents(tmp_path / "run")
    for number, layer in enumerate(sorted((tmp_path / "run" / "layers").iterdir())):
        if number % 3 == 1:
            layer.unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    shutil.rmtree(tmp_path / "run" / "adapters")
    run(recipe, tmp_path / "run", console=silent)
    assert contents(tmp_path / "run") == expected


@pytest.mark.slow
@pytest.mark.parametrize("refine", ["block", "model"])
def test_a_refinement_starts_from_it_and_keeps_what_it_says(
    refine: str, tmp_path: Path, recipe_for: RecipeFor, silent: Console
) -> None:
    recipe = recipe_for(bits=2, rank=8, low_rank_rounds=1, refine=refine, refine_steps=4, error_aware=0.5)
    run(dataclasses.replace(recipe), tmp_path / "run", console=silent)
    certificates = RunDirectory.open(tmp_path / "run").certificates()
    assert any(certificate.needs_adapter for certificate in certificates)
    assert all(certificate.refined_step is not None for certificate in certificates)
    assert Checkpoint.open(tmp_path / "run").needs_adapter


@pytest.mark.slow
def test_a_budget_spends_with_it(tmp_path: Path, recipe_for: RecipeFor, silent: Console) -> None:
    summary = run(recipe_for(rank=16, budget=7.0, low_rank_rounds=1), tmp_path / "run", console=silent)
    assert summary.recipe.low_rank_rounds == 1
    assert summary.stored["bits_per_weight_with_adapter"] <= 7.0
    certificates = RunDirectory.open(tmp_path / "run").certificates()
    assert all((each.low_rank_round is not None) == (each.rank > 0) for each in certificates if each.rank < 16)
