"""A run whose model is read from disk block by block: the bytes of any other run, in the memory of two blocks."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.errors import SourceError
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.files.tensor_writer import write_safetensors
from cloq_export.models import block_loading
from cloq_export.recipe import Recipe
from cloq_export.verbs.evaluate import evaluate
from cloq_export.verbs.options import EvaluateOptions
from cloq_export.verbs.run import run as make_run
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verify import verify

RecipeFor = Callable[..., Recipe]
Contents = Callable[[Path], dict[str, str]]


def but_options(contents: dict[str, str]) -> dict[str, str]:
    """Return files without those that hold the options themselves."""
    return {name: digest for name, digest in contents.items() if name not in ("run.json", "recipe.yaml")}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("qwen2", {"error_aware": 0.5, "refine": "block", "refine_steps": 4}),
        pytest.param("plain-experts", {"overrides": {"*.0.self_attn.*": {"skip": True}}}, marks=pytest.mark.slow),
        pytest.param("llama", {"budget": 9.0}, marks=pytest.mark.slow),
        pytest.param("llama", {"refine": "model", "refine_steps": 4, "bits": 2}, marks=pytest.mark.slow),
        pytest.param("qwen3-moe", {"expert_rank": 2}, marks=pytest.mark.slow),
        ("gpt-oss", {"experts": "all", "format": "gptq_v2"}),
    ],
    ids=["tied", "refined", "float matrices in blocks", "budget", "refined as a whole", "experts", "fused experts"],
)
def test_the_bytes_and_figures_are_those_of_a_run_in_memory(
    family: str,
    options: dict[str, object],
    tmp_path: Path,
    recipe_for: RecipeFor,
    silent: Console,
    contents: Contents,
) -> None:
    whole = make_run(recipe_for(family, stream="never", **options), tmp_path / "whole", console=silent)
    streamed = make_run(recipe_for(family, stream="always", **options), tmp_path / "streamed", console=silent)
    expected = but_options(contents(tmp_path / "whole"))
    assert but_options(contents(tmp_path / "streamed")) == expected
    assert len(expected) > 15
    assert streamed.perplexity == whole.perplexity
    assert (
        [note for note in streamed.notes if note not in whole.notes]
        == [note for note in streamed.notes if "read from disk block by block" in note]
        != []
    )


def test_weights_that_are_rescaled_are_rescaled_whenever_they_are_read(
    tmp_path: Path, recipe_for: RecipeFor, model_folder: Callable[..., Path], silent: Console, contents: Contents
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama"), folder)
    tensors, metadata = read_safetensors(folder / "model.safetensors")
    for name, tensor in tensors.items():
        tensor *= 2.0**-20 if ".v_proj." in name else 2.0**20 if ".o_proj." in name else 1.0
    write_safetensors(folder / "model.safetensors", tensors, metadata)
    recipe = recipe_for("llama", rank=0).changed({"model": str(folder)})
    whole = make_run(recipe.changed({"stream": "never"}), tmp_path / "whole", console=silent)
    streamed = make_run(recipe.changed({"stream": "always"}), tmp_path / "streamed", console=silent)
    assert any("were multiplied by powers of two" in note for note in streamed.notes)
    assert set(whole.notes) <= set(streamed.notes)
    assert but_options(contents(tmp_path / "streamed")) == but_options(contents(tmp_path / "whole"))


def test_a_shard_that_goes_in_the_middle_stops_the_run_which_goes_on_when_it_is_back(
    tmp_path: Path,
    recipe_for: RecipeFor,
    model_folder: Callable[..., Path],
    silent: Console,
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama"), folder)
    (folder / "model.safetensors").unlink()
    transformers.AutoModelForCausalLM.from_pretrained(model_folder("llama")).save_pretrained(
        folder, max_shard_size="40KB"
    )
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shard = folder / index["model.layers.1.mlp.down_proj.weight"]
    recipe = recipe_for("llama").changed({"model": str(folder), "stream": "always"})
    write = RunDirectory.write_layer

    def write_and_lose(self: RunDirectory, name: str, *rest: object) -> None:
        write(self, name, *rest)  # type: ignore[arg-type]
        if shard.exists():
            shard.rename(tmp_path / "aside")

    with monkeypatch.context() as patched:
        # The next block is read ahead: it must be the files that are asked, not what was read before.
        patched.setattr("cloq_export.models.weights_on_disk.WeightsOnDisk._read_ahead", lambda *_: None)
        patched.setattr(RunDirectory, "write_layer", write_and_lose)
        with pytest.raises(SourceError, match="finished layers are kept"):
            make_run(recipe, tmp_path / "run", console=silent)
    (tmp_path / "aside").rename(shard)
    kept = list((tmp_path / "run" / "layers").glob("*.safetensors"))
    assert kept
    make_run(recipe, tmp_path / "run", console=silent)
    make_run(recipe.changed({"stream": "never"}), tmp_path / "whole", console=silent)
    assert but_options(contents(tmp_path / "run")) == but_options(contents(tmp_path / "whole"))


def test_eval_measures_the_same(tmp_path: Path, recipe_for: RecipeFor, silent: Console) -> None:
    recipe = recipe_for("llama")
    make_run(recipe, tmp_path / "run", console=silent)
    asked = {"text": recipe.eval_text, "window": 16, "windows": 5}
    whole = evaluate(tmp_path / "run", EvaluateOptions(**asked, stream="never"), console=silent)
    streamed = evaluate(tmp_path / "run", EvaluateOptions(**asked, stream="always"), console=silent)
    assert streamed.perplexity == whole.perplexity
    assert "read from disk block by block" in streamed.notes[0]
    assert not whole.notes


def test_verify_reads_the_float_model_block_by_block_where_memory_asks_for_it(
    tmp_path: Path, recipe_for: RecipeFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A matrix of a block stays float, and is compared with the one on disk.
    recipe = recipe_for("llama", overrides={"*.1.mlp.up_proj": {"skip": True}})
    make_run(recipe, tmp_path / "run", console=Console(file=io.StringIO()))
    short = {"window": 16, "windows": 2, "prompts": 2, "new_tokens": 3, "liveness_tokens": 16}
    options = VerifyOptions(reference=recipe.model, text=recipe.eval_text, **short)
    reports, said = [], []
    for free in (10**12, 1000):
        monkeypatch.setattr(block_loading, "free_bytes", lambda free=free: free)
        console = Console(file=io.StringIO(), width=300)
        reports.append(verify(tmp_path / "run", options, console=console))
        said.append("read from disk block by block" in console.file.getvalue())  # type: ignore[attr-defined]
    assert said == [False, True]
    whole, streamed = reports
    assert streamed.passed
    assert streamed.quality == whole.quality
    assert streamed.numerics == whole.numerics
    assert streamed.float_part == whole.float_part


_MEASURE = """
import io, json, sys
from pathlib import Path
import torch
from rich.console import Console
from cloq_export.compress import job
from cloq_export.process.host_memory import MemoryWatch
from cloq_export.recipe import Recipe
from cloq_export.verbs.run import run
import transformers.models.llama.modeling_llama, peft
torch.set_num_threads(1)
watch = MemoryWatch()
job.MemoryWatch = lambda: watch  # its own one would forget the peak while the model is opened
run(Recipe.from_mapping(json.loads(sys.argv[1])), Path(sys.argv[2]), console=Console(file=io.StringIO()))
print(watch.stop().beyond_start)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process can be reset on Linux alone")
def test_the_peak_does_not_grow_with_the_number_of_blocks(
    tmp_path: Path, recipe_for: RecipeFor, model_folder: Callable[..., Path]
) -> None:
    recipe = recipe_for("llama", rank=0, bits=2, samples=2, method="rtn", grid="minmax")
    shape = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8, "vocab_size": 96}
    block_bytes = 4 * 7 * 512 * 512
    peaks: dict[tuple[int, str], int] = {}
    for blocks in (4, 16):
        folder = tmp_path / f"model-{blocks}"
        shutil.copytree(model_folder("llama"), folder)
        config = transformers.LlamaConfig(**shape, num_hidden_layers=blocks, max_position_embeddings=64)
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        for stream in ("always", "never"):
            options = {**recipe.to_mapping(), "model": str(folder), "stream": stream}
            command = [sys.executable, "-c", _MEASURE, json.dumps(options), str(tmp_path / f"run-{blocks}-{stream}")]
            peaks[blocks, stream] = int(subprocess.run(command, check=True, capture_output=True).stdout)
    # Codes of 2 bits are measured whole: with their scales and zeros less than an eighth of a block each.
    assert peaks[16, "always"] - peaks[4, "always"] < 3 * block_bytes
    assert peaks[16, "never"] - peaks[4, "never"] > 10 * block_bytes
