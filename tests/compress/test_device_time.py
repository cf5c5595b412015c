"""Operations that are counted before a run, beside those that torch counts while it computes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from pretended_device import pretended_gpus
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from cloq_export.adapt import cloq
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.compress import device_time
from cloq_export.compress.block_shape import BlockShape, InputGroup, block_shapes
from cloq_export.compress.cards import CARDS
from cloq_export.compress.device_time import CardTime, CountedSteps, Work, run_work, solve_work
from cloq_export.compress.initialisations import initialisation_of
from cloq_export.compress.job import CompressJob
from cloq_export.compress.plan import ModulePlan, make_plan
from cloq_export.compress.solve import SolveRequest, solve_group
from cloq_export.compress.strategies import strategy_of
from cloq_export.compress.walk import BlockWalk
from cloq_export.models.blocks import find_blocks
from cloq_export.models.experts import split_experts
from cloq_export.quantize import layers
from cloq_export.quantize.magr import reduce_magnitude
from cloq_export.recipe import Recipe
from cloq_export.types import LayerStats, QuantSpec

STEPS = CountedSteps(magr=4, exact=1, subspace=1, subspace_exact=1)
aten = torch.ops.aten


def of_qr(shape: Any, *_: Any, **__: Any) -> float:
    rows, columns = max(shape), min(shape)
    return 4 * rows * columns**2 - 4 * columns**3 / 3


def of_svd(shape: Any, *_: Any, **__: Any) -> float:
    rows, columns = max(shape), min(shape)
    return 6 * rows * columns**2 + 20 * columns**3


# What torch's own counter does not know: products in place, and factorisations, counted as in Golub and Van Loan's
# Matrix Computations.
FACTORISATIONS: dict[Any, Callable[..., float]] = {
    aten.linalg_cholesky_ex: lambda shape, *_, **__: shape[-1] ** 3 / 3,
    aten.linalg_solve_triangular: lambda left, right, *_, **__: left[-1] ** 2 * right[-1],
    aten.cholesky_solve: lambda right, left, *_, **__: 2 * left[-1] ** 2 * right[-1],
    aten._linalg_eigh: lambda shape, *_, **__: 9 * shape[-1] ** 3,
    aten._linalg_solve_ex: lambda left, *_, **__: left[0] * 2 * left[-1] ** 3 / 3,
    aten.addmm_: lambda _, left, right, *__, **___: 2 * left[0] * left[1] * right[1],
    aten.addr_: lambda _, left, right, *__, **___: 2 * left[0] * right[0],
    aten.linalg_qr: of_qr,
    aten._linalg_svd: of_svd,
}


def counting() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=FACTORISATIONS)


def operations(works: list[Work]) -> float:
    # Grids are elementwise, which torch does not count.
    return sum(work.operations for work in works if work.stage != "grids")


@pytest.fixture(autouse=True)
def _counted_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let iterations end after a known number of steps, by which they are counted."""
    monkeypatch.setattr(layers, "reduce_magnitude", functools.partial(reduce_magnitude, max_iterations=4, tolerance=0))
    monkeypatch.setattr(cloq, "_RESIDUAL_TOLERANCE", 1e9)


@pytest.mark.parametrize(
    ("exact_side", "options"),
    [
        (16, {"error_aware": 0.25}),
        (2048, {"error_aware": 0.0, "method": "magr", "svd": "full"}),
        (2048, {"error_aware": 0.0, "low_rank_rounds": 2}),
        (16, {"error_aware": 0.0, "rank": 0, "sweeps": 2, "refit": True}),
    ],
    ids=["aware", "magr", "rounds", "sweeps"],
)
def test_a_solve_has_as_many_operations_as_were_counted(
    options: dict[str, Any], exact_side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (cloq, device_time):
        monkeypatch.setattr(module, "EXACT_SIDE", exact_side)
    inputs, outs = 256, (192, 224)
    recipe = Recipe.from_mapping({"model": "m", "rank": 8, "group_size": 64, "grid": "minmax", **options})
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * inputs, inputs, generator=generator) * torch.logspace(0, -1, inputs)
    drift = {}
    with pretended_gpus(), torch.no_grad():
        gram = (x.T @ x).to("cuda")
        if recipe.error_aware:
            drift = {"drift": (0.1 * x.T @ x).to("cuda"), "drift_gram": (x[::2].T @ x[::2]).to("cuda")}
        weights = {
            f"layer{number}": torch.randn(out, inputs, generator=generator).to("cuda")
            for number, out in enumerate(outs)
        }
        plans = tuple(ModulePlan(name, QuantSpec(2, 64, False), recipe.rank) for name in weights)
        request = SolveRequest(plans, weights, LayerStats(gram, len(x), **drift), recipe, initialisation_of(recipe))
        with counting() as flops:
            solve_group(request)
    counted = operations(solve_work(InputGroup(inputs, outs, recipe.rank), recipe, STEPS))
    assert counted == pytest.approx(flops.get_total_flops(), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"error_aware": 0.0, "method": "magr"}, {"error_aware": 0.25, "float_share": 0.5}],
    ids=["paper", "aware"],
)
def test_a_walk_has_as_many_operations_as_were_counted(
    options: dict[str, Any], tmp_path: Path, recipe_for: Callable[..., Recipe], silent: Console
) -> None:
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=256,
        attn_implementation="eager",  # which torch's counter sees on a CPU too
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    recipe = recipe_for(**options, grid="minmax", rank=4).changed({"samples": 8, "seqlen": 256, "device": "cuda"})
    plan = make_plan(find_blocks(model, ""), recipe)
    shapes = block_shapes(model, plan, recipe)
    assert [shape.alike for shape in shapes] == [2]
    with (
        pretended_gpus(),
        RunDirectory.create_or_resume(tmp_path / "run", recipe.to_mapping(), "f", {}) as directory,
    ):
        windows = SimpleNamespace(solving=torch.randint(96, (8, 256), generator=torch.Generator().manual_seed(0)))
        job = CompressJob(model, plan, recipe, directory, windows, strategy_of(recipe), torch.device("cuda"), None)
        walk = BlockWalk(job, silent, windows_per_batch=2)
        with counting() as flops:
            walk.run()
    works = run_work(shapes, recipe, narrow=False, steps=STEPS)
    assert operations(works) == pytest.approx(flops.get_total_flops(), rel=0.1)
    passes = next(work for work in works if work.stage == "forward")
    # Products and attention of the forward passes by themselves, exactly.
    one = counting()
    with one, torch.no_grad():
        model.model(input_ids=windows.solving[:1], use_cache=False)
    streams = 1.5 if recipe.error_aware else 1
    assert passes.operations == pytest.approx(8 * streams * one.get_total_flops(), rel=1e-3)


def test_experts_are_given_their_share_of_the_tokens() -> None:
    config = transformers.Qwen3MoeConfig(
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        vocab_size=96,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    split_experts(model)
    recipe = Recipe(samples=4, seqlen=32, rank=4, group_size=32)
    (shape,) = block_shapes(model, make_plan(find_blocks(model, ""), recipe), recipe)
    assert not shape.traced
    assert {group.share for group in shape.groups} == {1.0, 0.25}
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model.model(input_ids=torch.zeros(1, 32, dtype=torch.int64), use_cache=False)
    # Two experts of each token and all other linears; attention, which is small in short windows, is not in it.
    assert shape.operations == pytest.approx(flops.get_total_flops(), rel=0.1)


def test_the_time_of_a_kernel_is_that_of_what_limits_it() -> None:
    card = CARDS[1]
    assert card.name == "H200"
    works = [
        Work("a", "multiplies", "half", operations=989e12, bytes=1.0),
        Work("a", "reads", bytes=4.8e12 * 2),
        Work("b", "launches", launches=1e6),
        Work("b", "copy", link=64e9),
    ]
    time = CardTime.of(works, card)
    assert time.stages == pytest.approx({"a": 3.0, "b": 6.0})
    assert (time.dominating, time.seconds) == ("b: launches", pytest.approx(9.0))
    assert time.share == pytest.approx(5 / 9)
    shape = BlockShape((InputGroup(64, (64,), 4),), 1, 1, 1, 1, alike=3)
    recipe = Recipe(samples=2, seqlen=16, group_size=32, rank=4)
    single = run_work([BlockShape((InputGroup(64, (64,), 4),), 1, 1, 1, 1)], recipe, narrow=True)
    tripled = run_work([shape], recipe, narrow=True)
    assert [work.operations for work in tripled] == pytest.approx([3 * work.operations for work in single])
