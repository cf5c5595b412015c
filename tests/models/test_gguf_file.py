"""GGUF headers and tensors that change what a model computes: used, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from cloq_export.errors import SourceError, UnsupportedModelError
from cloq_export.models.saving import save_plain
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
            # Norms near one, so that attention is not the same everywhere.
            mean, spread = (1.0, 0.1) if name.endswith("norm.weight") else (0.0, 0.3)
            writer.add_tensor(name, generator.normal(mean, spread, shape).astype(np.float32))
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
        ("rope.scaling.type", "longrope"),
        ("rope.scaling.type", "yarn"),
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
        ("rope_freqs.weight", np.array([1, 1, 4])),
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
    assert note.endswith("besides the default one are not read: tokenizer.chat_template.tool_use")


# Rope scaling: two heads of 16 dimensions, so that several wavelengths lie between the limits of a rule.
HEADS: Mapping[str, Any] = {"attention.head_count": 2, "attention.head_count_kv": 1, "rope.dimension_count": 16}


def scaled(plain: Any, rope: Mapping[str, Any]) -> Any:
    """Return the model of a file without scaling with the scaling that is meant."""
    config = copy.deepcopy(plain.config)
    config.rope_parameters = {**config.rope_parameters, **rope}
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(plain.model.state_dict())
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, WORDS, (2, 64), generator=torch.Generator().manual_seed(3))
    # Far apart, so that slow rotations show; without a mask, transformers would take each for a text of its own.
    positions = 50 * torch.arange(64)[None]
    with torch.no_grad():
        return model(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False).logits


def llama3(factor: float, low: float, high: float, original: int) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


@pytest.mark.parametrize(
    ("meant", "theta"),
    [
        (llama3(8.0, 1.0, 4.0, 8192), 5e5),  # Llama 3.1
        (llama3(32.0, 1.0, 4.0, 8192), 5e5),  # Llama 3.2
        (llama3(16.0, 1.0, 4.0, 8192), 1e4),  # no wavelength shows the whole factor
        (llama3(8.0, 1.0, 16.0, 512), 1e4),
        (llama3(3.0, 2.0, 40.0, 600), 1e4),
        (llama3(2.5, 1.0, 4.0, 64), 1e2),
    ],
)
def test_factors_of_a_llama_3_become_its_rope(
    write: Callable[..., str], tmp_path: Path, meant: dict[str, Any], theta: float
) -> None:
    keys = {**HEADS, "rope.freq_base": theta, "context_length": 131072}
    plain = open_model(write(keys))
    original = scaled(plain, meant)
    frequencies = plain.model.model.rotary_emb.inv_freq / original.model.rotary_emb.inv_freq
    loaded = open_model(write(keys, {"rope_freqs.weight": frequencies.numpy()}))
    assert loaded.notes == ()
    rope = loaded.config.rope_parameters
    assert rope["rope_type"] == "llama3"
    # Only the ratios of the three limits count.
    for name in ("high_freq_factor", "original_max_position_embeddings"):
        assert rope[name] / rope["low_freq_factor"] == pytest.approx(meant[name] / meant["low_freq_factor"], rel=1e-3)
    assert torch.allclose(logits(loaded.model), logits(original), atol=1e-5)
    # The scaling matters: without it logits differ by a thousand times that tolerance.
    assert not torch.allclose(logits(loaded.model), logits(plain.model), atol=1e-2)
    save_plain(loaded, tmp_path)
    assert torch.allclose(logits(open_model(str(tmp_path)).model), logits(original), atol=1e-5)


def test_factors_of_another_rule_are_listed(write: Callable[..., str]) -> None:
    factors = np.array([1, 1, 2, 2, 5, 5, 5, 6], dtype=np.float32)
    plain = open_model(write(HEADS))
    loaded = open_model(write(HEADS, {"rope_freqs.weight": factors}))
    assert loaded.config.rope_parameters["rope_type"] == "longrope"
    plain.model.model.rotary_emb.inv_freq /= torch.from_numpy(factors)
    assert torch.allclose(logits(loaded.model), logits(plain.model), atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "meant"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 16,
                "rope.scaling.yarn_beta_fast": 16.0,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16.0},
        ),
    ],
)
def test_a_scaling_of_the_header_is_used(
    write: Callable[..., str], keys: Mapping[str, Any], meant: Mapping[str, Any]
) -> None:
    original = scaled(open_model(write(HEADS)), meant)
    loaded = open_model(write({**HEADS, **keys}))
    assert loaded.notes == ()
    assert torch.allclose(logits(loaded.model), logits(original), atol=1e-6)


def test_two_scalings_at_once_are_refused(write: Callable[..., str]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"says llama\.rope\.scaling\.factor = 4\.0, and the model"):
        open_model(write({"rope.scaling.factor": 4.0}, {"rope_freqs.weight": np.array([1, 1, 4, 8])}))
