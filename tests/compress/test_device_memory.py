"""Memory that is counted before a run, beside the book-keeping of a pretended GPU during it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from pretended_device import pretended_gpus
from rich.console import Console

from cloq_export.adapt import cloq
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.compress import device_memory, strategies
from cloq_export.compress.block_shape import InputGroup, block_shapes
from cloq_export.compress.device_memory import solve_bytes, walk_stages
from cloq_export.compress.initialisations import initialisation_of
from cloq_export.compress.job import CompressJob
from cloq_export.compress.plan import ModulePlan, make_plan
from cloq_export.compress.solve import SolveRequest, solve_group
from cloq_export.compress.strategies import strategy_of
from cloq_export.compress.walk import BlockWalk
from cloq_export.models import lending
from cloq_export.models.blocks import find_blocks
from cloq_export.recipe import Recipe
from cloq_export.types import LayerStats, QuantSpec
from cloq_export.verbs.run import run


@pytest.mark.parametrize("exact_side", [16, 2048])
@pytest.mark.parametrize(
    "options", [{"error_aware": 0.25}, {"error_aware": 0.0, "method": "magr"}, {"error_aware": 0.0, "rank": 0}]
)
@pytest.mark.parametrize(("inputs", "outs"), [(192, (192, 96, 96)), (128, (320,)), (320, (128,))])
def test_a_solve_takes_what_was_counted(
    inputs: int, outs: tuple[int, ...], options: dict[str, Any], exact_side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (cloq, device_memory):
        monkeypatch.setattr(module, "EXACT_SIDE", exact_side)
    recipe = Recipe.from_mapping({"model": "m", "rank": 4, "group_size": 32, "grid": "minmax", **options})
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * inputs, inputs, generator=generator)
    drift = {}
    with pretended_gpus() as gpus, torch.no_grad():
        gram = (x.T @ x).to("cuda")
        if recipe.error_aware:
            drift = {"drift": (0.1 * x.T @ x).to("cuda"), "drift_gram": (x[::2].T @ x[::2]).to("cuda")}
        weights = {
            f"layer{number}": torch.randn(out, inputs, generator=generator).to("cuda", torch.bfloat16)
            for number, out in enumerate(outs)
        }
        plans = tuple(ModulePlan(name, QuantSpec(2, 32, False), recipe.rank) for name in weights)
        request = SolveRequest(plans, weights, LayerStats(gram, len(x), **drift), recipe, initialisation_of(recipe))
        before = gpus.in_use[0]
        gpus.reset_peak()
        solve_group(request)
    counted = solve_bytes(InputGroup(inputs, outs, recipe.rank), recipe)
    assert counted == pytest.approx(gpus.peak[0] - before, rel=0.1)


PAIRED = {"error_aware": 0.25, "float_share": 0.5}


@pytest.mark.parametrize(
    ("options", "inside", "parks"),
    [
        ({"error_aware": 0.0}, True, False),
        ({"error_aware": 0.0}, False, False),
        (PAIRED, True, False),
        (PAIRED, False, False),
        (PAIRED, False, True),
    ],
)
def test_a_walk_takes_what_was_counted(
    options: dict[str, Any],
    inside: bool,
    parks: bool,
    tmp_path: Path,
    recipe_for: Callable[..., Recipe],
    silent: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**wide, num_key_value_heads=2, vocab_size=96, max_position_embeddings=256)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    recipe = recipe_for(**options, grid="minmax", rank=4).changed({"samples": 8, "seqlen": 128, "device": "cuda"})
    blocks = find_blocks(model, "")
    plan = make_plan(blocks, recipe)
    shapes = block_shapes(model, plan, recipe)
    if not inside:
        for module in (device_memory, lending):
            monkeypatch.setattr(module, "STORAGE_SHARE", 0.0)
    with (
        pretended_gpus() as gpus,
        RunDirectory.create_or_resume(tmp_path / "run", recipe.to_mapping(), "f", {}) as directory,
    ):
        windows = SimpleNamespace(solving=torch.randint(96, (8, 128), generator=torch.Generator().manual_seed(0)))
        job = CompressJob(model, plan, recipe, directory, windows, strategy_of(recipe), torch.device("cuda"), None)
        walk = BlockWalk(job, silent, windows_per_batch=2)
        walk._stream.parks_waiting = parks
        assert (walk._stream.storage.type == "cuda") == inside
        walk.run()
        peak = gpus.peak[0]
    counted = walk_stages(shapes[0], recipe, 2, 80 << 30, parks=parks)
    assert max(stage.bytes for stage in counted) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(("family", "limit"), [("llama", 900), pytest.param("qwen3-moe", 1200, marks=pytest.mark.slow)])
def test_a_limit_is_kept_and_changes_no_byte(
    family: str,
    limit: int,
    tmp_path: Path,
    recipe_for: Callable[..., Recipe],
    silent: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(strategies, "TOKENS_PER_BATCH", 128)
    recipe = recipe_for(family, samples=32, seqlen=64, rank=2, eval_windows=1, device="cuda")
    layers, peaks = [], []
    for most in ("", f"{limit}KB"):
        out = tmp_path / (most or "free")
        with pretended_gpus() as gpus:
            summary = run(recipe.changed({"device_memory": most}), out, console=silent)
        assert not gpus.faults
        assert not [note for note in summary.notes if "calibration windows" in note]
        layers.append({path.name: path.read_bytes() for path in sorted((out / "layers").glob("*.safetensors"))})
        peaks.append(gpus.peak[0])
    assert layers[0]
    assert layers[0] == layers[1]
    assert peaks[0] > 1000 * limit >= peaks[1]
