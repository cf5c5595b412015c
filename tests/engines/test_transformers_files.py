"""Files that are damaged, foreign, or disagree with what is said of them: read by their content, or refused by name."""

from __future__ import annotations

import copy
import json
import shutil

import peft
import pytest
import torch

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.checkpoint_writer import FloatPart, LayerSource, export_checkpoint
from cloq_export.artifact.empty_model import float_part, refuse_lost_biases, tie_entries
from cloq_export.engines.transformers.loading import dequantized_model, load
from cloq_export.errors import FormatError
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.files.tensor_writer import write_safetensors
from cloq_export.formats.gptq import GPTQ_V2
from cloq_export.formats.peft.codec import read_adapter
from cloq_export.types import QuantizedLayer, QuantSpec


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
        (set_in(f"{Q}.scales", lambda t: t.to(torch.float64)), f"{Q}: scales is torch.float64; expected torch.float16"),
        (set_in(f"{Q}.scales", lambda t: t.float() / 3), "scales, which are torch.float32, are no float16 numbers"),
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
