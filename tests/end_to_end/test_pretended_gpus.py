"""Every stage on GPUs that are only pretended: nothing lies on the wrong side, and the host waits where it may only."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_device import PretendedGpus, pretended_gpus
from rich.console import Console

import cloq_export
from cloq_export.engines.decoding import continue_greedily
from cloq_export.models.blocks import find_blocks
from cloq_export.models.source import open_model
from cloq_export.models.stream import BlockStream
from cloq_export.quantize import damp_gram
from cloq_export.quantize.layers import QuantizeOptions, quantize_group
from cloq_export.recipe import FineTuneRecipe, Recipe
from cloq_export.types import QuantSpec
from cloq_export.verbs.finetune import finetune
from cloq_export.verbs.run import run as make_run
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verify import verify

RecipeFor = Callable[..., Recipe]
SMALL: dict[str, Any] = {"samples": 2, "seqlen": 16, "rank": 2, "eval_windows": 2}

# Where the host may wait for a GPU, or copy from or to it, by how often that is.
ALLOWED = {
    "once for each layer, or for each input that layers share": """
        adapt.cloq:_svd_by_gram
        adapt.cloq:_tail
        adapt.cloq:truncated_svd
        adapt.stored:_keeps
        compress.costs:CostMeter._measure
        compress.costs:_left_by_rank
        compress.costs:_left_by_rank.<locals>.<listcomp>
        compress.costs:_replaced
        compress.costs:divergences_of
        compress.problem:InputFigures.of
        compress.solve:_frobenius
        compress.solve:_lost_notes
        compress.solve:_problems
        compress.walk:BlockWalk._solve
        quantize.comq:refit_scales
        quantize.comq:sweep_codes
        quantize.damping:DampedGram.condition
        quantize.damping:damp_gram
        quantize.damping:effective_rank
        quantize.damping:spectral_norm
        quantize.grid:fit_grid
        quantize.grid:raise_zeros
        quantize.optq:feedback_factor
        quantize.reach:lost_groups
        refine.trained_layer:_root_mean_square
        types:LayerStats.__post_init__
        types:LoraPair.__post_init__
        types:LoraPair.to
        types:QuantizedLayer.__post_init__
        types:QuantizedLayer.to
    """,
    "once for each step of MagR or of a truncated SVD, whose end they decide": """
        adapt.cloq:_iterate
        quantize.magr:_clip_level
        quantize.magr:_largest_eigenvalue
        quantize.magr:_Descent._descend
    """,
    "once for each batch of a mixture's tokens, which are dealt out to its experts": """
        models.experts:SplitExperts._forward_sorted
        models.experts:SplitExperts.forward
    """,
    "once for each block": """
        models.stream:BlockStream.refuse_overflow
    """,
    "once for each judgement of a refinement": """
        compress.model_refined:ModelObjective.error.<locals>.<listcomp>.<genexpr>
        refine.training:mean_error.<locals>.<genexpr>
    """,
    "once for a stream of blocks: what all batches are given, and the model's embeddings and head": """
        models.block_arguments:BlockArguments.invoke
        models.block_arguments:OnDevice.put
        models.lending:lent
        models.stream:BlockStream.__init__
        models.stream:BlockStream.differentiable_logits
        models.stream:BlockStream.head_on_device
    """,
    "once for each load of a model": """
        engines.packed_linear:PackedLinear._apply
        engines.packed_lora:PackedLoraLinear._apply
        engines.transformers.loading:dequantized_model
        engines.transformers.loading:load
        verbs.stored_model:measure_perplexity
        verbs.verification.float_side:measure_float
    """,
    "once for each window or text that is measured": """
        engines.transformers.reference:ReferenceModel.token_gaps
        engines.transformers.reference:ReferenceModel.logprobs_of
        engines.transformers.reference:_gaps
        engines.transformers.reference:_scale_gradients
        engines.transformers.served:padded_rows
        engines.transformers.served:sequence_logprobs
        engines.transformers.served:whole_vocabulary
        parity.divergence:WatchedDivergences.watch.<locals>.note
        parity.perplexity:_logits_of
        parity.perplexity:_losses_of
        parity.perplexity:_mean_loss
        parity.perplexity:window_losses
    """,
    "once for each token": """
        engines.decoding:_filled_up
        engines.decoding:_continue_together
    """,
    "once for each step of a training, or each of its checkpoints": """
        files.tensor_writer:tensor_bytes
        train.loss:next_token_loss
        train.pairs:place_pairs
        train.pairs:trained_pairs.<locals>.<genexpr>
        train.trainer:AdapterTrainer._save
        train.trainer:AdapterTrainer.compute_loss
        train.trainer:AdapterTrainer.evaluate
        train.trainer:AdapterTrainer.training_step
        train.trainer:train_adapter
    """,
}


def check(gpus: PretendedGpus) -> None:
    """Hold what was counted against what is allowed."""
    assert not gpus.faults
    allowed = {site for sites in ALLOWED.values() for site in sites.split()}
    assert {site for _, site in gpus.waits if site != "elsewhere"} - allowed == set()


COMBINED = [
    (2, "cuda:1", "llama", {"method": "rtn", "stream": "always", "error_aware": 0.5, "samples": 4}),
    (1, "cuda", "qwen2", {"method": "rtn", "refine": "block", "refine_steps": 3, "rank": 0, "bits": 2, "samples": 64}),
]
THOROUGH = [
    (1, "cuda", "llama", {"method": "rtn", "grid": "minmax", "init": "svd", "split": "balanced"}),
    (1, "cuda", "llama", {"error_aware": 0.5, "token_weighting": "inverse_norm"}),
    (2, "cuda", "plain-experts", {"method": "rtn", "svd": "full"}),
    (1, "cuda", "llama", {"method": "magr", "sweeps": 2, "refit": True, "bits": 2}),
    (1, "cuda", "qwen2", {"refine": "block", "refine_steps": 3, "error_aware": 0.5, "samples": 64}),
    (1, "cuda", "llama", {"refine": "model", "refine_steps": 3, "bits": 2, "samples": 64}),
    (2, "cuda", "llama", {"budget": 9.0}),
    (1, "cuda", "qwen3-moe", {"error_aware": 0.5, "expert_rank": 2}),
    (1, "cuda", "qwen3-moe", {"experts": "all"}),
    (1, "cuda", "llama4", {"experts": "all"}),
    (1, "cuda", "gemma2", {"svd": "full", "symmetric": True, "bits": 8, "format": "compressed_tensors"}),
]


@pytest.mark.parametrize(
    ("devices", "device", "family", "options"),
    [*COMBINED, *(pytest.param(*each, marks=pytest.mark.slow) for each in THOROUGH)],
)
def test_a_run_is_that_of_the_processor(
    devices: int,
    device: str,
    family: str,
    options: dict[str, Any],
    tmp_path: Path,
    recipe_for: RecipeFor,
    silent: Console,
) -> None:
    recipe = recipe_for(family, **{**SMALL, **options})
    with pretended_gpus(devices) as gpus:
        there = make_run(recipe.changed({"device": device}), tmp_path / "there", console=silent)
    here = make_run(recipe, tmp_path / "here", console=silent)
    check(gpus)
    for name, measured in here.perplexity.models.items():
        assert there.perplexity.models[name].perplexity == pytest.approx(measured.perplexity, rel=0.02)
    # What is said differs where weights are on disk: by what is free, and by where they are measured.
    said = [
        [note for note in notes if "on disk" not in note and "from disk" not in note]
        for notes in (there.notes, here.notes)
    ]
    assert said[0] == said[1]
    used = {index for index, peak in gpus.peak.items() if peak and index >= 0}
    assert used == ({0, 1} if devices == 2 and device == "cuda" else {1 if device == "cuda:1" else 0})
    assert not any(gpus.in_use.values())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, recipe_for: RecipeFor, silent: Console) -> Path:
    """Return a finished 2-bit run; it must only be read."""
    out = tmp_path_factory.mktemp("made") / "run"
    make_run(recipe_for("llama", bits=2, method="rtn", adapter_dtype="float32", **SMALL), out, console=silent)
    return out


@pytest.mark.slow
def test_a_model_in_its_own_dtype_is_solved_with_the_gpus_kernels(
    tmp_path: Path, recipe_for: RecipeFor, model_folder: Callable[..., Path], silent: Console
) -> None:
    recipe = recipe_for("llama", **SMALL, method="rtn", precision="auto", device="cuda", error_aware=0.5)
    with pretended_gpus(capability=(9, 0)) as gpus:
        summary = make_run(
            recipe.changed({"model": str(model_folder("llama", torch.bfloat16))}), tmp_path / "run", console=silent
        )
    check(gpus)
    assert summary.perplexity.models["adapter"].perplexity < 1000.0


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_training_waits_as_often_in_every_step(
    precision: str, made: Path, tmp_path: Path, texts: dict[str, str], silent: Console
) -> None:
    recipe = {"name": "trained", "steps": 2, "batch_size": 2, "seqlen": 16, "learning_rate": 1e-2, "device": "cuda"}
    recipe |= {"data": texts["calibration"], "precision": precision, "gradient_checkpointing": precision == "bfloat16"}
    waits = []
    for steps in (2, 6):
        shutil.copytree(made, tmp_path / str(steps))
        capability = (8, 0) if precision == "bfloat16" else (7, 5)
        with pretended_gpus(capability=capability) as gpus:
            finetune(tmp_path / str(steps), FineTuneRecipe.from_mapping({**recipe, "steps": steps}), console=silent)
        check(gpus)
        waits.append(sum(count for (what, _), count in gpus.waits.items() if what != "copy from the host"))
    # Rows with labels, a loss that is finite, and four of the trainer, which shows loss and norm of every step.
    assert waits[1] - waits[0] <= 6 * 4


@pytest.mark.slow
def test_verification_passes(made: Path, recipe_for: RecipeFor) -> None:
    recipe = recipe_for()
    short = {"window": 16, "windows": 2, "prompts": 2, "new_tokens": 3, "liveness_tokens": 16}
    options = VerifyOptions(reference=recipe.model, text=recipe.eval_text, device="cuda", **short)
    with pretended_gpus() as gpus:
        report = verify(made, options, console=Console(quiet=True))
    check(gpus)
    assert report.passed
    assert gpus.peak[0]


@pytest.mark.parametrize("capability", [(7, 5), pytest.param((9, 0), marks=pytest.mark.slow)], ids=["old", "new"])
def test_a_loaded_model_generates_and_waits_once_for_each_token(made: Path, capability: tuple[int, int]) -> None:
    prompts = [[3, 4, 5], [6, 7]]
    plain = cloq_export.load(made, adapter="cloq", dtype=torch.float32)
    expected = continue_greedily(plain, prompts, 8)
    waits = []
    for tokens in (4, 8):
        with pretended_gpus(2, capability=capability) as gpus:
            model = cloq_export.load(made, adapter="cloq", device="cuda:1", dtype=torch.float32)
            # On its first token each layer brings its pairs into the form that the kernels take.
            continue_greedily(model, prompts, 1)
            assert {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {torch.device("cuda", 1)}
            gpus.waits.clear()
            found = continue_greedily(model, prompts, tokens)
        assert found == [text[:tokens] for text in expected]
        waits.append(gpus.waits["copy to the host", "engines.decoding:_continue_together"])
    assert waits == [4, 8]


def test_a_forward_pass_waits_once_for_each_block(model_folder: Callable[..., Path]) -> None:
    model = open_model(str(model_folder("llama")), dtype=torch.float32).model
    blocks = find_blocks(model, "")
    waits = []
    for windows in (2, 6):
        with pretended_gpus() as gpus:
            stream = BlockStream(model, blocks, torch.ones(windows, 16, dtype=torch.int64), device="cuda")
            gpus.waits.clear()
            hidden = stream.hidden
            for index in range(len(blocks)):
                hidden = stream.forward_block(index, hidden)
        assert stream.storage.type == "cuda"
        waits.append(dict(gpus.waits))
    assert waits[0] == waits[1] == {("_local_scalar_dense", "models.stream:BlockStream.refuse_overflow"): len(blocks)}


@pytest.mark.parametrize("options", [QuantizeOptions(), QuantizeOptions(grid="minmax", sweeps=1, refit=True)])
def test_columns_are_quantized_without_waiting(options: QuantizeOptions) -> None:
    waits = []
    for columns in (32, 160):
        with pretended_gpus() as gpus:
            inputs = torch.randn(200, columns, generator=torch.Generator().manual_seed(0)).to("cuda")
            weights = [torch.randn(16, columns, device="cuda") for _ in range(2)]
            damped = damp_gram(inputs.T @ inputs, 0.01)
            gpus.waits.clear()
            quantize_group(weights, QuantSpec(3, 32, False), damped, options)
        assert not gpus.faults
        waits.append(dict(gpus.waits))
    assert waits[0] == waits[1]
