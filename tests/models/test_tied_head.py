"""Head and embeddings: what the weights are, what the config says, and what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, GPT2Config, LlamaConfig

from cloq_export.errors import SourceError
from cloq_export.models.saving import save_plain
from cloq_export.models.source import open_model
from cloq_export.models.tied_head import correct_config, corrected_entries, is_tied

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def folder(write_model: Callable[[str], Path]) -> Path:
    return write_model("llama")


def say(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_config_that_ties_two_matrices_is_refused_by_name(folder: Path) -> None:
    say(folder, tie_word_embeddings=True)
    with pytest.raises(SourceError, match=rf"ties {HEAD} to {EMBEDDINGS} .*two that differ.*set tie_word_emb") as error:
        open_model(str(folder))
    assert "\n" not in str(error.value)


def test_the_weights_win_where_that_is_asked_for_and_the_folder_written_says_so(folder: Path, tmp_path: Path) -> None:
    say(folder, tie_word_embeddings=True)
    loaded = open_model(str(folder), untie=True)
    assert loaded.config.tie_word_embeddings is False
    loaded.model.tie_weights()
    assert not is_tied(loaded.model)
    save_plain(loaded, tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["tie_word_embeddings"] is False
    again = open_model(str(tmp_path / "plain")).model
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(again.lm_head.weight, stored[HEAD])
    assert torch.equal(again.model.embed_tokens.weight, stored[EMBEDDINGS])


def test_a_head_that_equals_the_embeddings_stays_tied_and_no_byte_changes(folder: Path, tmp_path: Path) -> None:
    say(folder, tie_word_embeddings=True)
    change(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDINGS].clone()}))
    loaded = open_model(str(folder))
    assert is_tied(loaded.model)
    save_plain(loaded, tmp_path / "plain")
    assert (tmp_path / "plain" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize("lost", [HEAD, EMBEDDINGS])
def test_one_matrix_under_an_untied_config_is_refused_with_both_remedies(folder: Path, lost: str) -> None:
    change(folder, lambda tensors: tensors.pop(lost))
    with pytest.raises(SourceError, match=rf"lacks {lost}, and its config.json says .* does not tie .*to true"):
        open_model(str(folder))


def test_one_matrix_under_a_tied_config_is_both(folder: Path) -> None:
    say(folder, tie_word_embeddings=True)
    change(folder, lambda tensors: tensors.pop(EMBEDDINGS))
    assert is_tied(open_model(str(folder)).model)


def test_a_class_that_ties_by_default_says_so_where_the_file_is_silent() -> None:
    config = GPT2Config()
    assert correct_config(config, tied=False)
    assert corrected_entries({"model_type": "gpt2"}, config) == {"tie_word_embeddings": False}
    assert corrected_entries({"tie_word_embeddings": False}, config) == {}


def test_every_place_of_a_wrapper_is_corrected_and_no_place_invented() -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 32}
    raw = {"model_type": "gemma3", "tie_word_embeddings": False, "text_config": text}
    config = Gemma3Config.from_dict(raw)
    # The text model's own class ties by default, and engines go by its word.
    assert correct_config(config, tied=False)
    assert not config.text_config.tie_word_embeddings
    entries = corrected_entries(raw, config)
    assert entries == {"tie_word_embeddings": False, "text_config": {**text, "tie_word_embeddings": False}}
    flat = {"model_type": "gemma3", "tie_word_embeddings": True}
    assert "text_config" not in corrected_entries(flat, config)


def test_a_config_that_is_right_is_left_alone() -> None:
    config = LlamaConfig(tie_word_embeddings=True)
    assert not correct_config(config, tied=True)
    assert not correct_config(config, tied=None)
    assert corrected_entries({"tie_word_embeddings": True}, config) == {}
