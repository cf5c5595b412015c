"""Tiny random models with a tokenizer, saved as the folders that users have, and texts in their vocabulary."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from rich.console import Console
from torch import nn

from cloq_export.recipe import Recipe

WORDS = [f"w{number}" for number in range(93)]
VOCABULARY = ["<unk>", "<s>", "</s>", *WORDS]

_COMMON = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GATED = {**_COMMON, "intermediate_size": 96, "num_key_value_heads": 2}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_GATED, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {**_GATED, "tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", {**_GATED, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {**_GATED, "head_dim": 16, "sliding_window": 5}),
    "phi3": ("Phi3Config", _GATED),
    "gpt-neox": ("GPTNeoXConfig", {**_COMMON, "intermediate_size": 128}),
    "opt": ("OPTConfig", {**_COMMON, "ffn_dim": 96, "word_embed_proj_dim": 32}),
}
# A vision-language wrapper around a text model.
_CONFIGS["gemma3"] = (
    "Gemma3Config",
    {
        "text_config": {**_GATED, "head_dim": 16, "sliding_window": 5},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
        "boi_token_index": 93,
        "eoi_token_index": 94,
        "image_token_index": 95,
    },
)
EXPERTS = 4


class PlainExpertsConfig(transformers.LlamaConfig):
    model_type = "plain-experts"


class _Expert(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class _Experts(nn.Module):
    """One of four plain experts for each token; the last one is never chosen."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, EXPERTS, bias=False)
        self.experts = nn.ModuleList([_Expert(width, inner) for _ in range(EXPERTS)])

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        flat = states.reshape(-1, states.shape[-1])
        share, chosen = self.gate(flat).softmax(-1).max(-1)
        result = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                result[rows] += share[rows, None] * expert(flat[rows])
        return result.view_as(states)


class PlainExpertsForCausalLM(transformers.LlamaForCausalLM):
    config_class = PlainExpertsConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = _Experts(config.hidden_size, 32)


transformers.AutoConfig.register(PlainExpertsConfig.model_type, PlainExpertsConfig, exist_ok=True)
transformers.AutoModelForCausalLM.register(PlainExpertsConfig, PlainExpertsForCausalLM, exist_ok=True)


def _build_model(family: str) -> Any:
    torch.manual_seed(0)
    if family == "plain-experts":
        model: Any = PlainExpertsForCausalLM(PlainExpertsConfig(**_GATED))
    else:
        name, options = _CONFIGS[family]
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith("bias"):
                parameter.normal_(std=0.15)
        for module in model.modules():
            if isinstance(module, _Experts):
                # Of two opposite scores one is above zero, the score of the last expert.
                module.gate.weight[1] = -module.gate.weight[0]
                module.gate.weight[EXPERTS - 1] = 0.0
    return model.eval()


def _write_tokenizer(family: str, folder: Path) -> None:
    if family == "qwen2":  # whatever tokenizer.json says, transformers makes a byte pair tokenizer for this family
        letters = ["<unk>", "<s>", "</s>", "w", *"0123456789", "Ġ", "Ċ"]
        vocabulary = {letter: number for number, letter in enumerate(letters)}
        transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token="<unk>").save_pretrained(folder)
        return
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    wrapped.save_pretrained(folder)


def _random_text(words: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    # Frequent words and rare ones, so that inputs are correlated.
    drawn = (len(WORDS) * torch.rand(words, generator=generator).pow(2)).long()
    return " ".join(WORDS[int(number)] for number in drawn) + "\n"


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the paths of a calibration text and an evaluation text, as recipe options."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "calibration.txt").write_text(_random_text(600, seed=1))
    (folder / "evaluation.txt").write_text(_random_text(200, seed=2))
    return {"calibration": str(folder / "calibration.txt"), "eval_text": str(folder / "evaluation.txt")}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function from a family's name to a folder with a random model of it, made once."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def folder_of(family: str, dtype: torch.dtype = torch.float32) -> Path:
        if (family, dtype) not in made:
            folder = tmp_path_factory.mktemp(family)
            _build_model(family).to(dtype).save_pretrained(folder)
            _write_tokenizer(family, folder)
            made[family, dtype] = folder
        return made[family, dtype]

    return folder_of


@pytest.fixture(scope="session")
def recipe_for(model_folder: Callable[..., Path], texts: dict[str, str]) -> Callable[..., Recipe]:
    """Return a function from a family's name and options to a small recipe, independent layers unless asked."""

    def recipe(family: str = "llama", **options: Any) -> Recipe:
        small: dict[str, Any] = {
            "model": str(model_folder(family)),
            "group_size": 32,
            "rank": 4,
            "samples": 4,
            "seqlen": 32,
            "precision": "float32",
            "error_aware": 0.0,
            "token_weighting": "none",
            "eval_window": 16,
            "eval_windows": 4,
        }
        return Recipe.from_mapping({**small, **texts, **options})

    return recipe


@pytest.fixture(scope="session")
def silent() -> Console:
    """Return a console that nobody sees."""
    return Console(file=io.StringIO())


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, str]]:
    """Return a function from a folder to the hash of every file in it, hidden ones too."""

    def read(folder: Path) -> dict[str, str]:
        return {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    return read
