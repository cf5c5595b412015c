"""ApiQ's schemes and other start points in the whole pipeline: what they lower, and what they refuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiers import slow_but

import cloq_export.lab  # noqa: F401  # registers the start points
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.errors import RecipeError
from cloq_export.recipe import Recipe
from cloq_export.refine import train_layers
from cloq_export.verbs.adapt import adapt
from cloq_export.verbs.quantize import quantize
from cloq_export.verbs.run import run as make_run

RecipeFor = Callable[..., Recipe]
SMALL: dict[str, Any] = {"bits": 2, "samples": 16, "refine_steps": 20, "error_aware": 0.5}


@pytest.fixture(autouse=True)
def _several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloq_export.compress.strategies.TOKENS_PER_STEP", 64)


@pytest.mark.parametrize("scheme", slow_but(["apiq-lw", "apiq-bw"], "apiq-bw"))
def test_the_held_out_error_falls(scheme: str, tmp_path: Path, recipe_for: RecipeFor, silent: Console) -> None:
    make_run(recipe_for("llama", refine=scheme, **SMALL), tmp_path / "run", console=silent)
    certificates = RunDirectory.open(tmp_path / "run").certificates()
    assert len(certificates) == 14
    for certificate in certificates:
        before, after = certificate.refined_error_before, certificate.refined_error_after
        assert before is not None
        assert after is not None
        assert after <= before
        assert certificate.method == scheme
        assert certificate.target == "float weight"
        # The bound is that of the refined codes.
        assert certificate.error_bound <= certificate.error_adapted * (1 + 1e-4)
    better = [c for c in certificates if c.refined_error_after < c.refined_error_before]  # type: ignore[operator]
    assert len(better) >= 7
    if scheme == "apiq-bw":
        # One block, one error.
        assert len({c.refined_error_before for c in certificates}) == 2


@pytest.mark.parametrize(
    ("scheme", "asked", "steps", "place"),
    [pytest.param("apiq-lw", 0, 160, "lab.apiq", marks=pytest.mark.slow), ("apiq-bw", 7, 7, "compress.block_refined")],
)
def test_steps_without_a_number_are_passes_over_the_windows(
    scheme: str,
    asked: int,
    steps: int,
    place: str,
    tmp_path: Path,
    recipe_for: RecipeFor,
    silent: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []

    def watched(layers: Any, objective: Any, schedule: Any) -> Any:
        assert (len(objective.trained), len(objective.judging)) == (8, 1)  # a pass has eight steps
        made.append(schedule.steps)
        return train_layers(layers, objective, dataclasses.replace(schedule, steps=1))

    monkeypatch.setattr(f"cloq_export.{place}.train_layers", watched)
    recipe = recipe_for("llama", refine=scheme, **{**SMALL, "refine_steps": asked})
    make_run(recipe, tmp_path / "run", console=silent)
    assert set(made) == {steps}


def test_experts_that_no_token_reaches_stay_at_their_start(
    tmp_path: Path, recipe_for: RecipeFor, silent: Console
) -> None:
    recipe = recipe_for("plain-experts", refine="apiq-lw", **{**SMALL, "refine_steps": 4, "samples": 4})
    make_run(recipe, tmp_path / "run", console=silent)
    unreached = [c for c in RunDirectory.open(tmp_path / "run").certificates() if c.tokens == 0]
    assert unreached
    assert all(c.method == "apiq-lw" and c.refined_step is None for c in unreached)


def test_apiq_cannot_keep_codes(tmp_path: Path, recipe_for: RecipeFor, silent: Console) -> None:
    run = tmp_path / "run"
    quantize(recipe_for("llama", **{**SMALL, "samples": 4}), run, console=silent)
    with pytest.raises(RecipeError, match="refine is 'apiq-bw', which makes codes of its own, and the codes are to be"):
        adapt(run, {"rank": 2, "adapter_name": "other", "refine": "apiq-bw"}, console=silent)


def test_apiq_takes_no_other_start(tmp_path: Path, recipe_for: RecipeFor, silent: Console) -> None:
    with pytest.raises(RecipeError, match="refine is 'apiq-bw', which makes A and B of its own, and init is 'loftq'"):
        make_run(recipe_for("llama", refine="apiq-bw", init="loftq", **SMALL), tmp_path / "run", console=silent)


def test_loftq_is_a_start_like_any_other(tmp_path: Path, recipe_for: RecipeFor, silent: Console) -> None:
    recipe = recipe_for("llama", refine="block", init="loftq", **{**SMALL, "error_aware": 0.0})
    make_run(recipe, tmp_path / "run", console=silent)
    certificates = RunDirectory.open(tmp_path / "run").certificates()
    assert {c.method for c in certificates} == {"loftq"}
    assert all(c.refined_error_after < c.refined_error_before for c in certificates)  # type: ignore[operator]


@pytest.mark.parametrize(
    "options",
    [
        {"init": "loftq"},
        *(pytest.param(each, marks=pytest.mark.slow) for each in ({"init": "lq-lora"}, {"refine": "apiq-bw"})),
    ],
)
def test_codes_of_every_start_fit_version_1(
    options: dict[str, str], tmp_path: Path, recipe_for: RecipeFor, silent: Console
) -> None:
    recipe = recipe_for("llama", format="gptq", **{**SMALL, **options, "refine_steps": 2, "samples": 4})
    make_run(recipe, tmp_path / "run", console=silent)
    directory = RunDirectory.open(tmp_path / "run")
    assert all(int(directory.read_codes(name).zeros.min()) >= 1 for name in directory.completed_modules())
