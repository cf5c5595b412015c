"""A model in memory is the one in its files, also where its class begins a part of it anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from gate_subjects import write_word_tokenizer
from safetensors.torch import load_file, save_file

from cloq_export.models.source import open_model


@pytest.mark.parametrize("row", ["of its own", "zero"])
def test_the_row_of_the_padding_token_is_that_of_the_file(row: str, tmp_path: Path) -> None:
    config = transformers.YoutuConfig(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        max_position_embeddings=32,
        pad_token_id=3,
    )
    transformers.YoutuForCausalLM(config).save_pretrained(tmp_path)
    write_word_tokenizer(tmp_path, ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(21))])
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.embed_tokens.weight"
    tensors[name][3] = 0.5 if row == "of its own" else 0.0
    save_file(tensors, path, metadata={"format": "pt"})
    stock = transformers.YoutuForCausalLM.from_pretrained(tmp_path)
    assert not bool(stock.get_input_embeddings().weight[3].any()), "transformers reads the row now: this can go"
    model = open_model(str(tmp_path)).model
    assert torch.equal(model.get_input_embeddings().weight, tensors[name])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
