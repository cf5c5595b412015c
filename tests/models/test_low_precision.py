"""Sources of fp8, MXFP4 and NVFP4 weights: decoded as their formats say, in memory and block by block, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from low_precision_sources import E2M1, FORMATS, e2m1_of, store
from rich.console import Console
from tiny_mixtures import build_mixture

from cloq_export.errors import CloqError, NonFiniteError, SourceError, UnsupportedModelError
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.files.tensor_writer import write_safetensors
from cloq_export.models.low_precision import decode_e2m1
from cloq_export.models.source import open_model
from cloq_export.models.weights_on_disk import tensor_of
from cloq_export.recipe import Recipe
from cloq_export.verbs.export import export
from cloq_export.verbs.options import ExportOptions
from cloq_export.verbs.run import run as make_run
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verify import verify

Q = "model.layers.0.self_attn.q_proj"


def change(folder: Path, change_tensors: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors, metadata = read_safetensors(folder / "model.safetensors")
    change_tensors(tensors)
    write_safetensors(folder / "model.safetensors", tensors, metadata)


def refusal(folder: Path, kind: type[CloqError]) -> str:
    with pytest.raises(kind) as error:
        open_model(str(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_byte_holds_the_two_numbers_of_the_standard() -> None:
    bytes_ = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    expected = torch.tensor([[e2m1_of(code & 15), e2m1_of(code >> 4)] for code in range(256)]).reshape(2, 256)
    assert torch.equal(decode_e2m1(bytes_), expected)
    assert sorted(set(expected.abs().flatten().tolist())) == list(E2M1)


@pytest.mark.parametrize("stream", ["never", "always"])
@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_what_the_format_says(name: str, stream: Any, write_model: Callable[[str], Path]) -> None:
    folder = write_model("llama")
    truths = store(folder, name)
    loaded = open_model(str(folder), stream=stream)
    state = loaded.model.state_dict()
    for weight, truth in truths.items():
        # A product of a number and its scale, with one or two roundings of float32.
        assert torch.allclose(tensor_of(loaded.model, weight, state[weight]), truth, rtol=3e-7, atol=0)
    assert loaded.source.dtype == torch.bfloat16
    (note,) = loaded.notes
    assert f"{len(truths)} weights are decoded with their scales ({len(truths)} from {name.partition('-')[0]})" in note
    assert ("scales of activations and the cache are left out" in note) == (
        name in ("fp8-rows", "fp8-tensor", "fp8-silent", "nvfp4-modelopt")
    )
    assert getattr(loaded.config, "quantization_config", None) is None


def test_transformers_decodes_the_blocks_to_the_same_numbers(write_model: Callable[[str], Path]) -> None:
    folder = write_model("llama")
    tensors, metadata = read_safetensors(folder / "model.safetensors")
    torch.manual_seed(0)
    for tensor in [tensor for tensor in tensors if tensor.endswith("_proj.weight")]:
        rows, columns = tensors[tensor].shape
        tensors[tensor] = torch.randn(rows, columns).to(torch.float8_e4m3fn)
        tensors[f"{tensor}_scale_inv"] = torch.rand(rows // 16, columns // 32) / 100
    write_safetensors(folder / "model.safetensors", tensors, metadata)
    config = json.loads((folder / "config.json").read_text())
    said = {"quant_method": "fp8", "weight_block_size": [16, 32], "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    options = transformers.FineGrainedFP8Config(weight_block_size=(16, 32), dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=options)
    ours = open_model(str(folder), dtype=torch.bfloat16).model
    for name, tensor in ours.named_parameters():
        assert torch.equal(tensor, theirs.get_parameter(name).to(torch.bfloat16)), name


def test_transformers_decodes_fused_experts_to_the_same_numbers(
    tmp_path: Path, write_tokenizer: Callable[[Path], None]
) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model = build_mixture("gpt-oss")
    write_tokenizer(tmp_path)
    model.save_pretrained(tmp_path)
    tensors, metadata = read_safetensors(tmp_path / "model.safetensors")
    torch.manual_seed(0)
    expected = {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 124, (experts, rows, columns // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    write_safetensors(tmp_path / "model.safetensors", tensors, metadata)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    loaded = open_model(str(tmp_path))
    model.load_state_dict({**model.state_dict(), **expected})
    ids = torch.arange(4, 40).unsqueeze(0)
    with torch.no_grad():
        assert torch.allclose(loaded.model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert "from mxfp4" in loaded.notes[0]


def test_experts_under_the_names_of_the_hub(tmp_path: Path, write_tokenizer: Callable[[Path], None]) -> None:
    for kind in ("stored", "truth"):
        build_mixture("qwen3-moe").save_pretrained(tmp_path / kind)
        write_tokenizer(tmp_path / kind)
    truths = store(tmp_path / "stored", "nvfp4")
    assert any(".experts.3.down_proj." in name for name in truths)
    change(tmp_path / "truth", lambda tensors: tensors.update(truths))
    stored, truth = (open_model(str(tmp_path / kind)).model for kind in ("stored", "truth"))
    for name, tensor in stored.named_parameters():
        assert torch.allclose(tensor, truth.get_parameter(name), rtol=3e-7, atol=0), name


def test_a_run_goes_from_the_source_to_the_proof(
    tmp_path: Path,
    recipe_for: Callable[..., Recipe],
    model_folder: Callable[..., Path],
    silent: Console,
    contents: Callable[[Path], dict[str, str]],
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama"), folder)
    store(folder, "fp8-blocks")
    recipe = recipe_for("llama").changed({"model": str(folder)})
    digests = []
    for stream in ("never", "always"):
        make_run(recipe.changed({"stream": stream}), tmp_path / stream, console=silent)
        files = contents(tmp_path / stream)
        digests.append({name: digest for name, digest in files.items() if name not in ("run.json", "recipe.yaml")})
    assert digests[0] == digests[1]
    export(tmp_path / "never", ExportOptions(out=tmp_path / "export"), console=silent)
    said = json.loads((tmp_path / "export" / "config.json").read_text())
    assert said["quantization_config"]["quant_method"] == "gptq"
    short = {"window": 16, "windows": 2, "prompts": 2, "new_tokens": 3, "liveness_tokens": 16}
    options = VerifyOptions(reference=str(folder), text=recipe.eval_text, **short)
    report = verify(tmp_path / "export", options, console=silent)
    assert report.passed, (report.gates, report.missing)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"quant_method": "gptq", "bits": 4}, "(method gptq), as quantization_config in its config.json says"),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {}}}},
            "compressed-tensors",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}}},
            },
            "compressed-tensors",
        ),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}, "compressed-"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "modelopt"),
    ],
    ids=["other codes", "rotated", "integers", "sparse", "rescaled inputs"],
)
def test_a_label_that_says_more_than_scales_is_refused(
    write_model: Callable[[str], Path], entry: dict[str, Any], told: str
) -> None:
    folder = write_model("llama")
    store(folder, "fp8-silent")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))
    message = refusal(folder, UnsupportedModelError)
    assert told in message
    assert "float weights can be quantized, and fp8, MXFP4 and NVFP4 weights with their scales" in message


@pytest.mark.parametrize(
    ("name", "scale", "shape"),
    [
        ("fp8-rows", "weight_scale", (7, 3)),
        # The config says blocks of 48 x 32, of which two by two cover the weight; these would cover it too.
        ("fp8-blocks", "weight_scale_inv", (4, 4)),
        ("fp8-blocks", "weight_scale_inv", (2, 1)),
        # One for each input is none of the formats.
        ("fp8-silent", "weight_scale", (1, 64)),
    ],
)
def test_scales_that_do_not_fit_are_refused(
    name: str, scale: str, shape: tuple[int, int], write_model: Callable[[str], Path]
) -> None:
    folder = write_model("llama")
    store(folder, name)
    change(folder, lambda tensors: tensors.update({f"{Q}.{scale}": torch.ones(shape)}))
    message = refusal(folder, UnsupportedModelError)
    assert f"it holds 1 tensors of fp8, F8_E4M3 ({Q}.weight)" in message
    assert f"of shape (64, 64) beside {shape}" in message
    assert "whose scales fit them" in message


@pytest.mark.parametrize("shape", [(4, 4), (64, 2)])
def test_squares_and_groups_are_guessed_where_nothing_says_them(
    shape: tuple[int, int], write_model: Callable[[str], Path]
) -> None:
    folder = write_model("llama")
    store(folder, "fp8-silent")
    scale = torch.rand(shape) / 100
    change(folder, lambda tensors: tensors.update({f"{Q}.weight_scale": scale}))
    stored = read_safetensors(folder / "model.safetensors")[0][f"{Q}.weight"].to(torch.float32)
    spread = scale.repeat_interleave(64 // shape[0], 0).repeat_interleave(64 // shape[1], 1)
    assert torch.equal(open_model(str(folder)).model.get_parameter(f"{Q}.weight"), stored * spread)


def test_one_scale_for_each_expert_of_a_stack(tmp_path: Path, write_tokenizer: Callable[[Path], None]) -> None:
    build_mixture("gpt-oss").save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    name = "model.layers.1.mlp.experts.down_proj"
    scale = torch.tensor([0.5, 1.0, 2.0, 4.0])
    change(
        tmp_path,
        lambda tensors: tensors.update(
            {
                name: tensors[name].to(torch.float8_e4m3fn),
                f"{name}_scale": scale,
                f"{name}_bias": tensors[f"{name}_bias"],
            }
        ),
    )
    stored = read_safetensors(tmp_path / "model.safetensors")[0][name].to(torch.float32)
    for stream in ("never", "always"):
        model = open_model(str(tmp_path), stream=stream).model  # type: ignore[arg-type]
        state = model.state_dict()
        for expert in range(4):
            weight = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
            assert torch.equal(tensor_of(model, weight, state[weight]), (stored[expert] * scale[expert]).T)


def test_floats_under_a_label_of_codes_are_told_from_codes(write_model: Callable[[str], Path]) -> None:
    folder = write_model("llama")
    config = json.loads((folder / "config.json").read_text())
    said = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    message = refusal(folder, UnsupportedModelError)
    assert "(method fp8), as quantization_config in its config.json says" in message
    assert "Its files hold float weights alone: if they were decoded, delete that entry" in message


def test_a_weight_stored_twice_is_refused(write_model: Callable[[str], Path]) -> None:
    folder = write_model("llama")
    store(folder, "mxfp4")
    change(folder, lambda tensors: tensors.update({f"{Q}.weight": torch.ones(64, 64)}))
    assert f"holds {Q}.weight beside {Q}.weight_packed, which decodes to it" in refusal(folder, SourceError)


@pytest.mark.parametrize("part", ["weight_zero_point", "pre_quant_scale"])
def test_more_than_scales_is_refused(write_model: Callable[[str], Path], part: str) -> None:
    folder = write_model("llama")
    store(folder, "nvfp4")
    change(folder, lambda tensors: tensors.update({f"{Q}.{part}": torch.ones(64)}))
    assert f"{Q}.{part}" in refusal(folder, UnsupportedModelError)


def test_damaged_scales_are_named(write_model: Callable[[str], Path]) -> None:
    folder = write_model("llama")
    store(folder, "fp8-tensor")
    change(folder, lambda tensors: tensors[f"{Q}.weight_scale"].fill_(float("inf")))
    assert f"{Q}.weight_scale of {Q}.weight holds a scale that is not finite" in refusal(folder, SourceError)
    change(folder, lambda tensors: tensors[f"{Q}.weight_scale"].fill_(-0.5))
    assert f"{Q}.weight_scale of {Q}.weight holds a scale below zero" in refusal(folder, SourceError)
    folder = write_model("qwen2")
    store(folder, "mxfp4")
    change(folder, lambda tensors: tensors[f"{Q}.weight_scale"].fill_(255))
    assert f"{Q}.weight_scale holds a scale that is no number" in refusal(folder, SourceError)
    folder = write_model("qwen3")
    store(folder, "fp8-tensor")
    # The code of NaN.
    change(folder, lambda tensors: tensors[f"{Q}.weight"].view(torch.uint8)[0, :2].fill_(0x7F))
    assert f"the weight {Q}.weight holds 2 NaN or Inf values" in refusal(folder, NonFiniteError)
