"""Weight files that do not fit their class are refused before a number is read, streamed or not, with what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_mixtures import build_mixture

from cloq_export.errors import SourceError
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.files.tensor_writer import write_safetensors
from cloq_export.models.source import open_model
from cloq_export.models.weight_names import loaded_names

Tensors = dict[str, torch.Tensor]
W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
FUSED = "model.layers.1.mlp.experts.gate_up_proj"


def refusal(folder: Path) -> str:
    """Return what is said of a folder, which is the same however it is read."""
    messages = set()
    for stream in ("always", "never"):
        with pytest.raises(SourceError) as error:
            open_model(str(folder), stream=stream)  # type: ignore[arg-type]
        messages.add(str(error.value))
    (message,) = messages
    assert "\n" not in message
    return message


def change_config(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def replacing(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: change(tensors[name]).contiguous()}


@pytest.mark.parametrize(
    ("family", "edit", "told"),
    [
        ("mixtral", replacing(W1, lambda tensor: tensor[:-1]), f"{W1} has shape (31, 64), and "),
        ("mixtral", replacing(W1, lambda tensor: tensor.T), f"disagree: {W1} has shape (64, 32), and "),
        ("mixtral", without(W1), "holds 3 tensors such as model.layers.1.block_sparse_moe.experts.0.w1.weight"),
        (
            "mixtral",
            without(*(W1.replace("w1", part) for part in ("w1", "w2", "w3"))),
            "its config.json describes 4 experts; some are missing or too many",
        ),
        ("mixtral", lambda tensors: {**tensors, W1.replace(".2.", ".4."): tensors[W1]}, "holds 5 tensors such as "),
        ("gpt-oss", replacing(FUSED, lambda tensor: tensor[:3]), f"{FUSED} among them ((3, 64, 64), and not (4, 64, 6"),
        ("gpt-oss", without(FUSED), f"lacks 1 weights of GptOssForCausalLM, {FUSED} among them"),
    ],
    ids=["a row less", "transposed", "one matrix less", "an expert less", "one more", "fused, one less", "fused, none"],
)
def test_experts_that_are_not_alike(
    family: str,
    edit: Callable[[Tensors], Tensors],
    told: str,
    tmp_path: Path,
    write_tokenizer: Callable[[Path], None],
) -> None:
    build_mixture(family).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    tensors, metadata = read_safetensors(tmp_path / "model.safetensors")
    write_safetensors(tmp_path / "model.safetensors", edit(tensors), metadata)
    assert told in refusal(tmp_path)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"num_local_experts": 5}, "holds 4 tensors such as model.layers.0.block_sparse_moe.experts.0.w"),
        ({"intermediate_size": 48}, "has shape (32, 64), of which no (96, 64) can be made"),
        ({"num_hidden_layers": 3}, "lacks 9 weights of MixtralForCausalLM, model.layers.2.input_layernorm.weight"),
    ],
    ids=["experts", "width", "layers"],
)
def test_experts_of_another_config(
    entry: dict[str, int], told: str, tmp_path: Path, write_tokenizer: Callable[[Path], None]
) -> None:
    build_mixture("mixtral").save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    change_config(tmp_path, **entry)
    assert told in refusal(tmp_path)


def test_a_tensor_that_fills_several_places_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inkling's files hold gate and up of shared experts in one tensor, which its class has as two."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "families"))
    import configurations

    with torch.device("meta"):
        model = transformers.InklingForConditionalGeneration(configurations.tiny_config("inkling_mm_model"))
    stored = "model.llm.layers.1.mlp.shared_experts.shared_w13_weight"
    (entry,) = loaded_names(model, [stored], model.state_dict())
    mixture = "model.language_model.layers.1.mlp.shared_experts"
    assert entry.made == (f"{mixture}.gate_proj", f"{mixture}.up_proj")


def test_a_far_larger_model_is_refused_before_it_is_made(write_model: Callable[[str], Path]) -> None:
    """Its numbers may not fit into memory at all."""
    folder = write_model("llama")
    change_config(folder, num_hidden_layers=90)
    message = refusal(folder)
    assert "lacks 783 weights of LlamaForCausalLM, model.layers.10.input_layernorm.weight among them: its" in message
    assert "numbers, and the model that its config.json describes has " in message


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"hidden_act": "sorcery"}, "can make no model of the config.json of "),
        ({"num_hidden_layers": "2"}, "Validation error for field 'num_hidden_layers': "),
        ({"rope_parameters": {"rope_type": "sorcery"}}, "(KeyError: 'sorcery'). Compare it with the original"),
    ],
)
def test_a_config_that_describes_no_model(entry: dict[str, Any], told: str, write_model: Callable[[str], Path]) -> None:
    folder = write_model("llama")
    change_config(folder, **entry)
    assert told in refusal(folder)


def test_settings_of_generation_that_are_no_settings(write_model: Callable[[str], Path]) -> None:
    folder = write_model("llama")
    (folder / "generation_config.json").write_text("[]")
    assert "generation_config.json" in refusal(folder)


def test_integers_in_the_place_of_floats_under_another_name(
    tmp_path: Path, write_tokenizer: Callable[[Path], None]
) -> None:
    """A bias of a tower, which the wrapper's class calls something else in memory than the files do."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.Gemma3Config(
        text_config={**text, **heads},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=95,
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    tensors, metadata = read_safetensors(tmp_path / "model.safetensors")
    bias = next(name for name in tensors if "vision" in name and name.endswith("bias"))
    assert f"model.{bias}" not in tensors
    tensors[bias] = tensors[bias].to(torch.int8)
    write_safetensors(tmp_path / "model.safetensors", tensors, metadata)
    message = refusal(tmp_path)
    assert f"stores 1 tensors as I8 where Gemma3ForConditionalGeneration has float weights ({bias})" in message


def test_a_shard_that_nothing_lists(write_model: Callable[[str], Path]) -> None:
    folder = write_model("llama")
    stray = folder / "model-00003-of-00007.safetensors"
    stray.write_bytes((folder / "model.safetensors").read_bytes())
    message = refusal(folder)
    assert f"holds 1 weight files that do not belong to its model, {stray.name} among them" in message
