"""Faults of what is not quantized: weights, config, tokenizer, template and generation settings of an export."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from changed_exports import Fault, certify_again, edit_json
from parity_reports import missed
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiers import slow_but

from cloq_export.parity.report import missed_gates
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verify import verify


def _edit_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Fault:
    def plant(export: Path) -> None:
        path = export / "model.safetensors"
        tensors = load_file(path)
        assert name in tensors
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, path, {"format": "pt"})

    return plant


def _edit_config(**values: Any) -> Fault:
    return lambda export: edit_json(export / "config.json", lambda content: content.update(values))


def _edit_rope(export: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["rope_parameters"] = {**(content.get("rope_parameters") or {}), "rope_theta": 5000.0}

    edit_json(export / "config.json", change)


def _reorder_vocabulary(export: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]

    edit_json(export / "tokenizer.json", change)


def _lose_spaces(export: Path) -> None:
    edit_json(export / "tokenizer.json", lambda content: content.update(pre_tokenizer={"type": "WhitespaceSplit"}))


def _other_end(export: Path) -> None:
    edit_json(export / "tokenizer_config.json", lambda content: content.update(eos_token="w3"))


def _add_decoder(export: Path) -> None:
    edit_json(export / "tokenizer.json", lambda content: content.update(decoder={"type": "Fuse"}))


def _add_template(export: Path) -> None:
    (export / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def _edit_generation(export: Path) -> None:
    path = export / "generation_config.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, "temperature": 0.2, "do_sample": True}))


FLOAT_PART: dict[str, tuple[Fault, str]] = {
    "a norm scaled by 1.01": (
        _edit_tensor("model.layers.0.input_layernorm.weight", lambda w: 1.01 * w),
        "model.layers.0.input_layernorm.weight differs",
    ),
    "the final norm": (_edit_tensor("model.norm.weight", lambda w: w + 0.01), "model.norm.weight differs"),
    "one row of the embeddings": (
        _edit_tensor("model.embed_tokens.weight", lambda w: w.roll(1, 0)),
        "model.embed_tokens.weight differs",
    ),
    "a head rounded to half precision": (
        _edit_tensor("lm_head.weight", lambda w: w.bfloat16()),
        "lm_head.weight differs",
    ),
    "a norm stored in integers": (
        _edit_tensor("model.norm.weight", lambda w: w.to(torch.int8)),
        "model.norm.weight is stored as int8",
    ),
    "a head of another revision": (_edit_tensor("lm_head.weight", lambda w: -w), "lm_head.weight differs"),
    "epsilon of the norms": (_edit_config(rms_norm_eps=1e-3), "rms_norm_eps is 0.001"),
    "base of the rotary positions": (_edit_rope, "rope_theta"),
    "the activation": (_edit_config(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "the context length": (_edit_config(max_position_embeddings=32), "max_position_embeddings is 32"),
    "the end token of the config": (_edit_config(eos_token_id=5), "eos_token_id is 5"),
    "two words of the vocabulary exchanged": (_reorder_vocabulary, "vocabulary is not the float model's"),
    "the pre-tokenizer": (_lose_spaces, "probe text 1 becomes other token ids"),
    "the end token of the tokenizer": (_other_end, "eos_token is another token"),
    "the model's class": (_edit_config(architectures=["LlamaForCausalLM"]), "architectures is ['LlamaForCausalLM']"),
    "a tied head over two matrices": (
        _edit_config(tie_word_embeddings=True),
        "the files hold two matrices that differ",
    ),
    "the decoder of the tokenizer": (_add_decoder, "its decoder is not the float model's"),
    "a chat template": (_add_template, "chat template: default is not the float model's"),
    "generation settings": (_edit_generation, "temperature is 0.2"),
}


@pytest.mark.parametrize(
    "fault",
    slow_but(
        FLOAT_PART,
        *(
            "a norm scaled by 1.01",
            "a head of another revision",
            "a norm stored in integers",
            "base of the rotary positions",
            "the context length",
        ),
        *("two words of the vocabulary exchanged", "a tied head over two matrices", "a chat template"),
    ),
)
def test_what_is_not_quantized_must_equal_the_float_model(
    fault: str, copy: Path, options: VerifyOptions, silent: Console
) -> None:
    plant, named = FLOAT_PART[fault]
    plant(copy)
    certify_again(copy)
    report = verify(copy, dataclasses.replace(options, adapters=("one",)), console=silent)
    assert "certificate" not in missed(report)
    assert "float_part" in missed(report)
    assert named in str(missed_gates(report))
