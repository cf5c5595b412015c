"""Heads and embeddings that are tied or not, whatever a config says."""

from __future__ import annotations

import json

import torch

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.empty_model import float_part, tie_entries
from cloq_export.engines.transformers.loading import dequantized_model, load
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.files.tensor_writer import write_safetensors


def test_tied_embeddings_stay_tied(written):
    model = load(written.folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    held = read_safetensors(written.folder / "model.safetensors")[0]
    assert "model.embed_tokens.weight" in held
    assert "lm_head.weight" not in held


def test_untied_embeddings_stay_apart(tmp_path, write_quantized):
    written = write_quantized(tmp_path, "qwen2")
    model = load(written.folder)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def tie_in_config(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))


def test_an_older_checkpoint_whose_config_ties_two_matrices_is_read_by_its_content(
    tmp_path, write_quantized, assert_same_model, capfd
):
    written = write_quantized(tmp_path, "qwen2")
    tie_in_config(written.folder)
    for loader in (load, dequantized_model):
        model = loader(written.folder)
        assert_same_model(model, written.reference(adapted=False))
        assert model.config.tie_word_embeddings is False
        # PEFT and others tie again by the config.
        model.tie_weights()
        assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert "tie" not in capfd.readouterr().err
    checkpoint = Checkpoint.open(written.folder)
    assert tie_entries(checkpoint) == {"tie_word_embeddings": False}
    assert float_part(checkpoint).config == {"tie_word_embeddings": False}


def test_a_checkpoint_that_is_right_about_its_head_keeps_its_config(tmp_path, write_quantized, written):
    for folder in (written.folder, write_quantized(tmp_path, "qwen2").folder):
        assert tie_entries(Checkpoint.open(folder)) == {}


def test_a_tied_head_stored_twice_is_one(tmp_path, write_quantized):
    written = write_quantized(tmp_path, "llama")
    path = written.folder / "model.safetensors"
    tensors, metadata = read_safetensors(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_safetensors(path, tensors, metadata=metadata)
    model = load(written.folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tie_entries(Checkpoint.open(written.folder)) == {}
