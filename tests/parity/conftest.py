"""Tiny random transformers models for the parity tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """Return a function from a family to a random model of it, made once."""
    made: dict[str, Any] = {}
    small = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    configs: dict[str, Any] = {
        "llama": lambda: transformers.LlamaConfig(**small, intermediate_size=48, num_key_value_heads=2),
        "gemma2": lambda: transformers.Gemma2Config(
            **small, intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=5
        ),
        "opt": lambda: transformers.OPTConfig(**small, ffn_dim=48, word_embed_proj_dim=32),
    }

    def model_of(family: str) -> Any:
        if family not in made:
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(configs[family]())
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.normal_(std=0.4)
            made[family] = model.eval()
        return made[family]

    return model_of
