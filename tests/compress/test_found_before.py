"""What a layout, the disk or a training cannot take is found before the work, and odd widths have a layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layers_as_made import log_probabilities
from rich.console import Console

import cloq_export
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.errors import RunDirectoryError, ShapeError, UsageError
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.files.tensor_writer import write_safetensors
from cloq_export.formats.registry import LAYOUTS
from cloq_export.recipe import Recipe
from cloq_export.verbs.adapt_checkpoint import adapt_checkpoint
from cloq_export.verbs.run import run as make_run
from cloq_export.verbs.run_and_finetune import run_and_finetune

RecipeFor = Callable[..., Recipe]


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]) -> Callable[[int], Path]:
    """Return a function from a width to a Llama whose feed-forward layers have it."""

    def make(width: int) -> Path:
        folder = tmp_path_factory.mktemp("odd") / str(width)
        shutil.copytree(model_folder("llama"), folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": width}))
        tensors, metadata = read_safetensors(folder / "model.safetensors")
        for name, tensor in tensors.items():
            if ".mlp." in name:
                cut = tensor[:, :width] if "down_proj" in name else tensor[:width]
                tensors[name] = torch.cat([cut, cut], int("down_proj" in name)).narrow(
                    int("down_proj" in name), 0, width
                )
        write_safetensors(folder / "model.safetensors", tensors, metadata)
        return folder

    return make


@pytest.mark.parametrize(
    ("width", "options"),
    [
        pytest.param(80, {"bits": 3, "group_size": 16}, marks=pytest.mark.slow),
        (80, {"bits": 3, "group_size": 16, "format": "compressed_tensors_padded", "symmetric": True}),
        (72, {"bits": 2, "group_size": 8}),
        pytest.param(90, {"bits": 4, "group_size": -1, "rank": 0}, marks=pytest.mark.slow),
        (75, {"bits": 8, "group_size": -1}),
    ],
    ids=str,
)
def test_any_width_is_loaded_and_measured(
    width: int, options: dict[str, Any], odd_model: Any, recipe_for: RecipeFor, tmp_path: Path, silent: Console
) -> None:
    recipe = recipe_for(samples=2, **{"format": "compressed_tensors", **options})
    recipe = recipe.changed({"model": str(odd_model(width))})
    summary = make_run(recipe, tmp_path / "run", console=silent)
    assert summary.perplexity.models["quantized"].perplexity > 1
    adapter = "cloq" if recipe.rank else None
    served = cloq_export.load(tmp_path / "run", adapter=adapter)
    dense = cloq_export.dequantized_model(tmp_path / "run", adapter, merged=False)
    torch.testing.assert_close(log_probabilities(served), log_probabilities(dense), rtol=0, atol=1e-4)
    # The same codes as another tool's, without anything that says that they are ours.
    foreign = tmp_path / "foreign"
    shutil.copytree(tmp_path / "run" / "checkpoint", foreign)
    (foreign / "cloq_certificate.json").unlink()
    config = json.loads((foreign / "config.json").read_text())
    for key in ("cloq", "meta"):
        del config["quantization_config"][key]
    config["quantization_config"]["version"] = "0.17.0" if "padded" in recipe.format else "0.18.0"
    (foreign / "config.json").write_text(json.dumps(config))
    assert torch.equal(
        log_probabilities(cloq_export.load(foreign)), log_probabilities(cloq_export.load(tmp_path / "run"))
    )
    again = recipe.changed({"rank": 2, "format": "gptq_v2"})
    with pytest.raises(ShapeError, match=r"whole 32-bit words.* choose a layout that holds them: `format=compress"):
        adapt_checkpoint(foreign, again, tmp_path / "adapted", console=silent)
    assert not (tmp_path / "adapted").exists()
    adapt_checkpoint(foreign, again.changed({"format": recipe.format}), tmp_path / "adapted", console=silent)
    assert RunDirectory.open(tmp_path / "adapted").state == "done"


def test_codes_that_the_layout_has_no_room_for_are_refused_before_the_work(
    changed: Any, recipe_for: RecipeFor, tmp_path: Path, silent: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = changed("llama", lambda name, tensor: tensor.abs() + 0.05 if ".mlp.up_proj." in name else tensor)
    recipe = recipe_for(bits=4, rank=0, samples=2).changed({"model": model})
    make_run(recipe, tmp_path / "run", console=silent)
    monkeypatch.setattr("cloq_export.compress.job.make_layers", lambda *_: pytest.fail("the work was begun"))
    with pytest.raises(cloq_export.errors.CloqError, match=r"up_proj has a zero of 0, which the layout gptq"):
        adapt_checkpoint(
            tmp_path / "run" / "checkpoint",
            recipe.changed({"rank": 2, "format": "gptq"}),
            tmp_path / "x",
            console=silent,
        )


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_names_that_a_layout_cannot_write_are_refused_before_the_work(
    layout: str, recipe_for: RecipeFor, tmp_path: Path, silent: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloq_export.compress.job.make_layers", lambda *_: pytest.fail("the work was begun"))
    monkeypatch.setattr("cloq_export.compress.opening.linears_beside", lambda *_: ("model.odd name",))
    with pytest.raises(cloq_export.errors.FormatError, match=r"the module name 'model\.odd name' "):
        make_run(recipe_for(format=layout, symmetric=True), tmp_path / "run", console=silent)
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_too_small_is_found_before_the_work(
    recipe_for: RecipeFor, tmp_path: Path, silent: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(samples=2)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(RunDirectoryError, match=r"has room for 0\.10 MB, and this run writes at least .* MB there"):
        make_run(recipe, tmp_path / "run", console=silent)
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    make_run(recipe, tmp_path / "run", console=silent)
    written = sum(
        path.stat().st_size
        for folder in ("layers", "checkpoint", "adapters")
        for path in (tmp_path / "run" / folder).rglob("*.safetensors")
    )
    # What was counted is what was written, but for headers.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(0.8 * written)))
    with pytest.raises(RunDirectoryError, match="has room for"):
        make_run(recipe, tmp_path / "other", console=silent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=written))
    make_run(recipe, tmp_path / "other", console=silent)


def test_what_a_fine_tuning_behind_a_run_needs_is_found_before_the_run(
    recipe_for: RecipeFor, tmp_path: Path, silent: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloq_export.compress.job.make_layers", lambda *_: pytest.fail("the work was begun"))
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "w1 w2 w3"}\n{"texts": "w1"}\n')
    whole = str(tmp_path / "whole.jsonl")
    Path(whole).write_text('{"prompt": "w1", "completion": " w2"}\n{"prompt": "w3", "completion": " w4"}\n')

    def refused(error: type[Exception], match: str, rank: int = 4, **tuning: Any) -> None:
        recipe = recipe_for(rank=rank, samples=2, finetune={"data": str(data), "seqlen": 16, **tuning})
        with pytest.raises(error, match=match):
            run_and_finetune(recipe, tmp_path / "run", console=silent)
        assert not (tmp_path / "run").exists()

    refused(cloq_export.errors.DataError, "line 2")
    refused(UsageError, "the rank is 0, so there is no adapter to start the training from", rank=0)
    refused(UsageError, "is made together with the codes; give the trained one another name", name="cloq", data=whole)
    refused(UsageError, "a sequence has 65 tokens, but this model reads at most 64", seqlen=65, data=whole)
