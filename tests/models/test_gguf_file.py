"""GGUF headers and tensors that change what a model computes: used, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from cloq_export.errors import SourceError, UnsupportedModelError
from cloq_export.models.source import open_model

WIDTH, INNER, LAYERS, WORDS = 32, 64, 2, 96
KEYS: Mapping[str, Any] = {
    "block_count": LAYERS,
    "context_length": 64,
    "embedding_length": WIDTH,
    "feed_forward_length": INNER,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.dimension_count": 8,
    "rope.freq_base": 10000.0,
    "vocab_size": WORDS,
}
LINEARS = {
    "attn_norm": (WIDTH,),
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH // 2, WIDTH),
    "attn_v": (WIDTH // 2, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_norm": (WIDTH,),
    "ffn_gate": (INNER, WIDTH),
    "ffn_up": (INNER, WIDTH),
    "ffn_down": (WIDTH, INNER),
}


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    for kind, add in ((bool, writer.add_bool), (int, writer.add_uint32), (float, writer.add_float32)):
        if isinstance(value, kind):
            add(key, value)
            return
    writer.add_string(key, value)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes a tiny model with more keys and tensors than it needs."""

    def make(
        keys: Mapping[str, Any] | None = None,
        tensors: Mapping[str, np.ndarray] | None = None,
        architecture: str = "llama",
        **general: Any,
    ) -> str:
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        for key, value in {**KEYS, **(keys or {})}.items():
            add_key(writer, f"{architecture}.{key}", value)
        for key, value in general.items():
            add_key(writer, key.replace("__", "."), value)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["<unk>", "<s>", "</s>", *(chr(33 + number) for number in range(WORDS - 4)), "he"])
        writer.add_token_types([3, 3, 3] + [1] * (WORDS - 3))
        writer.add_token_merges(["h e"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        generator = np.random.default_rng(0)
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (WORDS, WIDTH), "output_norm.weight": (WIDTH,)}
        for layer in range(LAYERS):
            shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in LINEARS.items()}
        for name, shape in shapes.items():
            writer.add_tensor(name, generator.normal(scale=0.1, size=shape).astype(np.float32))
        for name, tensor in (tensors or {}).items():
            writer.add_tensor(name, np.asarray(tensor, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return str(path)

    return make


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.scaling.type", "linear"),
        ("rope.scaling.type", "yarn"),
        ("rope.scaling.factor", 4.0),
        ("rope.scaling.attn_factor", 1.5),
        ("attention.sliding_window", 16),
        ("attention.scale", 0.5),
        ("attention.key_length", 16),
        ("attention.value_length", 16),
        ("attention.causal", False),
        ("attention.clamp_kqv", 8.0),
        ("attention.max_alibi_bias", 8.0),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("logit_scale", 2.0),
        ("embedding_scale", 12.0),
        ("residual_scale", 0.25),
        ("expert_count", 8),
        ("expert_used_count", 2),
        ("use_parallel_residual", True),
        ("nextn_predict_layers", 1),
        ("a.key.of.tomorrow", 1),
    ],
)
def test_a_key_that_changes_the_function_is_refused_by_name(write: Callable[..., str], key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"says llama\.{key} = {value}.*would compute something") as error:
        open_model(write({key: value}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.scaling.type", "none"),
        ("rope.scaling.factor", 0.0),
        ("rope.scaling.factor", 1.0),
        ("rope.scaling.original_context_length", 32),
        ("rope.scaling.finetuned", True),
        ("attention.sliding_window", 64),
        ("attention.scale", 8**-0.5),
        ("attention.key_length", 8),
        ("logit_scale", 0.0),
        ("expert_count", 0),
        ("rope.freq_base", 5e5),
        ("attention.layer_norm_rms_epsilon", 1e-3),
    ],
)
def test_a_key_that_says_what_the_model_does_is_no_matter(write: Callable[..., str], key: str, value: Any) -> None:
    assert open_model(write({key: value})).notes == ()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("rope_freqs.weight", np.array([1, 1, 4, 8])),
        ("rope_factors_long.weight", np.array([1, 1, 4, 8])),
        ("rope_factors_short.weight", np.array([1, 1, 1, 2])),
        ("blk.0.attn_q_norm.weight", np.ones(8)),
        ("blk.1.attn_output.bias", np.ones(WIDTH)),
        ("output.bias", np.ones(WORDS)),
        ("blk.0.attn_k.scale", np.ones(1)),
    ],
)
def test_a_tensor_without_a_place_is_refused_by_name(write: Callable[..., str], name: str, tensor: np.ndarray) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"holds 1 .*\({name}\)"):
        open_model(write(tensors={name: tensor}))


def test_tensors_that_change_nothing_are_left_out(write: Callable[..., str]) -> None:
    loaded = open_model(write(tensors={"rope_freqs.weight": np.ones(4), "blk.0.attn_q.bias": np.zeros(WIDTH)}))
    (note,) = loaded.notes
    assert "1 biases" in note
    assert "blk.0.attn_q.bias" in note


def test_a_head_of_its_own_is_read(write: Callable[..., str]) -> None:
    loaded = open_model(write(tensors={"output.weight": np.ones((WORDS, WIDTH))}))
    assert loaded.config.tie_word_embeddings is False
    assert bool((loaded.model.lm_head.weight == 1).all())


def test_widths_of_heads_that_do_not_fit_are_refused(write: Callable[..., str]) -> None:
    with pytest.raises(SourceError, match=r"q_proj with shape \(32, 32\), and its header gives it \(16, 32\)"):
        open_model(write({"rope.dimension_count": 4}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general__type", "adapter", "of the type adapter, not a model"),
        ("adapter__type", "lora", "not a model"),
        ("split__count", 3, "is one of 3 parts of a model"),
    ],
)
def test_files_that_are_no_whole_model_are_refused(
    write: Callable[..., str], key: str, value: Any, message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        open_model(write(**{key: value}))


@pytest.mark.parametrize(("side", "ids"), [("bos", [1, 95]), ("eos", [95, 2])])
def test_begin_and_end_tokens_are_put_as_the_header_says(write: Callable[..., str], side: str, ids: list[int]) -> None:
    assert open_model(write(**{f"tokenizer__ggml__add_{side}_token": True})).tokenizer("he")["input_ids"] == ids
    assert open_model(write(**{f"tokenizer__ggml__add_{side}_token": False})).tokenizer("he")["input_ids"] == [95]


def test_a_way_to_cut_text_is_known_said_or_refused(write: Callable[..., str]) -> None:
    assert open_model(write(tokenizer__ggml__pre="llama-bpe")).notes == ()
    (note,) = open_model(write(tokenizer__ggml__pre="smollm")).notes
    assert "tokenizer.ggml.pre = smollm" in note
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.ggml\.pre = falcon, a way to cut text"):
        open_model(write(tokenizer__ggml__pre="falcon"))


def test_named_chat_templates_are_said(write: Callable[..., str]) -> None:
    (note,) = open_model(write(tokenizer__chat_template__tool_use="x")).notes
    assert note.endswith("beside the default one are not read: tokenizer.chat_template.tool_use")
