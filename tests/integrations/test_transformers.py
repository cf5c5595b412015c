"""`from_pretrained` gives what `load` gives for our checkpoints, and leaves those of other tools alone."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.quantizers.auto import AutoQuantizationConfig

import cloq_export
from cloq_export.engines.packed_linear import PackedLinear
from cloq_export.errors import FormatError, UsageError
from cloq_export.formats.registry import LAYOUTS
from cloq_export.types import QuantSpec


def from_pretrained(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize(
    ("architecture", "layout"),
    [*(("llama", layout) for layout in LAYOUTS), ("qwen2", "gptq"), ("gpt_neox", "gptq_v2"), ("opt", "gptq_v2")],
)
def test_the_model_is_that_of_load_bit_for_bit(tmp_path, architecture, layout, write_quantized, log_probabilities):
    spec = QuantSpec(3, 32, LAYOUTS[layout].symmetric_only)
    written = write_quantized(tmp_path, architecture, spec, layout=LAYOUTS[layout])
    model, loaded = from_pretrained(written.folder), cloq_export.load(written.folder)
    assert type(model) is type(loaded)
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert packed == set(written.layers)
    assert torch.equal(log_probabilities(model), log_probabilities(loaded))
    held = {name: (tensor.shape, tensor.dtype) for name, tensor in loaded.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()} == held
    assert not any(module.training for module in model.modules())
    assert model.config.to_dict()["quantization_config"]["quant_method"] == LAYOUTS[layout].quant_method
    assert model.config.tie_word_embeddings == loaded.config.tie_word_embeddings


def test_the_dtype_is_the_stored_one_or_the_one_asked_for(tmp_path, write_quantized, log_probabilities):
    written = write_quantized(tmp_path, dtype=torch.bfloat16)
    assert from_pretrained(written.folder).dtype == torch.bfloat16
    for dtype in (torch.float32, torch.float16):
        model = from_pretrained(written.folder, dtype=dtype)
        assert {module.scales.dtype for module in model.modules() if isinstance(module, PackedLinear)} == {
            torch.float16
        }
        expected = log_probabilities(cloq_export.load(written.folder, dtype=dtype))
        assert torch.equal(log_probabilities(model), expected)


def test_modules_with_a_grid_of_their_own_or_none(tmp_path, write_quantized, log_probabilities):
    written = write_quantized(tmp_path, overrides={"q_proj": QuantSpec(4, 64), "down_proj": None})
    model = from_pretrained(written.folder)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert model.model.layers[0].self_attn.q_proj.bits == 4
    assert torch.equal(log_probabilities(model), log_probabilities(cloq_export.load(written.folder)))


def test_the_seed_of_the_caller_stays_and_the_model_can_be_copied(written, log_probabilities):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    model = from_pretrained(written.folder)
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(log_probabilities(copy.deepcopy(model)), log_probabilities(model))
    ids = torch.tensor([[5, 6, 7]])
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 6)


def test_devices(written):
    for device_map in ("cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}):
        assert from_pretrained(written.folder, device_map=device_map).device.type == "cpu"
    with pytest.raises(UsageError, match="spreads the model over cpu, disk; a packed model is put on one device"):
        from_pretrained(written.folder, device_map={"model": "cpu", "lm_head": "disk"})


def test_a_damaged_file_is_refused_as_load_refuses_it(tmp_path, write_quantized):
    written = write_quantized(tmp_path)
    path = written.folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"lacks the tensor model\.norm\.weight, which LlamaForCausalLM needs"):
        from_pretrained(written.folder)


def test_the_base_is_not_written_again(written, tmp_path):
    with pytest.raises(ValueError, match="is not serializable"):
        from_pretrained(written.folder).save_pretrained(tmp_path)


def test_checkpoints_of_other_tools_are_claimed_only_when_asked(tmp_path, write_quantized, log_probabilities):
    written = write_quantized(tmp_path)
    path = written.folder / "config.json"
    config = json.loads(path.read_text())
    described = config["quantization_config"]
    assert type(AutoQuantizationConfig.from_dict(described)).__name__ == "CloqConfig"
    del described["cloq"]
    assert type(AutoQuantizationConfig.from_dict(described)) is transformers.GPTQConfig
    path.write_text(json.dumps(config))
    with pytest.raises(ImportError, match="optimum"):
        from_pretrained(written.folder)
    cloq_export.register(foreign=True)
    assert torch.equal(
        log_probabilities(from_pretrained(written.folder)), log_probabilities(cloq_export.load(written.folder))
    )
    cloq_export.register()
    assert type(AutoQuantizationConfig.from_dict(described)) is transformers.GPTQConfig


def test_foreign_compressed_tensors_keep_their_quantizer(tmp_path, write_quantized, monkeypatch):
    written = write_quantized(tmp_path, spec=QuantSpec(4, 32), layout=LAYOUTS["compressed_tensors"])
    described = json.loads((written.folder / "config.json").read_text())["quantization_config"]
    del described["cloq"]
    read = []
    monkeypatch.setattr(transformers.CompressedTensorsConfig, "from_dict", lambda config, **_: read.append(config))
    AutoQuantizationConfig.from_dict(described)
    assert read == [described]


def test_importing_the_package_registers_nothing_and_needs_no_torch():
    code = "import sys, cloq_export; print(*(name in sys.modules for name in ('torch', 'peft', 'transformers')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"] * 3
