"""PEFT over a packed model: what trains, what is saved, and what is refused."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from quantized_checkpoints import rounded
from tiny_mixtures import build_mixture
from torch import nn

import cloq_export
from cloq_export.artifact.checkpoint_writer import FloatPart, LayerSource, export_checkpoint
from cloq_export.engines.packed_lora import PackedLoraLinear
from cloq_export.errors import BindingError
from cloq_export.formats.peft.codec import read_adapter, write_adapter
from cloq_export.formats.registry import LAYOUTS
from cloq_export.models.experts import split_experts
from cloq_export.types import LoraPair, QuantSpec

CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def from_pretrained(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_one_step_changes_a_and_b_alone_and_the_saved_adapter_is_bound(
    tmp_path, layout, write_quantized, log_probabilities
):
    spec = QuantSpec(2, 32, LAYOUTS[layout].symmetric_only)
    written = write_quantized(tmp_path, spec=spec, layout=LAYOUTS[layout])
    base = from_pretrained(written.folder)
    codes = {name: tensor.clone() for name, tensor in base.named_buffers()}
    model = peft.get_peft_model(base, peft.LoraConfig(**CONFIG))
    wrapped = [module for module in model.modules() if isinstance(module, PackedLoraLinear)]
    assert len(wrapped) == len(written.layers)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    model.train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if ".lora_A." in name or ".lora_B." in name}
    assert all(
        torch.equal(tensor, codes[name.removeprefix("base_model.model.").replace(".base_layer", "")])
        for name, tensor in model.named_buffers()
    )
    model.save_pretrained(tmp_path / "saved")
    assert read_adapter(tmp_path / "saved").base_fingerprint == written.fingerprint
    loaded = cloq_export.load(written.folder, tmp_path / "saved")
    assert torch.equal(log_probabilities(loaded), log_probabilities(model.eval()))
    again = peft.PeftModel.from_pretrained(from_pretrained(written.folder), tmp_path / "saved")
    assert torch.equal(log_probabilities(again), log_probabilities(model))


@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_what_a_step_has_changed_is_served(written, how):
    """Fused optimizers write without telling torch's counters; transformers' trainer takes one by default."""
    model = peft.PeftModel.from_pretrained(from_pretrained(written.folder), written.adapter, is_trainable=True).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, **how)
    ids = torch.randint(96, (1, 9), generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        with torch.no_grad():
            before = model(input_ids=ids).logits
        output = model(input_ids=ids, labels=ids)
        assert torch.allclose(before, output.logits, atol=1e-4)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            after = model(input_ids=ids).logits
        assert (after - before).abs().max() > 1e-2
        assert torch.allclose(after, model(input_ids=ids).logits, atol=1e-4)


def test_an_adapter_of_ours_is_attached_and_trained_on(written, log_probabilities):
    model = peft.PeftModel.from_pretrained(from_pretrained(written.folder), written.adapter, is_trainable=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name}
    expected = log_probabilities(cloq_export.load(written.folder, written.adapter))
    assert torch.equal(log_probabilities(model), expected)


def test_split_experts_are_adapted_under_their_own_names(tmp_path, log_probabilities):
    # DeepSeek's dense layers and shared experts have names that PEFT takes for parts of fused experts.
    source = build_mixture("deepseek-v3")
    split_experts(source)
    layers = {
        name: rounded(module.weight.detach(), QuantSpec(4, 32))
        for name, module in source.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }
    held = LayerSource.of_mapping(layers)
    fingerprint = export_checkpoint(tmp_path / "base", held, FloatPart.of_model(source, held))
    pairs = {
        name: LoraPair(torch.full((2, layer.in_features), 0.05), torch.full((layer.out_features, 2), 0.05), 2.0)
        for name, layer in layers.items()
    }
    write_adapter(tmp_path / "adapter", pairs, base_model="random", base_fingerprint=fingerprint)
    model = peft.PeftModel.from_pretrained(from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert sum(isinstance(module, PackedLoraLinear) for module in model.modules()) == len(layers)
    alone = log_probabilities(cloq_export.load(tmp_path / "base"))
    adapted = log_probabilities(cloq_export.load(tmp_path / "base", tmp_path / "adapter"))
    assert (adapted - alone).abs().max() > 0.1
    assert torch.equal(log_probabilities(model), adapted)


def test_several_adapters_are_saved_each_bound(written, tmp_path):
    model = peft.PeftModel.from_pretrained(from_pretrained(written.folder), written.adapter)
    model.load_adapter(written.adapter, adapter_name="second")
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "second"):
        assert read_adapter(folder).base_fingerprint == written.fingerprint
    model.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    assert [path.name for path in (tmp_path / "one").rglob("cloq_adapter.json")] == ["cloq_adapter.json"]


def test_a_model_of_load_is_bound_too(written, tmp_path):
    model = peft.get_peft_model(cloq_export.load(written.folder), peft.LoraConfig(**CONFIG))
    model.save_pretrained(tmp_path)
    assert read_adapter(tmp_path).base_fingerprint == written.fingerprint


def test_an_adapter_of_another_base_is_refused_and_one_of_none_is_told(written, tmp_path):
    other = tmp_path / "other"
    write_adapter(other, written.pairs, base_model="random", base_fingerprint="sha256:" + "0" * 64)
    with pytest.raises(BindingError, match="an adapter is wrong on any other quantization"):
        peft.PeftModel.from_pretrained(from_pretrained(written.folder), other)
    unbound = tmp_path / "unbound"
    peft.get_peft_model(
        transformers.LlamaForCausalLM(written.source.config), peft.LoraConfig(**CONFIG)
    ).save_pretrained(unbound)
    assert not (unbound / "cloq_adapter.json").exists()
    with pytest.warns(UserWarning, match="does not say which quantized base it belongs to"):
        peft.PeftModel.from_pretrained(from_pretrained(written.folder), unbound)


def test_merging_is_refused(written):
    model = peft.PeftModel.from_pretrained(from_pretrained(written.folder), written.adapter)
    with pytest.raises(ValueError, match="Cannot merge LORA layers when the model is gptq quantized"):
        model.merge_and_unload()


def test_the_trainer_of_transformers_trains_and_saves_bound_checkpoints(written, tmp_path):
    model = peft.get_peft_model(from_pretrained(written.folder), peft.LoraConfig(**CONFIG))
    rows = [{"input_ids": list(range(row, row + 8)), "labels": list(range(row, row + 8))} for row in range(8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
        use_cpu=True,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, data_collator=transformers.default_data_collator
    )
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    assert json.loads((checkpoint / "cloq_adapter.json").read_text())["base_fingerprint"] == written.fingerprint
    cloq_export.load(written.folder, checkpoint)


def test_models_that_are_not_packed_are_left_to_peft(tmp_path, written):
    dense = transformers.LlamaForCausalLM(written.source.config)
    model = peft.get_peft_model(dense, peft.LoraConfig(**CONFIG))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert type(layer) is peft.tuners.lora.Linear
    assert type(layer.base_layer) is nn.Linear
