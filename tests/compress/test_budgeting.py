"""A budget of stored bits: it is kept, spent where it counts, written down, and can be taken up again."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.artifact.stored_sizes import stored_sizes
from cloq_export.compress import budgeting, costs
from cloq_export.errors import CloqError, UsageError
from cloq_export.models.blocks import find_blocks
from cloq_export.models.source import open_model
from cloq_export.models.stream import BlockStream
from cloq_export.recipe import Recipe, load_recipe
from cloq_export.verbs.quantize import quantize
from cloq_export.verbs.run import run

BUDGET = 7.0


@pytest.fixture(scope="module")
def budgeted(
    recipe_for: Callable[..., Recipe], silent: Console, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, pathlib.Path]:
    recipe = recipe_for(rank=16, budget=BUDGET)
    folder = tmp_path_factory.mktemp("budget") / "run"
    run(recipe, folder, console=silent)
    return recipe, folder


def test_it_is_kept_and_spent(budgeted: tuple[Recipe, pathlib.Path]) -> None:
    _, folder = budgeted
    report = RunDirectory.open(folder).read_report("budget")
    stored = stored_sizes(folder, "cloq").bits_per_weight_with_adapter
    assert stored == pytest.approx(report["stored_bits_per_weight"])
    assert BUDGET - 0.5 < stored <= BUDGET
    assert len({(layer["bits"], layer["group_size"], layer["rank"]) for layer in report["layers"]}) > 1
    assert report["smallest_budget"] < 3
    certificates = RunDirectory.open(folder).certificates()
    chosen = {layer["module"]: (layer["bits"], layer["group_size"], layer["rank"]) for layer in report["layers"]}
    assert {c.module: (c.bits, c.group_size, c.rank) for c in certificates} == chosen
    assert not (folder / "work").exists()


def test_layers_that_read_one_input_share_a_grid(budgeted: tuple[Recipe, pathlib.Path]) -> None:
    layers = RunDirectory.open(budgeted[1]).read_report("budget")["layers"]
    grids: dict[str, set[tuple[int, int]]] = {}
    for layer in layers:
        block, _, kind = layer["module"].rpartition(".")
        shared = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gu", "up_proj": "gu"}.get(kind, kind)
        grids.setdefault(f"{block}.{shared}", set()).add((layer["bits"], layer["group_size"]))
    assert all(len(found) == 1 for found in grids.values())


@pytest.mark.slow
def test_the_choice_is_a_recipe_that_makes_the_same_bytes(
    budgeted: tuple[Recipe, pathlib.Path], silent: Console, tmp_path: pathlib.Path
) -> None:
    _, folder = budgeted
    recipe = load_recipe(folder / "recipe.yaml")
    assert recipe.budget == 0
    run(recipe, tmp_path / "again", console=silent)
    for part in ("checkpoint/model.safetensors", "adapters/cloq/adapter_model.safetensors"):
        assert (folder / part).read_bytes() == (tmp_path / "again" / part).read_bytes()


@pytest.mark.slow
def test_the_same_command_goes_on_with_the_same_choice(budgeted: tuple[Recipe, pathlib.Path], silent: Console) -> None:
    recipe, folder = budgeted
    before = (folder / "run.json").read_bytes()
    assert run(recipe, folder, console=silent).perplexity
    assert (folder / "run.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("stop", [KeyboardInterrupt, CloqError("the disk is full")], ids=["interrupted", "failed"])
def test_it_continues_where_it_was_stopped(
    budgeted: tuple[Recipe, pathlib.Path],
    silent: Console,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: BaseException | type[BaseException],
) -> None:
    recipe, folder = budgeted
    measured: list[int] = []
    original = costs._log_probabilities

    def stop_at_third(*args: Any) -> torch.Tensor:
        measured.append(1)
        if len(measured) == 4:
            raise stop
        return original(*args)

    monkeypatch.setattr(costs, "_log_probabilities", stop_at_third)
    with pytest.raises((KeyboardInterrupt, CloqError)):
        run(recipe, tmp_path / "run", console=silent)
    solved: list[str] = []
    measure = budgeting.CostMeter._measure
    monkeypatch.setattr(budgeting.CostMeter, "_measure", lambda *args: solved.append("x") or measure(*args))
    run(recipe, tmp_path / "run", console=silent)
    assert solved == []
    # Two groups were measured before, six are left, and the float model itself counts each time.
    assert len(measured) == 4 + 7
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == (folder / "recipe.yaml").read_bytes()


@pytest.mark.slow
def test_a_larger_budget_is_estimated_to_cost_less(
    budgeted: tuple[Recipe, pathlib.Path], recipe_for: Callable[..., Recipe], silent: Console, tmp_path: pathlib.Path
) -> None:
    quantize(recipe_for(budget=3.0), tmp_path / "codes", console=silent)
    less = RunDirectory.open(tmp_path / "codes").read_report("budget")
    more = RunDirectory.open(budgeted[1]).read_report("budget")
    assert 0 < more["estimated_divergence"] < less["estimated_divergence"]
    assert {layer["rank"] for layer in less["layers"]} == {0}
    assert stored_sizes(tmp_path / "codes", None).bits_per_weight <= 3.0


@pytest.mark.slow
def test_an_override_is_left_as_it_is(
    recipe_for: Callable[..., Recipe], silent: Console, tmp_path: pathlib.Path
) -> None:
    fixed = {"*.down_proj": {"bits": 4, "group_size": 32, "rank": 2}, "*.0.self_attn.o_proj": {"skip": True}}
    quantize(recipe_for(budget=3.5, overrides=fixed), tmp_path / "codes", console=silent)
    directory = RunDirectory.open(tmp_path / "codes")
    assert stored_sizes(tmp_path / "codes", None).bits_per_weight <= 3.5
    names = {layer["module"].rpartition(".")[2] for layer in directory.read_report("budget")["layers"]}
    assert "down_proj" not in names
    assert all(c.bits == 4 for c in directory.certificates() if c.module.endswith("down_proj"))
    assert "model.layers.0.self_attn.o_proj" not in directory.completed_modules()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1.0}, r"a budget of 1 bits per weight cannot be met: the smallest .* can take is 2\.[0-9]+;"),
        ({"budget": 3.0, "init": "svd"}, "a budget weighs what CLoQ's closed form leaves, and init is svd"),
        ({"budget": 3.0, "overrides": {"*": {"bits": 2}}}, "an override concerns every layer"),
        ({"budget": 3.0, "eval_window": 100}, "this model reads at most 64"),
    ],
)
def test_what_cannot_be_met_is_refused_before_anything_is_measured(
    recipe_for: Callable[..., Recipe],
    silent: Console,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(budgeting.BlockWalk, "run", lambda *args: pytest.fail("layers were measured"))
    with pytest.raises(UsageError, match=message):
        run(recipe_for(**options), tmp_path / "run", console=silent)
    assert not (tmp_path / "run").exists()


def test_the_smallest_that_is_named_can_be_met(
    recipe_for: Callable[..., Recipe], silent: Console, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(UsageError) as refused:
        run(recipe_for(budget=1.0), tmp_path / "run", console=silent)
    named = re.search(r"can take is ([0-9.]+);", str(refused.value))
    assert named is not None
    smallest = float(named[1])
    quantize(recipe_for(budget=smallest), tmp_path / "run", console=silent)
    stored = stored_sizes(tmp_path / "run", None).bits_per_weight
    assert smallest - 0.001 <= stored <= smallest


def test_logits_behind_the_last_block_are_the_models_own(
    model_folder: Callable[..., pathlib.Path], recipe_for: Callable[..., Recipe]
) -> None:
    for family in ("llama", "gemma2", "opt"):
        model = open_model(str(model_folder(family)), dtype=torch.float32).model
        ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(0))
        stream = BlockStream(model, find_blocks(model), ids, device="cpu", batch=2)
        hidden = stream.hidden[0]
        for index in range(len(stream.blocks)):
            hidden = stream.forward_batch(index, 0, hidden)
        with torch.no_grad():
            found = stream.differentiable_logits(0, hidden, slice(None))
            torch.testing.assert_close(found, model(input_ids=ids).logits)
