"""genai_config.json beside the float model: what the builder writes is proven, each value that differs is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from cloq_export.models.source import LoadedModel, open_model
from cloq_export.parity.genai_settings import GENAI_CONFIG, compare_genai_settings


@pytest.fixture(scope="module")
def loaded(model_folder: Callable[..., Path]) -> LoadedModel:
    return open_model(str(model_folder("llama")))


def built() -> dict[str, Any]:
    """Return what ONNX Runtime GenAI's builder writes of the tiny model."""
    return {
        "model": {
            "bos_token_id": 1,
            "context_length": 64,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": 16,
                "hidden_size": 64,
                "inputs": {"input_ids": "input_ids", "past_key_names": "past_key_values.%d.key"},
                "outputs": {"logits": "logits", "present_key_names": "present.%d.key"},
                "num_attention_heads": 4,
                "num_hidden_layers": 2,
                "num_key_value_heads": 2,
            },
            "eos_token_id": 2,
            "pad_token_id": 0,
            "type": "llama",
            "vocab_size": 96,
        },
        "search": {
            "do_sample": False,
            "max_length": 64,
            "num_beams": 1,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        },
    }


def compared(folder: Path, content: Mapping[str, Any], loaded: LoadedModel) -> tuple[str, str]:
    (folder / GENAI_CONFIG).write_text(json.dumps(content))
    finding = compare_genai_settings(folder, loaded)
    return finding.verdict, finding.reason


def test_what_the_builder_writes_is_proven(tmp_path: Path, loaded: LoadedModel) -> None:
    assert compared(tmp_path, built(), loaded) == ("proven", "")


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("model", "context_length"), 32, "context_length is 32, the float model's 64"),
        (("model", "eos_token_id"), 5, r"eos_token_id is [5], the float model's [2]"),
        (("model", "eos_token_id"), [2, 5], r"eos_token_id is [2, 5], the float model's [2]"),
        (("model", "bos_token_id"), 4, "bos_token_id is 4, the float model's 1"),
        (("model", "pad_token_id"), 9, "pad_token_id is 9, the float model's 0"),
        (("model", "vocab_size"), 95, "vocab_size is 95, the float model's 96"),
        (("model", "decoder", "num_key_value_heads"), 4, "num_key_value_heads is 4, the float model's 2"),
        (("model", "decoder", "num_attention_heads"), 8, "num_attention_heads is 8"),
        (("model", "decoder", "head_size"), 8, "head_size is 8"),
        (("model", "decoder", "filename"), "other.onnx", "filename is 'other.onnx', the float model's 'model.onnx'"),
        (("model", "decoder", "outputs", "logits"), "hidden", "outputs.logits is 'hidden'"),
        (("model", "decoder", "sliding_window"), {"window_size": 4}, "sliding_window is 4, the float model's None"),
        (("search", "do_sample"), True, "do_sample is True, the float model's False"),
        (("search", "temperature"), 0.2, "temperature is 0.2"),
        (("search", "top_k"), 1, "top_k is 1"),
        (("search", "repetition_penalty"), 1.3, "repetition_penalty is 1.3"),
        (("search", "max_length"), 16, "max_length is 16"),
    ],
)
def test_a_value_that_differs_is_named(
    tmp_path: Path, loaded: LoadedModel, place: tuple[str, ...], value: Any, named: str
) -> None:
    content: Any = built()
    part = content
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    verdict, reason = compared(tmp_path, content, loaded)
    assert verdict == "contradicted"
    assert named in reason


def test_a_file_without_its_parts_is_named(tmp_path: Path, loaded: LoadedModel) -> None:
    assert compared(tmp_path, {"model": {}}, loaded)[1] == "genai_config.json lacks its parts model, decoder and search"
    (tmp_path / GENAI_CONFIG).unlink()
    assert "genai_config.json" in compare_genai_settings(tmp_path, loaded).reason
