"""Loading: what is served equals the dense reference, trains, and refuses what does not belong together."""

from __future__ import annotations

import copy
import json
import shutil

import peft
import pytest
import torch
from torch import nn

import cloq_export
from cloq_export.artifact.checkpoint_writer import FloatPart, LayerSource, export_checkpoint
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.engines.packed_linear import PackedLinear
from cloq_export.engines.transformers import loading
from cloq_export.engines.transformers.loading import dequantized_model, load
from cloq_export.errors import BindingError, FormatError, RunDirectoryError
from cloq_export.formats.gptq import GPTQ_V1
from cloq_export.formats.peft.codec import read_adapter, write_adapter
from cloq_export.kernels import cpu
from cloq_export.types import LoraPair, QuantSpec

ARCHITECTURES = ("llama", "qwen2", "gpt_neox", "opt")
TOLERANCE = 1e-4  # of a log-probability, what the project promises in float32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(2, 32),
        QuantSpec(3, 32),
        QuantSpec(4, 32),
        QuantSpec(8, 32),
        QuantSpec(2, -1),
        QuantSpec(3, -1, symmetric=True),
        QuantSpec(4, 16, symmetric=True),
    ],
    ids=str,
)
def test_logits_equal_the_dense_reference(
    tmp_path, architecture, spec, write_quantized, log_probabilities, assert_same_model
):
    written = write_quantized(tmp_path, architecture, spec)
    model = load(written.folder, adapter=written.adapter)
    assert type(model) is type(written.source)
    assert_same_model(model, written.reference(adapted=True))
    assert_same_model(dequantized_model(written.folder, written.adapter), written.reference(adapted=True))
    apart = dequantized_model(written.folder, written.adapter, merged=False)
    # The same numbers summed in another order, by the native library and by torch.
    torch.testing.assert_close(log_probabilities(model), log_probabilities(apart), rtol=0, atol=3e-5)
    model.disable_adapters()
    assert_same_model(model, written.reference(adapted=False))
    model.enable_adapters()
    assert_same_model(model, written.reference(adapted=True))
    assert_same_model(load(written.folder), written.reference(adapted=False))


def test_version_1_serves_the_same(tmp_path, write_quantized, assert_same_model):
    written = write_quantized(tmp_path, spec=QuantSpec(3, 32), layout=GPTQ_V1)
    assert (
        json.loads((written.folder / "config.json").read_text())["quantization_config"]["checkpoint_format"] == "gptq"
    )
    assert_same_model(load(written.folder, written.adapter), written.reference(adapted=True))


def test_overrides_and_skipped_modules(tmp_path, write_quantized, assert_same_model):
    overrides = {"q_proj": QuantSpec(4, 64), "down_proj": None, "o_proj": QuantSpec(8, -1, symmetric=True)}
    written = write_quantized(tmp_path, overrides=overrides)
    model = load(written.folder, written.adapter)
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.base_layer.bits == 4
    assert layer.self_attn.o_proj.base_layer.group_size == 64
    assert layer.self_attn.k_proj.base_layer.bits == 2
    assert type(layer.mlp.down_proj) is nn.Linear
    assert_same_model(model, written.reference(adapted=True))


def _packed(model):
    return [(name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_half_precision_can_be(written, dtype, log_probabilities):
    reference = written.reference(adapted=True)
    model = load(written.folder, written.adapter, dtype=dtype)
    assert {module.scales.dtype for _, module in _packed(model)} == {torch.float16}
    assert model.lm_head.weight.dtype == dtype
    expected = log_probabilities(reference)
    plain = (log_probabilities(reference.to(dtype)) - expected).abs().max()
    assert (log_probabilities(model) - expected).abs().max() <= 2 * plain


def test_stored_dtype_is_the_default(tmp_path, write_quantized, assert_same_model):
    written = write_quantized(tmp_path, dtype=torch.bfloat16)
    assert load(written.folder).dtype == torch.bfloat16
    assert load(written.folder, dtype=torch.float32).dtype == torch.float32
    assert_same_model(load(written.folder, written.adapter, dtype=torch.float32), written.reference(adapted=True))


def test_no_dense_copy_is_kept(written, log_probabilities):
    model = load(written.folder, written.adapter)
    packed = _packed(model)
    assert len(packed) == len(written.layers)
    log_probabilities(model)
    for name, module in packed:
        assert dict(module.named_parameters()) == {}, name
        assert {key for key, _ in module.named_buffers()} == {"packed_codes", "packed_zeros", "packed_scales"}
    dense = sum(layer.codes.numel() for layer in written.layers.values())
    held = sum(buffer.numel() * buffer.element_size() for _, module in packed for buffer in module.buffers())
    # The library holds a zero in a byte.
    assert held * 8 <= sum(layer.stored_bits + 8 * layer.zeros.numel() for layer in written.layers.values())
    assert held < dense


def test_load_moves_nobodys_seed(written):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load(written.folder, written.adapter)
    assert torch.equal(torch.rand(4), expected)


def test_a_model_in_memory_is_written_with_a_config_that_says_what_it_is(tmp_path, write_quantized, assert_same_model):
    written = write_quantized(tmp_path / "first", "qwen2")
    model = copy.deepcopy(written.source)
    model.config.tie_word_embeddings = True
    layers = LayerSource.of_mapping(written.layers)
    export_checkpoint(tmp_path / "second", layers, FloatPart.of_model(model, layers))
    assert json.loads((tmp_path / "second" / "config.json").read_text())["tie_word_embeddings"] is False
    assert model.config.tie_word_embeddings is True
    assert_same_model(load(tmp_path / "second"), written.reference(adapted=False))


def test_generation_works(written):
    ids = torch.tensor([[5, 6, 7]])
    model = load(written.folder, written.adapter)
    produced = model.generate(ids, max_new_tokens=5, do_sample=False)
    expected = written.reference(adapted=True).generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(produced, expected)


def test_run_directory_names_its_checkpoint_and_adapters(tmp_path, written, assert_same_model):
    run = tmp_path / "run"
    with RunDirectory.create_or_resume(run, {"bits": 2}, "sha256:0", {}):
        pass
    with pytest.raises(FormatError, match=r"is a run without a checkpoint yet; write it with: cloq export .*run"):
        load(run)
    shutil.copytree(written.folder, run / "checkpoint")
    shutil.copytree(written.adapter, run / "adapters" / "cloq")
    assert_same_model(cloq_export.load(run, adapter="cloq"), written.reference(adapted=True))
    assert_same_model(cloq_export.load(run, adapter=str(written.adapter)), written.reference(adapted=True))
    assert_same_model(cloq_export.dequantized_model(run, adapter="cloq"), written.reference(adapted=True))
    with pytest.raises(RunDirectoryError, match=r"has no adapter 'other'; it has cloq\. Give one of these"):
        load(run, adapter="other")


# --- training -------------------------------------------------------------------------------------------------------


def test_gradients_of_the_adapter_equal_those_of_a_dense_base(written):
    model = load(written.folder, written.adapter, trainable=True)
    dense = peft.PeftModel.from_pretrained(
        written.reference(adapted=False), str(written.adapter), is_trainable=True
    ).base_model.model
    ids = torch.arange(16).view(2, 8)
    for one in (model, dense):
        one.train()
        one(input_ids=ids, labels=ids).loss.backward()
    theirs = dict(dense.named_parameters())
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(written.pairs)
    for name, parameter in trained:
        assert parameter.dtype == torch.float32
        scale = theirs[name].grad.abs().max()
        assert scale > 0
        assert (parameter.grad - theirs[name].grad).abs().max() <= 1e-4 * scale, name


def test_frozen_unless_asked(written):
    assert not any(parameter.requires_grad for parameter in load(written.folder, written.adapter).parameters())


def test_training_moves_the_adapter_only(written):
    model = load(written.folder, written.adapter, trainable=True)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(16).view(2, 8)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


# --- upstream PEFT --------------------------------------------------------------------------------------------------


def test_upstream_peft_loads_the_adapter_unchanged(written, assert_same_model):
    on_dense = peft.PeftModel.from_pretrained(written.reference(adapted=False), str(written.adapter)).eval()
    assert_same_model(on_dense, written.reference(adapted=True))
    on_packed = peft.PeftModel.from_pretrained(load(written.folder), str(written.adapter)).eval()
    assert_same_model(on_packed, written.reference(adapted=True))


def test_peft_starts_a_new_adapter_on_the_packed_model_and_writes_it(tmp_path, written, log_probabilities):
    wrapped = peft.get_peft_model(
        load(written.folder), peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    expected = log_probabilities(wrapped.eval())
    wrapped.save_pretrained(str(tmp_path / "mine"))
    assert set(read_adapter(tmp_path / "mine").pairs) == set(written.layers)
    with pytest.raises(BindingError, match="does not say which quantized base it belongs to"):
        load(written.folder, tmp_path / "mine")
    again = load(written.folder, tmp_path / "mine", force=True)
    torch.testing.assert_close(log_probabilities(again), expected, rtol=0, atol=1e-5)


def test_merging_into_packed_weights_is_refused(written):
    wrapped = peft.PeftModel.from_pretrained(load(written.folder), str(written.adapter))
    with pytest.raises(ValueError, match="Cannot merge LORA layers when the model is gptq quantized"):
        wrapped.merge_and_unload()
    for safe in (True, False):
        with pytest.raises(Exception, match=r"cannot be changed or merged into.*dequantized_model"):
            wrapped.base_model.model.model.layers[0].mlp.up_proj.merge(safe_merge=safe)


def test_dequantized_model_saves_as_an_ordinary_one(tmp_path, written, assert_same_model):
    dequantized_model(written.folder, written.adapter).save_pretrained(tmp_path / "dense")
    again = type(written.source).from_pretrained(tmp_path / "dense")
    assert_same_model(again, written.reference(adapted=True))


# --- refusals -------------------------------------------------------------------------------------------------------


def test_adapter_of_another_base_is_refused_with_both_fingerprints(tmp_path, written, write_quantized):
    other = write_quantized(tmp_path, spec=QuantSpec(3, 32))
    for loader in (load, dequantized_model):
        with pytest.raises(BindingError) as caught:
            loader(written.folder, other.adapter)
        text = str(caught.value)
        assert written.fingerprint in text
        assert other.fingerprint in text
        assert "\n" not in text
        assert "`force`" in text
    loader(written.folder, other.adapter, force=True)
    load(written.folder, other.adapter, force=True)


def test_adapters_that_do_not_fit_are_refused(tmp_path, written):
    name, pair = next(iter(written.pairs.items()))
    wide = LoraPair(pair.lora_A.repeat(1, 2), pair.lora_B, pair.alpha)
    for pairs, message in (
        ({"model.layers.7.mlp.up_proj": pair}, "which is no linear layer of LlamaForCausalLM"),
        ({name: wide}, "do not fit model.layers.0.self_attn.q_proj with 64 inputs and 64 outputs"),
    ):
        folder = tmp_path / message[:4]
        write_adapter(folder, pairs, base_model="random", base_fingerprint=written.fingerprint)
        for loader in (load, dequantized_model):
            with pytest.raises(FormatError, match=message):
                loader(written.folder, folder)
    with pytest.raises(FormatError, match=r"is no adapter folder; give the folder that holds adapter_config\.json"):
        load(written.folder, tmp_path)


def test_without_the_native_library_a_warning_says_so(written, log_probabilities, monkeypatch):
    expected = log_probabilities(load(written.folder, written.adapter))
    monkeypatch.setattr(cpu.library, "load", lambda: None)
    with pytest.warns(UserWarning, match="14 packed layers compute with plain torch, slowly. CPU kernels: "):
        model = load(written.folder, written.adapter)
    torch.testing.assert_close(log_probabilities(model), expected, rtol=0, atol=TOLERANCE)


def tied_pair(written, folder, **pairs):
    """Write an adapter with a pair for the head, and give the pair."""
    generator = torch.Generator().manual_seed(3)
    pair = LoraPair(0.1 * torch.randn(4, 64, generator=generator), 0.2 * torch.randn(96, 4, generator=generator), 4.0)
    write_adapter(folder, {"lm_head": pair, **pairs}, base_model="", base_fingerprint=written.fingerprint)
    return pair


@pytest.mark.parametrize("merged", [True, False])
def test_a_pair_on_a_tied_head_leaves_the_embeddings_alone(tmp_path, written, log_probabilities, merged):
    pair = tied_pair(written, tmp_path / "adapter")
    model = dequantized_model(written.folder, tmp_path / "adapter", merged=merged)
    embeddings = dequantized_model(written.folder).get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    reference = written.reference(adapted=False)
    reference.lm_head.weight = nn.Parameter(embeddings.detach() + pair.product())
    torch.testing.assert_close(log_probabilities(model), log_probabilities(reference), atol=3e-5, rtol=0)
    packed = load(written.folder, tmp_path / "adapter")
    torch.testing.assert_close(log_probabilities(packed), log_probabilities(reference), atol=TOLERANCE, rtol=0)


def test_a_merged_pair_of_a_tied_head_survives_saving(tmp_path, written, log_probabilities):
    from transformers import AutoModelForCausalLM

    tied_pair(written, tmp_path / "adapter")
    model = dequantized_model(written.folder, tmp_path / "adapter")
    assert not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(log_probabilities(again), log_probabilities(model))


def test_a_pair_under_a_second_name_of_a_layer_is_refused(tmp_path, written, monkeypatch):
    fill = loading._fill

    def with_a_shared_block(model, *arguments):
        fill(model, *arguments)
        model.model.layers.append(model.model.layers[0])

    monkeypatch.setattr(loading, "_fill", with_a_shared_block)
    name = "model.layers.0.self_attn.q_proj"
    second = name.replace("0", "2")
    write_adapter(
        tmp_path / "adapter", {second: written.pairs[name]}, base_model="", base_fingerprint=written.fingerprint
    )
    for loader in (load, dequantized_model):
        with pytest.raises(FormatError, match=rf"adapts {second}, another name of the layer {name}") as error:
            loader(written.folder, tmp_path / "adapter")
        assert "\n" not in str(error.value)


def test_a_weight_that_two_layers_share_is_not_read_quantized(tmp_path, written, monkeypatch):
    from transformers import LlamaForCausalLM

    first, second = (f"model.layers.{number}.self_attn.q_proj" for number in (0, 1))
    ties = {**LlamaForCausalLM._tied_weights_keys, f"{second}.weight": f"{first}.weight"}
    monkeypatch.setattr(LlamaForCausalLM, "_tied_weights_keys", ties)
    with pytest.raises(FormatError, match=rf"quantizes {first} and {second}, which are one weight"):
        load(written.folder)
