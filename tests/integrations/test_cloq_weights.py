"""Weights of CLoQ's closed form in a PEFT model, against a slow solution layer by layer."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers

import cloq_export
from cloq_export.engines.packed_lora import PackedLoraLinear
from cloq_export.errors import CalibrationError, ShapeError, UsageError
from cloq_export.formats.peft.codec import read_adapter
from cloq_export.peft import replace_lora_weights_cloq
from cloq_export.types import QuantSpec

RANK, ALPHA = 4, 12
CONFIG = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture
def original(tmp_path, write_quantized):
    """Return a 2-bit base, and the folder of the float model that it was made from."""
    written = write_quantized(tmp_path / "packed", spec=QuantSpec(2, 32))
    written.source.save_pretrained(tmp_path / "float")
    transformers.PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), unk_token="<unk>").save_pretrained(
        tmp_path / "float"
    )
    return written, str(tmp_path / "float")


def _tokenizer():
    import tokenizers

    words = {"<unk>": 0} | {f"w{number}": number for number in range(1, 96)}
    return tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))


def tokens(rows=8, length=40, seed=0):
    return torch.randint(96, (rows, length), generator=torch.Generator().manual_seed(seed))


def adapted(written, **changes):
    base = transformers.AutoModelForCausalLM.from_pretrained(written.folder)
    torch.manual_seed(0)
    return peft.get_peft_model(base, peft.LoraConfig(**{**CONFIG, **changes}))


def packed_layers(model):
    return {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, PackedLoraLinear)}


def inputs_of(model, layers):
    """Return the inputs of layers, (tokens, in) float64 each."""
    inputs = {}

    def note(name):
        def hook(_, args):
            inputs[name] = args[0].flatten(0, 1).double()

        return hook

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    with torch.no_grad():
        model(input_ids=tokens())
    for handle in handles:
        handle.remove()
    return inputs


def test_each_layer_has_the_best_pair_for_the_inputs_that_it_meets(original):
    written, source = original
    model, behind = adapted(written), adapted(written)
    left = replace_lora_weights_cloq(model, tokens(), source)
    weights = {name: weight.detach().double() for name, weight in written.source.named_parameters()}
    assert set(left) == set(packed_layers(model))
    for block in range(len(written.source.model.layers)):
        own = {n: m for n, m in packed_layers(model).items() if n.startswith(f"model.layers.{block}.")}
        # The blocks before are mended in `behind`, this one and those after it are not.
        inputs = inputs_of(behind, {name: packed_layers(behind)[name] for name in own})
        for name, layer in own.items():
            gram = inputs[name].t() @ inputs[name]
            gram.diagonal().add_(0.01 * gram.diagonal().mean())
            values, vectors = torch.linalg.eigh(gram)
            root = vectors * values.sqrt() @ vectors.t()  # the symmetric one; the code takes a Cholesky factor
            error = (weights[f"{name}.weight"] - layer.base_layer.dequantize().double()) @ root
            bound = float(torch.linalg.svdvals(error)[RANK:].norm())
            a, b = (factor["default"].weight.detach().double() for factor in (layer.lora_A, layer.lora_B))
            # What is left is the smallest that any pair of this rank can leave.
            assert float((error - ALPHA / RANK * b @ a @ root).norm()) == pytest.approx(bound, rel=1e-3)
            assert left[name] == pytest.approx(bound / float(error.norm()), rel=1e-3)
            mended = packed_layers(behind)[name]
            mended.load_state_dict(layer.state_dict())


def test_the_repaired_model_is_closer_and_is_saved_bound(original, tmp_path, log_probabilities):
    written, source = original
    expected = log_probabilities(written.source)
    model = adapted(written, r=16)
    model.train()
    far = float((log_probabilities(model.eval()) - expected).abs().mean())
    model.train()
    batches = [{"input_ids": tokens()[row : row + 2], "attention_mask": torch.ones(2, 40)} for row in range(0, 8, 2)]
    replace_lora_weights_cloq(model, batches, source)
    assert model.training
    model.eval()
    assert float((log_probabilities(model) - expected).abs().mean()) < 0.7 * far
    model.save_pretrained(tmp_path / "saved")
    assert read_adapter(tmp_path / "saved").base_fingerprint == written.fingerprint
    assert torch.equal(
        log_probabilities(cloq_export.load(written.folder, tmp_path / "saved")), log_probabilities(model)
    )


def test_batches_and_one_tensor_give_the_same_and_the_callback_decides(original):
    written, source = original
    whole, parts, refused = adapted(written), adapted(written), adapted(written)
    untouched = {name: value.clone() for name, value in refused.state_dict().items() if ".lora_" in name}
    replace_lora_weights_cloq(whole, tokens(), source)
    replace_lora_weights_cloq(parts, list(tokens().split(3)), source)
    for name, value in whole.state_dict().items():
        if ".lora_" in name:
            assert torch.equal(value, parts.state_dict()[name])
    asked = []
    assert not replace_lora_weights_cloq(
        refused, tokens(), source, callback=lambda model, name: asked.append((model is refused, name)) or False
    )
    assert len(asked) == len(written.layers)
    assert all(own for own, _ in asked)
    for name, value in untouched.items():
        assert torch.equal(refused.state_dict()[name], value)


def test_one_adapter_of_several_is_replaced(original):
    written, source = original
    model = adapted(written)
    model.add_adapter("second", peft.LoraConfig(**{**CONFIG, "use_rslora": True}))
    model.set_adapter("second")
    before = {name: value.clone() for name, value in model.state_dict().items() if ".default." in name}
    replace_lora_weights_cloq(model, tokens(), source, adapter_name="second")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    layer = next(module for module in model.modules() if isinstance(module, PackedLoraLinear))
    assert layer.scaling["second"] == ALPHA / RANK**0.5
    assert bool(layer.lora_B["second"].weight.any())


def test_what_cannot_be_done(original, tmp_path):
    written, source = original
    model = adapted(written)
    with pytest.raises(UsageError, match=r"no LoRA layer 'other' over a packed linear; its adapters are default"):
        replace_lora_weights_cloq(model, tokens(), source, adapter_name="other")
    with pytest.raises(UsageError, match=r"nothing says which float model .* name it with `model_path`"):
        replace_lora_weights_cloq(model, tokens())
    with pytest.raises(CalibrationError, match=r"the rows of the data have 30, 40 tokens"):
        replace_lora_weights_cloq(model, [tokens(), tokens(length=30)], source)
    padded = {"input_ids": tokens(), "attention_mask": torch.zeros(8, 40)}
    with pytest.raises(CalibrationError, match="is padded"):
        replace_lora_weights_cloq(model, [padded], source)
    config = written.source.config
    config.intermediate_size = 128
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    with pytest.raises(ShapeError, match=r"the float model has no linear .*mlp\.\w+_proj of \(\d+, \d+\)"):
        replace_lora_weights_cloq(model, tokens(), source)
