"""Float sources that are quantized, mixed, empty, or hold what the model has no place for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cloq_export.errors import CloqError, SourceError, UnsupportedModelError
from cloq_export.models.source import find_source, open_model
from cloq_export.models.weight_files import WeightFiles

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(write_model: Callable[[str], Path]) -> Path:
    return write_model("llama")


def change_weights(folder: Path, **changes: Any) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), **changes}, path, metadata={"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(folder: Path, kind: type[CloqError], *, opened: bool = False) -> str:
    with pytest.raises(kind) as error:
        (open_model if opened else find_source)(str(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_double_precision_is_a_float_dtype(folder: Path) -> None:
    weight = load_file(folder / "model.safetensors")[f"{Q}.weight"]
    change_weights(folder, **{f"{Q}.weight": weight.to(torch.float64)})
    assert torch.equal(open_model(str(folder)).model.get_submodule(Q).weight, weight)


@pytest.mark.parametrize(
    ("dtype", "word"),
    [
        (torch.float8_e4m3fn, "fp8, F8_E4M3"),
        (torch.float8_e5m2, "fp8, F8_E5M2"),
        (torch.int8, "int8, I8"),
        (torch.uint8, "U8"),
        (torch.int32, "packed integers, I32"),
    ],
)
def test_packed_weights_are_told_by_what_they_are(folder: Path, dtype: torch.dtype, word: str) -> None:
    weight = load_file(folder / "model.safetensors")[f"{Q}.weight"]
    # Scales that fit a float of 8 bits would make it a weight that is decoded.
    change_weights(folder, **{f"{Q}.weight": weight.to(dtype), f"{Q}.weight_scale": torch.ones(5)})
    message = refusal(folder, UnsupportedModelError)
    assert "is already quantized, though its config does not say so" in message
    assert f"1 tensors of {word} ({Q}.weight), and 1 scales ({Q}.weight_scale)" in message.replace(
        "uint8, int8 or two 4-bit codes to a byte, U8", "U8"
    )


def test_scales_of_eight_bits_are_told(folder: Path) -> None:
    change_weights(folder, **{f"{Q}.weight_scale": torch.ones(2, 2).to(torch.float8_e8m0fnu)})
    assert "fp8, F8_E8M0" in refusal(folder, UnsupportedModelError)


@pytest.mark.parametrize("part", ["weight_scale", "weight_scale_inv", "input_scale", "scales", "k_scale"])
def test_scales_without_a_place_are_refused(folder: Path, part: str) -> None:
    change_weights(folder, **{f"{Q}.{part}": torch.ones(1)})
    message = refusal(folder, UnsupportedModelError, opened=True)
    assert f"holds 1 scales that LlamaForCausalLM has no place for ({Q}.{part})" in message


@pytest.mark.parametrize("part", ["qzeros", "absmax", "qweight", "g_idx"])
def test_parts_of_quantized_layers_are_refused(folder: Path, part: str) -> None:
    change_weights(folder, **{f"{Q}.{part}": torch.ones(1)})
    assert f"scales or codes, F32 ({Q}.{part})" in refusal(folder, UnsupportedModelError)


@pytest.mark.parametrize(
    "name", [f"{Q}.bias", "model.layers.0.self_attn.q_norm.weight", "model.layers.9.mlp.up_proj.weight", "lm_head.bias"]
)
def test_numbers_without_a_place_are_refused(folder: Path, name: str) -> None:
    change_weights(folder, **{name: torch.ones(3)})
    message = refusal(folder, SourceError, opened=True)
    assert f"holds 1 tensors that LlamaForCausalLM has no place for ({name})" in message


def test_biases_that_are_zero_are_left_out_and_said(folder: Path) -> None:
    change_weights(folder, **{f"{Q}.bias": torch.zeros(64)})
    (note,) = open_model(str(folder)).notes
    assert note.endswith(f"that are zero and have no place were left out: {Q}.bias")


def test_what_models_compute_for_themselves_is_no_matter(folder: Path) -> None:
    change_weights(
        folder,
        **{
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
            "model.layers.0.self_attn.masked_bias": torch.tensor(-1e9),
            "model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(),
        },
    )
    assert open_model(str(folder)).notes == ()


def test_what_a_class_declares_to_leave_out_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\..*"])
    change_weights(folder, **{"mtp.layers.0.proj.weight": torch.ones(3)})
    (note,) = open_model(str(folder)).notes
    assert "1 tensors" in note
    assert note.endswith("as LlamaForCausalLM of transformers declares: mtp.layers.0.proj.weight")


def test_a_bias_is_no_causal_mask(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"attn.bias"])
    change_weights(folder, **{"model.layers.0.self_attn.bias": torch.ones(64)})
    assert "has no place for (model.layers.0.self_attn.bias)" in refusal(folder, SourceError, opened=True)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "(method fp8), as quantization_config in its config.json"),
        ({"quantization_config": {}}, "(method unknown), as quantization_config"),
        (
            {"compression_config": {"quant_method": "compressed-tensors"}},
            "(method compressed-tensors), as compression_",
        ),
        ({"quantization": {"bits": 4, "group_size": 64}}, "(method mlx), as quantization in its config.json"),
        ({"text_config": {"quantization_config": {"quant_algo": "NVFP4"}}}, "(method NVFP4), as text_config.quant"),
    ],
)
def test_every_place_in_the_config_is_read(folder: Path, changes: dict[str, Any], told: str) -> None:
    change_config(folder, **changes)
    assert told in refusal(folder, UnsupportedModelError)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "modelopt FP8), as its hf_quant_config.json"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}, "modelopt FP8"),
        ("quantize_config.json", {"bits": 4, "desc_act": True}, "(method gptq), as its quantize_config.json"),
        (
            "quantization_config.json",
            {"quant_method": "auto-round"},
            "(method auto-round), as its quantization_config.json",
        ),
        ("quant_config.json", {"w_bit": 4, "zero_point": True}, "(method awq), as its quant_config.json"),
    ],
)
def test_every_file_of_other_writers_is_read(folder: Path, file: str, content: dict[str, Any], told: str) -> None:
    (folder / file).write_text(json.dumps(content))
    assert told in refusal(folder, UnsupportedModelError)


def test_files_that_say_nothing_is_quantized_are_no_matter(folder: Path) -> None:
    change_config(folder, quantization_config=None, compression_config={})
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": null}}')
    assert find_source(str(folder)).dtype == torch.float32


def test_an_adapter_beside_a_model_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    assert "holds adapter_config.json beside a whole model" in refusal(folder, SourceError)


def test_a_file_without_tensors_is_refused(folder: Path) -> None:
    save_file({}, folder / "model.safetensors")
    assert "model.safetensors holds no tensor at all" in refusal(folder, SourceError)


@pytest.fixture
def sharded(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"part-{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def change_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda found: found.update(ghost="part-0.safetensors"), "promises 1 tensors that no file holds, ghost among"),
        (lambda found: found.pop("model.norm.weight"), "holds model.norm.weight, which .* does not list"),
        (
            lambda found: found.update(
                {"model.norm.weight": f"part-{1 - int(found['model.norm.weight'][5])}.safetensors"}
            ),
            "holds model.norm.weight, which .* puts into part-",
        ),
    ],
)
def test_a_wrong_index_is_told(sharded: Path, change: Callable[[dict[str, str]], Any], told: str) -> None:
    assert len(WeightFiles.open(sharded).paths) == 2
    change_index(sharded, change)
    with pytest.raises(SourceError, match=told):
        find_source(str(sharded))


def test_two_models_in_one_folder_are_refused(sharded: Path) -> None:
    save_file({"x": torch.ones(1)}, sharded / "model.safetensors")
    assert "two models in one folder" in refusal(sharded, SourceError)
