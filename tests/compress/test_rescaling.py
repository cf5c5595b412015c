"""Weights that codes with float16 scales cannot hold: moved into a neighbour exactly, or left float and said."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layers_as_made import log_probabilities
from rich.console import Console
from torch import nn

import cloq_export
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.cli import main
from cloq_export.compress.initialisations import initialisation_of
from cloq_export.compress.plan import ModulePlan, make_plan
from cloq_export.compress.rescaling import rescale_neighbours
from cloq_export.compress.solve import SolveRequest, solve_group
from cloq_export.errors import RecipeError
from cloq_export.models.blocks import find_blocks
from cloq_export.models.source import open_model
from cloq_export.recipe import Recipe
from cloq_export.types import LayerStats, QuantSpec
from cloq_export.verbs.adapt import adapt
from cloq_export.verbs.export import export as write_export
from cloq_export.verbs.options import ExportOptions
from cloq_export.verbs.quantize import quantize
from cloq_export.verbs.run import run as make_run

RecipeFor = Callable[..., Recipe]
VALUE, OUT, UP, DOWN = "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"


def times(exponents: dict[str, float]) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Return a change that multiplies the weights (and biases) of modules by powers of two."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        for part, exponent in exponents.items():
            if f".{part}." in name:
                return tensor * 2.0**exponent
        return tensor

    return change


def one_head(name: str, tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    if f".{VALUE}.weight" in name:
        tensor[16:] *= 2.0**-15
    if f".{OUT}.weight" in name:  # the second head of values serves the third and fourth of queries
        tensor[:, 32:] *= 2.0**15
    return tensor


def codes_of(path: Path) -> dict[str, torch.Tensor]:
    run = RunDirectory.open(path)
    return {name: run.read_layer(name).quantized.codes for name in sorted(run.completed_modules())}


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, recipe_for: RecipeFor, silent: Console
) -> Callable[[int], tuple[Recipe, Path]]:
    """Return a function from bits to the run, made once, of a model whose weights are as they should be."""

    @functools.cache
    def run(bits: int) -> tuple[Recipe, Path]:
        recipe, out = recipe_for(bits=bits, group_size=16, samples=2), tmp_path_factory.mktemp("undisturbed") / "run"
        make_run(recipe, out, console=silent)
        return recipe, out

    return run


@pytest.mark.parametrize(
    ("change", "first", "bits"),
    [
        pytest.param(times(exponents) if exponents else one_head, first, bits, id=name, marks=marks)
        for name, exponents, first, bits, marks in (
            ("v tiny-2", {VALUE: -14, OUT: 14}, "v_proj", 2, pytest.mark.slow),
            ("v huge-3", {VALUE: 20, OUT: -20}, "v_proj", 3, ()),
            ("up tiny-2", {UP: -17, DOWN: 17}, "up_proj", 2, ()),
            ("both-2", {UP: 19, DOWN: -19, VALUE: -16, OUT: 16}, "up_proj", 2, pytest.mark.slow),
            ("both-4", {UP: 19, DOWN: -19, VALUE: -16, OUT: 16}, "up_proj", 4, pytest.mark.slow),
            ("both-8", {UP: 19, DOWN: -19, VALUE: -16, OUT: 16}, "up_proj", 8, pytest.mark.slow),
            ("one head-2", None, "v_proj", 2, ()),
            ("one head-3", None, "v_proj", 3, pytest.mark.slow),
        )
    ],
)
def test_a_factor_between_neighbours_changes_no_code(
    change: Any,
    first: str,
    bits: int,
    changed: Any,
    undisturbed: Callable[[int], tuple[Recipe, Path]],
    tmp_path: Path,
    silent: Console,
) -> None:
    plain, before = undisturbed(bits)
    recipe = plain.changed({"model": changed("llama", change)})
    summary = make_run(recipe, tmp_path / "run", console=silent)
    expected, found = codes_of(before), codes_of(tmp_path / "run")
    assert expected.keys() == found.keys()
    for name, codes in expected.items():
        assert torch.equal(found[name], codes), name
    (note,) = (note for note in summary.notes if f"cannot hold {first} of 2 layers" in note)
    assert "powers of two" in note
    assert "model.layers.0." in note
    served = (log_probabilities(cloq_export.load(path, adapter="cloq")) for path in (before, tmp_path / "run"))
    torch.testing.assert_close(*served, rtol=0, atol=1e-4)


def test_what_has_no_neighbour_stays_float_and_that_is_said(
    changed: Any, recipe_for: RecipeFor, tmp_path: Path, silent: Console
) -> None:
    """Qwen 2 has a bias behind v, which stays float, and so does v; nothing takes k's factor over."""
    model = changed("qwen2", times({VALUE: -15, OUT: 15, "self_attn.k_proj": 18}))
    recipe = recipe_for(bits=4, samples=2, rank=0).changed({"model": model})
    summary = quantize(recipe, tmp_path / "run", console=silent)
    unfit = {f"model.layers.{n}.self_attn.{part}" for n in range(2) for part in ("k_proj", "v_proj")}
    assert summary.layers.count == 10
    said = [note for note in summary.notes if " stays float: " in note]
    assert {note.split()[0] for note in said} == unfit
    assert any("are too small for 4 bits" in note for note in said)
    assert any("hold them safely up to 32752" in note for note in said)
    run = RunDirectory.open(tmp_path / "run")
    assert set(run.read_report("layers")["stays_float"]) == unfit
    assert not unfit & run.completed_modules()
    dynamic = json.loads((run.checkpoint_path / "config.json").read_text())["quantization_config"]["dynamic"]
    assert {name[3:-1].replace("\\", "") for name in dynamic if name.startswith("-:")} == unfit
    served, source = cloq_export.load(run.path), open_model(model).model
    for name in unfit:
        assert torch.equal(served.get_submodule(name).weight, source.get_submodule(name).weight)
    # Later steps find the same plan.
    made = adapt(run.path, {"rank": 4}, console=silent)
    assert made.layers.count == 10
    exported = write_export(run.path, ExportOptions(format="compressed_tensors"), console=silent)
    config = json.loads((exported.folder / "config.json").read_text())
    assert unfit <= set(config["quantization_config"]["ignore"])


def test_a_model_of_which_nothing_can_be_held_is_refused(
    changed: Any, recipe_for: RecipeFor, tmp_path: Path, silent: Console
) -> None:
    model = changed("llama", lambda name, tensor: tensor * 2.0**-20 if "_proj" in name else tensor)
    with pytest.raises(
        RecipeError, match=r"no linear layer can be quantized; of model\.layers\.0\.self_attn\.q_proj, "
    ):
        make_run(recipe_for().changed({"model": model}), tmp_path / "run", console=silent)
    assert not (tmp_path / "run").exists()


def test_dead_rows_are_ordinary(changed: Any, recipe_for: RecipeFor, tmp_path: Path, silent: Console) -> None:
    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if f".{UP}.weight" in name:
            tensor = tensor.clone()
            tensor[5:8] *= 1e-9
        return tensor

    recipe = recipe_for().changed({"model": changed("llama", change)})
    summary = make_run(recipe, tmp_path / "run", console=silent)
    assert summary.notes == []
    assert summary.layers.count == 14
    assert sum("3 of 96 outputs have weights too small" in line for line in summary.layers.warnings) == 2


class _Between(nn.Module):
    """Something between two projections."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)
        self.between = between
        with torch.no_grad():
            self.up_proj.weight.mul_(2.0**-20)
            self.down_proj.weight.mul_(2.0**20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down_proj(self.between(self.up_proj(x)))


class _Model(nn.Module):
    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 16)
        self.layers = nn.ModuleList([_Between(between), _Between(between)])

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        states = self.embed(input_ids)
        for layer in self.layers:
            states = layer(states)
        return type("Output", (), {"logits": states})


@pytest.mark.parametrize(
    ("between", "passes"),
    [
        (lambda y: y * torch.linspace(0.5, 2, 32), True),
        (torch.relu, True),  # a positive factor passes it
        (lambda y: nn.functional.silu(y * 2.0**20), False),
        (lambda y: y / (y.norm(dim=-1, keepdim=True) + 1e-30), False),
        (lambda y: y.flip(-1), False),
        (lambda y: y * torch.nan, False),
    ],
    ids=["linear", "relu", "silu", "norm", "mixed", "nan"],
)
def test_factors_are_moved_only_where_the_model_says_the_same(between: Any, passes: bool) -> None:
    model = _Model(between)
    with torch.no_grad():
        # Rows of different sizes: what meets another column than its own would show.
        model.layers[0].up_proj.weight[16:] *= 2.0**-8
        model.layers[0].down_proj.weight[:, 16:] *= 2.0**8
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    blocks = find_blocks(model, "layers")
    plan = make_plan(blocks, Recipe.from_mapping({"model": "none", "group_size": 16, "rank": 0}))
    assert set(plan.unfit) >= {"layers.0.up_proj", "layers.1.up_proj"}
    notes = rescale_neighbours(model, blocks, plan.asked)
    assert len(notes) == passes
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (passes and name != "embed.weight"), name
    assert bool(make_plan(blocks, Recipe.from_mapping({"model": "none", "group_size": 16, "rank": 0})).unfit) != passes


def test_inputs_that_carry_much_through_tiny_weights_are_said(recipe_for: RecipeFor) -> None:
    """By its norm the layer is fine; what it puts out comes from the column that is lost."""
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    weight[:, :16] *= 1e-5
    gram = torch.diag(torch.cat([torch.full((16,), 1e9), torch.full((16,), 0.1)]))
    recipe = recipe_for(bits=4, rank=2, damping=0.0)
    plan = ModulePlan("some.layer", QuantSpec(4, 16), 2)
    solved = solve_group(
        SolveRequest((plan,), {"some.layer": weight}, LayerStats(gram, 64), recipe, initialisation_of(recipe))
    )["some.layer"]
    notes = [note for note in solved.certificate.notes if "comes from weights too small" in note]
    assert len(notes) == 1
    assert "`overrides='some.layer:skip=true'`" in notes[0]


@pytest.mark.parametrize(
    ("method", "init"),
    [
        ("optq", "cloq"),
        ("rtn", "svd"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("rtn", "cloq"), ("magr", "cloq"), ("optq", "svd"), ("magr", "svd"))
        ),
    ],
)
def test_one_sided_weights_fit_version_1(
    method: str, init: str, changed: Any, recipe_for: RecipeFor, tmp_path: Path, silent: Console
) -> None:
    model = changed("llama", lambda name, tensor: tensor.abs() + 0.05 if f".{UP}." in name else tensor)
    recipe = recipe_for(bits=3, format="gptq", method=method, init=init, samples=2).changed({"model": model})
    make_run(recipe, tmp_path / "run", console=silent)
    run = RunDirectory.open(tmp_path / "run")
    assert all(int(run.read_layer(name).quantized.zeros.min()) >= 1 for name in run.completed_modules())
    assert run.state == "done"


def test_the_command_says_which_layers_stay_float(
    changed: Any, recipe_for: RecipeFor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_for(samples=2).changed({"model": changed("llama", times({"self_attn.q_proj": -18}))})
    arguments = ["run", recipe.model, "--out", str(tmp_path / "run")]
    for name in ("calibration", "eval_text", "group_size", "rank", "samples", "seqlen", "eval_window", "precision"):
        arguments += ["--set", f"{name}={getattr(recipe, name)}"]
    assert main(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "model.layers.1.self_attn.q_proj stays float: its weights" in printed
