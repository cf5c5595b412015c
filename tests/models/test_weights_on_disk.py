"""Blocks that are read from disk while they are used: the same numbers, and a clear line where that cannot be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from cloq_export.errors import NonFiniteError, SourceError
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.files.tensor_writer import write_safetensors
from cloq_export.models import block_loading
from cloq_export.models.placeholders import is_placeholder
from cloq_export.models.source import open_model
from cloq_export.models.weights_on_disk import in_memory, tensor_of, weights_on_disk

ModelFolder = Callable[..., Path]
PROJECTION = "model.layers.1.mlp.up_proj.weight"


def sharded(folder: Path, to: Path) -> Path:
    """Write a model again, in many small files."""
    shutil.copytree(folder, to)
    (to / "model.safetensors").unlink()
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(to, max_shard_size="40KB")
    assert len(list(to.glob("*.safetensors"))) > 3
    return to


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "gpt-neox", "opt", "plain-experts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_numbers_and_state_are_those_of_the_model_in_memory(
    family: str, dtype: torch.dtype, model_folder: ModelFolder
) -> None:
    whole = open_model(str(model_folder(family, dtype)))
    streamed = open_model(str(model_folder(family, dtype)), stream="always")
    model, ids = streamed.model, torch.arange(24).view(2, 12) % 10
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, whole.model(input_ids=ids).logits)
    assert any(is_placeholder(parameter) for parameter in model.parameters())
    held, state = whole.model.state_dict(), model.state_dict()
    assert list(state) == list(held)
    for name in state:
        tensor = tensor_of(model, name, state[name])
        assert torch.equal(tensor, held[name])
        # Products of a few rows depend on where a matrix lies.
        assert tensor.data_ptr() % 64 == held[name].data_ptr() % 64 or tensor.numel() < 64
    assert model.config.to_dict() == whole.model.config.to_dict()
    assert model.generation_config.to_dict() == whole.model.generation_config.to_dict()
    assert whole.reading == ()
    assert "read from disk block by block" in streamed.reading[0]


def test_names_that_the_files_have_and_the_model_has_not_are_renamed(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama"), folder)
    tensors, metadata = read_safetensors(folder / "model.safetensors")
    # Of a bare decoder, without its prefix.
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    write_safetensors(folder / "model.safetensors", renamed, metadata)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = open_model(str(folder)).model(input_ids=ids).logits
        assert torch.equal(open_model(str(folder), stream="always").model(input_ids=ids).logits, expected)


def test_only_a_block_in_use_is_in_memory(model_folder: ModelFolder, tmp_path: Path) -> None:
    model = open_model(str(sharded(model_folder("llama"), tmp_path / "model")), stream="always").model
    first, second = model.model.layers
    weight = first.mlp.up_proj.weight
    with in_memory(first):
        assert not is_placeholder(weight)
        assert is_placeholder(second.mlp.up_proj.weight)
        with in_memory(first):
            weight.data = torch.zeros_like(weight)
        assert not bool(weight.any())  # an inner use neither reads nor drops
    assert is_placeholder(weight)
    assert first.mlp.up_proj.weight is weight
    with in_memory(first):
        assert bool(weight.any())  # what was put there is gone


def test_a_factor_is_applied_at_every_reading(model_folder: ModelFolder) -> None:
    model = open_model(str(model_folder("llama")), stream="always").model
    weights = weights_on_disk(model)
    assert weights is not None
    stored = weights.read(PROJECTION)
    rows = torch.exp2(torch.arange(stored.shape[0], dtype=torch.float64) % 3)[:, None]
    weights.multiply(PROJECTION, rows)
    with in_memory(model.model.layers[1]):
        assert torch.equal(model.get_parameter(PROJECTION), stored * rows.float())
    weights.multiply(PROJECTION, 1.0 / rows)
    assert torch.equal(weights.read(PROJECTION), stored)


def test_files_that_go_or_change_meanwhile_are_named(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = sharded(model_folder("llama"), tmp_path / "model")
    model = open_model(str(folder), stream="always").model
    places = vars(weights_on_disk(model))["_places"]
    shard = places[PROJECTION].file.path
    aside = shard.rename(tmp_path / "aside")
    with pytest.raises(SourceError, match=r"layers.1.* of .* cannot be read .*No such file.*same command again"):
        model(input_ids=torch.arange(8)[None])
    aside.rename(shard)
    with torch.no_grad():
        assert bool(torch.isfinite(model(input_ids=torch.arange(8)[None]).logits).all())
    with open(shard, "ab") as file:
        file.write(b"more")
    with pytest.raises(SourceError, match="was changed since it was opened"):
        model(input_ids=torch.arange(8)[None])


def test_a_weight_that_is_no_number_is_named_when_it_is_read(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama"), folder)
    tensors, metadata = read_safetensors(folder / "model.safetensors")
    tensors[PROJECTION][0, 0] = torch.nan
    write_safetensors(folder / "model.safetensors", tensors, metadata)
    with pytest.raises(NonFiniteError, match=rf"the weight {PROJECTION} holds 1 NaN or Inf"):
        open_model(str(folder), stream="always")


@pytest.mark.parametrize("change", ["lacks", "shape"])
def test_what_is_refused_in_memory_is_refused_on_disk(change: str, model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama"), folder)
    tensors, metadata = read_safetensors(folder / "model.safetensors")
    if change == "lacks":
        del tensors[PROJECTION]
    else:
        tensors[PROJECTION] = tensors[PROJECTION][:-1].clone()
    write_safetensors(folder / "model.safetensors", tensors, metadata)
    said = []
    for stream in ("never", "always"):
        with pytest.raises(SourceError, match=PROJECTION) as caught:
            open_model(str(folder), stream=stream)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_memory_decides_unless_asked(model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(model_folder("llama"))
    assert weights_on_disk(open_model(folder, stream="auto").model) is None
    monkeypatch.setattr(block_loading, "free_bytes", lambda: 1000)
    assert weights_on_disk(open_model(folder, stream="auto").model) is not None
    assert weights_on_disk(open_model(folder, stream="never").model) is None
