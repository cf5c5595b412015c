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
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.checkpoint_writer import FloatPart, LayerSource, export_checkpoint
from cloq_export.artifact.empty_model import float_part, refuse_lost_biases, tie_entries
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.engines.packed_linear import PackedLinear
from cloq_export.engines.transformers import loading
from cloq_export.engines.transformers.loading import dequantized_model, load
from cloq_export.errors import BindingError, FormatError, RunDirectoryError
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.files.tensor_writer import write_safetensors
from cloq_export.formats.gptq import GPTQ_V1, GPTQ_V2
from cloq_export.formats.peft.codec import read_adapter, write_adapter
from cloq_export.kernels import cpu
from cloq_export.types import LoraPair, QuantizedLayer, QuantSpec

ARCHITECTURES = ("llama", "qwen2", "gpt_neox", "opt")
TOLERANCE = 1e-4  # of a log-probability, what the project promises in float32


@pytest.fixture(name="assert_same_model")
def _assert_same_model(log_probabilities):
    def check(model, reference):
        expected = log_probabilities(reference)
        assert expected.std() > 0.5, "a flat distribution would hide a wrong weight"
        assert (log_probabilities(model) - expected).abs().max() <= TOLERANCE

    return check


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


def test_tied_embeddings_stay_tied(written):
    model = load(written.folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    held = read_safetensors(written.folder / "model.safetensors")[0]
    assert "model.embed_tokens.weight" in held
    assert "lm_head.weight" not in held


def test_untied_embeddings_stay_apart(tmp_path, write_quantized):
    written = write_quantized(tmp_path, "qwen2")
    model = load(written.folder)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def tie_in_config(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))


def test_an_older_checkpoint_whose_config_ties_two_matrices_is_read_by_its_content(
    tmp_path, write_quantized, assert_same_model, capfd
):
    written = write_quantized(tmp_path, "qwen2")
    tie_in_config(written.folder)
    for loader in (load, dequantized_model):
        model = loader(written.folder)
        assert_same_model(model, written.reference(adapted=False))
        assert model.config.tie_word_embeddings is False
        # PEFT and others tie again by the config.
        model.tie_weights()
        assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert "tie" not in capfd.readouterr().err
    checkpoint = Checkpoint.open(written.folder)
    assert tie_entries(checkpoint) == {"tie_word_embeddings": False}
    assert float_part(checkpoint).config == {"tie_word_embeddings": False}


def test_a_checkpoint_that_is_right_about_its_head_keeps_its_config(tmp_path, write_quantized, written):
    for folder in (written.folder, write_quantized(tmp_path, "qwen2").folder):
        assert tie_entries(Checkpoint.open(folder)) == {}


def test_a_tied_head_stored_twice_is_one(tmp_path, write_quantized):
    written = write_quantized(tmp_path, "llama")
    path = written.folder / "model.safetensors"
    tensors, metadata = read_safetensors(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_safetensors(path, tensors, metadata=metadata)
    model = load(written.folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tie_entries(Checkpoint.open(written.folder)) == {}


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
        assert "force=True" in text
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


def copied(written, tmp_path):
    return shutil.copytree(written.folder, tmp_path / "copy")


def rewrite(folder, change):
    """Change the tensors of a checkpoint's only file."""
    tensors, metadata = read_safetensors(folder / "model.safetensors")
    change(tensors)
    write_safetensors(folder / "model.safetensors", tensors, metadata)


def set_in(name, value):
    return lambda tensors: tensors.__setitem__(name, value(tensors[name]))


def overwritten(tensor, index, value):
    tensor = tensor.clone()
    tensor.view(-1)[index] = value
    return tensor


Q = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.qzeros"), f"lacks the tensor {Q}.qzeros"),
        (lambda t: t.pop("model.norm.weight"), "lacks the tensor model.norm.weight, which LlamaForCausalLM needs"),
        (lambda t: t.pop("model.embed_tokens.weight"), "lacks the tensor .* and 1 more"),
        (set_in(f"{Q}.qweight", lambda t: t[:-1]), f"{Q}.qweight has shape .3, 96.; a layer with 64 inputs"),
        (set_in(f"{Q}.qweight", lambda t: t.to(torch.int64)), "qweight must be a matrix of torch.int32"),
        (set_in(f"{Q}.qzeros", lambda t: t[:, :-1]), f"{Q}.qzeros has shape .2, 5.; a layer with 64 inputs"),
        (set_in(f"{Q}.scales", lambda t: t[:-1]), f"{Q}.scales has shape .1, 96.; a layer with 64 inputs"),
        (set_in(f"{Q}.scales", lambda t: t.to(torch.float32)), "scales are torch.float32; expected torch.float16"),
        (set_in(f"{Q}.scales", lambda t: overwritten(t, 3, torch.nan)), f"{Q}: a scale is NaN, Inf, zero or negative"),
        (set_in(f"{Q}.scales", lambda t: overwritten(t, 3, 0)), f"{Q}: a scale is NaN, Inf, zero or negative"),
        (set_in(f"{Q}.g_idx", lambda t: t.flip(0)), f"{Q}: g_idx is not sequential"),
        (set_in("model.norm.weight", lambda t: t[:-1]), "model.norm.weight has shape .63,.; LlamaForCausalLM needs"),
        (set_in("model.norm.weight", lambda t: overwritten(t, 3, torch.inf)), "model.norm.weight holds NaN or Inf"),
        (lambda t: t.__setitem__("model.extra", torch.ones(2)), "holds model.extra, for which LlamaForCausalLM has no"),
    ],
)
@pytest.mark.parametrize("loader", [load, dequantized_model])
def test_damaged_tensors_are_named_in_one_line(tmp_path, written, change, message, loader):
    folder = copied(written, tmp_path)
    rewrite(folder, change)
    if loader is dequantized_model and any(word in message for word in ("qweight must", "scales are")):
        message = Q  # the codec finds it first, in its own words
    with pytest.raises(FormatError, match=message) as caught:
        loader(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, 0.999])
def test_truncated_files_are_refused(tmp_path, written, kept):
    folder = copied(written, tmp_path)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(FormatError, match="truncated or not a safetensors file") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("quantization_config"), "has no quantization_config, so .* is not a quantized checkpoint"),
        (lambda c: c.__setitem__("hidden_size", 128), "qweight has shape .* and 128 outputs at 2 bits needs"),
        (lambda c: c.__setitem__("num_hidden_layers", 1), "quantizes model.layers.1.* which is no linear layer"),
        (lambda c: c.__setitem__("num_hidden_layers", 3), "lacks the tensor model.layers.2"),
        (lambda c: c.__setitem__("model_type", "no_such_model"), "does not describe a causal language model"),
        (lambda c: c.__setitem__("hidden_size", "many"), "does not describe a causal language model"),
        (lambda c: c["quantization_config"].__setitem__("bits", 3), "the config says 3 bits .* hold 2-bit codes"),
        (lambda c: c["quantization_config"].__setitem__("bits", 5), "bits"),
        (lambda c: c["quantization_config"].__setitem__("group_size", 64), "group size 64, .* groups of 32"),
        (lambda c: c["quantization_config"]["cloq"].__setitem__("modules", []), "holds no quantized module"),
        (lambda c: c["quantization_config"]["cloq"]["modules"].append("a.b"), "lacks the tensor a.b.qweight"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path, written, change, message):
    folder = copied(written, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path, written):
    with pytest.raises(FormatError, match="nowhere does not exist; give a run directory or a checkpoint folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(FormatError, match=r"holds no config.json, so it is neither"):
        load(tmp_path)
    folder = copied(written, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"holds pytorch_model.bin but no model.safetensors; only safetensors files"):
        load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FormatError, match=r"model.safetensors does not exist; fetch or write"):
        load(folder)


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
    build = loading._build_model

    def with_a_shared_block(*arguments):
        model = build(*arguments)
        model.model.layers.append(model.model.layers[0])
        return model

    monkeypatch.setattr(loading, "_build_model", with_a_shared_block)
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


def foreign(written, tmp_path, change_config=lambda quantization, config: None):
    """Return a copy as another tool would have written it."""
    folder = copied(written, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["cloq"]
    change_config(config["quantization_config"], config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{UP}.bias", r"up_proj\.bias \(a bias with real numbers\), for which LlamaForCausalLM has no place"),
        (f"{UP}.weight", "beside the codes of .*: a float weight too"),
        (f"{UP}.perm", "beside the codes of .*: more than its layout"),
        (f"{UP}.input_scale", "beside the codes of"),
        ("model.norm.weight_scale", "a part of a quantized layer, but its config and codes do not make model.norm one"),
        ("lm_head.qzeros", "a part of a quantized layer"),
        ("model.layers.0.self_attn.k_scale", r"k_scale \(a scale of a quantized cache\), for which"),
        ("model.extra.weight", r"model\.extra\.weight, for which LlamaForCausalLM has no place"),
    ],
)
def test_tensors_without_a_place_are_refused_in_foreign_files_too(written, tmp_path, name, message):
    folder = foreign(written, tmp_path)
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(96)}))
    for read in (load, dequantized_model, lambda path: float_part(Checkpoint.open(path))):
        with pytest.raises(FormatError, match=message):
            read(folder)


def test_zeros_without_a_place_are_dropped_everywhere(written, tmp_path, log_probabilities):
    folder = foreign(written, tmp_path)
    idle = {f"{module}.bias": torch.zeros(layer.out_features) for module, layer in written.layers.items()}
    rewrite(folder, lambda tensors: tensors.update(idle))
    assert torch.equal(log_probabilities(load(folder)), log_probabilities(load(written.folder)))
    kept = float_part(Checkpoint.open(folder)).headers
    assert set(Checkpoint.open(folder).float_names()) - set(kept) == set(idle)


def test_symmetric_zeros_count_and_not_the_label(tmp_path, write_quantized, log_probabilities):
    written = write_quantized(tmp_path, "llama", QuantSpec(4, 32, symmetric=True))
    folder = foreign(written, tmp_path, lambda quantization, config: quantization.update(checkpoint_format="gptq"))
    with pytest.warns(UserWarning, match="the label says gptq, but the zeros .* are stored as in gptq_v2"):
        model = load(folder)
    assert torch.equal(log_probabilities(model), log_probabilities(load(written.folder)))
    assert Checkpoint.open(folder).layout_name == "gptq_v2"


def test_symmetric_is_refused_over_other_zeros(written, tmp_path):
    folder = foreign(written, tmp_path, lambda quantization, config: quantization.update(sym=True))
    for read in (load, dequantized_model):
        with pytest.raises(FormatError, match="is marked symmetric but has a zero other than 2"):
            read(folder)


def random_layer(out_features, in_features, spec):
    draw = torch.Generator().manual_seed(0)
    groups = (out_features, spec.group_count(in_features))
    codes = torch.randint(0, spec.max_code + 1, (out_features, in_features), generator=draw, dtype=torch.uint8)
    zeros = torch.randint(0, spec.max_code + 1, groups, generator=draw, dtype=torch.uint8)
    return QuantizedLayer(codes, torch.full(groups, 0.01, dtype=torch.float16), zeros, spec)


def quantized_head(written, tmp_path):
    """Return a checkpoint whose head has codes although its config ties it, and the head's dense weight."""
    layer = random_layer(96, 64, QuantSpec(4, 32))
    source = LayerSource.of_mapping({"lm_head": layer})
    export_checkpoint(tmp_path / "head", source, FloatPart.of_model(written.source, source))
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    assert config["quantization_config"]["lm_head"] is True
    (tmp_path / "head" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return tmp_path / "head", layer.dequantize()


def test_a_quantized_head_is_never_tied_over(written, tmp_path):
    folder, weight = quantized_head(written, tmp_path)
    packed, dense = load(folder), dequantized_model(folder)
    for model in (packed, dense):
        model.tie_weights()
        torch.testing.assert_close(model.lm_head(torch.eye(64)).T, weight)
        assert not torch.equal(model.model.embed_tokens.weight, weight)
        assert model.config.tie_word_embeddings is False
    assert tie_entries(Checkpoint.open(folder)) == {"tie_word_embeddings": False}


def test_quantized_embeddings_are_refused_by_name(written, tmp_path):
    folder = foreign(written, tmp_path)
    layer = random_layer(96, 64, QuantSpec(2, 32))
    parts = {f"model.embed_tokens.{part}": tensor for part, tensor in GPTQ_V2.pack_layer(layer).items()}
    rewrite(folder, lambda tensors: (tensors.pop("model.embed_tokens.weight"), tensors.update(parts)))
    with pytest.raises(FormatError, match=r"quantizes model\.embed_tokens, the embeddings of LlamaForCausalLM"):
        load(folder)


def test_a_pair_that_holds_the_other_tensor_is_tied_the_other_way_round(written, tmp_path, log_probabilities):
    folder = foreign(written, tmp_path)
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    model = load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(log_probabilities(model), log_probabilities(load(written.folder)))


def test_a_foreign_adapter_with_patterns_is_attached_under_exact_names(written, tmp_path):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": r".*\.(q|up)_proj", "init_lora_weights": False}
    wrapped = peft.get_peft_model(
        copy.deepcopy(written.source),
        peft.LoraConfig(**settings, rank_pattern={r".*\.1\.mlp\..*": 2}, lora_dropout=0.25),
    )
    wrapped.save_pretrained(tmp_path / "theirs")
    model = load(written.folder, tmp_path / "theirs", force=True, trainable=True)
    config = model.peft_config["default"]
    assert set(config.target_modules) == set(read_adapter(tmp_path / "theirs").pairs)
    assert config.rank_pattern == {UP: 2}
    assert config.lora_dropout == 0.25
    own, theirs = model.get_submodule(UP), wrapped.get_submodule(f"base_model.model.{UP}")
    torch.testing.assert_close(own.get_delta_weight("default"), theirs.get_delta_weight("default"))


def test_a_bias_that_the_original_has_not_is_not_lost(written, tmp_path):
    folder = foreign(written, tmp_path)
    rewrite(folder, lambda tensors: tensors.update({f"{UP}.bias": torch.zeros(96)}))
    refuse_lost_biases(Checkpoint.open(folder), written.source)
    rewrite(folder, lambda tensors: tensors.update({f"{UP}.bias": torch.ones(96)}))
    with pytest.raises(
        FormatError, match=r"up_proj\.bias \(a bias with real numbers\), which the original model has not"
    ):
        refuse_lost_biases(Checkpoint.open(folder), written.source)
