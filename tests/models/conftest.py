"""Tiny random models of every family that is promised to work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

VOCABULARY = 96

_GATED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_PLAIN = {key: value for key, value in _GATED.items() if key not in ("num_key_value_heads",)}
_OPT = {
    **{key: value for key, value in _PLAIN.items() if key != "intermediate_size"},
    "ffn_dim": 96,
    "word_embed_proj_dim": 32,
}
_SLIDING = {"sliding_window": 5, "head_dim": 16}

# A window of 5 tokens is shorter than the texts of the tests, so a mask that is not the block's own shows.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GATED),
    "llama-tied": ("LlamaConfig", {**_GATED, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**_GATED, "sliding_window": 5}),
    "qwen2": ("Qwen2Config", {**_GATED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {**_GATED, **_SLIDING, "use_sliding_window": True, "max_window_layers": 1}),
    "gemma": ("GemmaConfig", {**_GATED, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {**_GATED, **_SLIDING}),
    "gemma3": ("Gemma3TextConfig", {**_GATED, **_SLIDING, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "phi": ("PhiConfig", _GATED),
    "phi3": ("Phi3Config", _GATED),
    "gpt-neox": ("GPTNeoXConfig", _PLAIN),
    "opt": ("OPTConfig", _OPT),
    "falcon": ("FalconConfig", {**_PLAIN, "alibi": True}),
    "bloom": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 3, "n_head": 4}),
    "gpt2": ("GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "eos_token_id": 2}),
    "mixtral": ("MixtralConfig", {**_GATED, "num_local_experts": 4}),
}
_CONFIGS["gemma3"][1]["num_hidden_layers"] = 4


class PlainExpert(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class PlainMixture(nn.Module):
    """A mixture of experts made of plain linears, as most models outside transformers keep them."""

    def __init__(self, width: int = 64, inner: int = 32, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList([PlainExpert(width, inner) for _ in range(experts)])
        self.shared_expert = PlainExpert(width, inner)
        self.shared_expert_gate = nn.Linear(width, 1, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        flat = states.reshape(-1, states.shape[-1])
        share, chosen = self.gate(flat).softmax(-1).topk(1, dim=-1)
        result = self.shared_expert(flat) * self.shared_expert_gate(flat).sigmoid()
        for number, expert in enumerate(self.experts):
            rows = (chosen[:, 0] == number).nonzero()[:, 0]
            if len(rows):
                result[rows] += share[rows] * expert(flat[rows])
        return result.view_as(states)


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()


@pytest.fixture(scope="session")
def build_model() -> Callable[[str], Any]:
    """Return a function from a family's name to a random model of it, weights large enough to matter."""

    def build(name: str) -> Any:
        plain_mixture = name == "plain-moe"
        config_name, options = _CONFIGS["llama" if plain_mixture else name]
        torch.manual_seed(0)
        config = getattr(transformers, config_name)(**options)
        model = transformers.AutoModelForCausalLM.from_config(config)
        if plain_mixture:
            for layer in model.model.layers:
                layer.mlp = PlainMixture()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.15)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def write_tokenizer() -> Callable[[Path], None]:
    """Return a function that writes a tokenizer of whole words into a folder."""

    def write(folder: Path) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers

        words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, VOCABULARY)}}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        ).save_pretrained(folder)

    return write


@pytest.fixture
def write_model(
    tmp_path: Path, build_model: Callable[[str], Any], write_tokenizer: Callable[[Path], None]
) -> Callable[[str], Path]:
    """Return a function that writes a family's random model with a tokenizer and gives the folder."""

    def write(name: str) -> Path:
        folder = tmp_path / "model"
        build_model(name).save_pretrained(folder)
        write_tokenizer(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def token_windows() -> torch.Tensor:
    """Return five windows of 16 tokens, so that batches of two leave one over."""
    return torch.randint(3, VOCABULARY, (5, 16), generator=torch.Generator().manual_seed(1))
