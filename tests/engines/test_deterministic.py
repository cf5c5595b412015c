"""Deterministic models: a text alone gets the logits that it gets in a batch of texts of its length, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import ClippedGELUActivation

from cloq_export.engines.packed_linear import PackedLinear
from cloq_export.engines.transformers.deterministic import DeterministicLinear, make_deterministic
from cloq_export.engines.transformers.loading import load
from cloq_export.engines.vllm.plugin.deterministic import is_deterministic
from cloq_export.errors import UnsupportedModelError, UsageError
from cloq_export.kernels import cpu
from cloq_export.kernels.cpu.dense import dense_linear
from cloq_export.types import QuantSpec

IDS = torch.randint(3, 90, (16, 11), generator=torch.Generator().manual_seed(0))


def logits_of(model, ids):
    with torch.no_grad():
        prompt = model(input_ids=ids[:, :-1], use_cache=True)
        last = model(input_ids=ids[:, -1:], past_key_values=prompt.past_key_values, use_cache=True)
    return torch.cat([prompt.logits, last.logits], 1)


@pytest.mark.parametrize("adapted", [True, False], ids=["adapter", "base"])
@pytest.mark.parametrize(("architecture", "bits"), [("llama", 2), ("qwen2", 3), ("gpt_neox", 4), ("opt", 8)])
def test_a_text_alone_and_among_others(tmp_path, architecture, bits, adapted, write_quantized, log_probabilities):
    written = write_quantized(tmp_path, architecture, QuantSpec(bits, 32))
    adapter = written.adapter if adapted else None
    model = load(written.folder, adapter, deterministic=True)
    assert any(type(module) is DeterministicLinear for module in model.modules())
    alone = torch.cat([logits_of(model, row[None]) for row in IDS])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for rows in (slice(0, 2), slice(3, 8), slice(0, 16)):
                assert torch.equal(logits_of(model, IDS[rows]), alone[rows]), (threads, rows)
    finally:
        torch.set_num_threads(before)
    usual = log_probabilities(load(written.folder, adapter))
    torch.testing.assert_close(log_probabilities(model), usual, rtol=0, atol=3e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("architecture", "bits"), [("llama", 2), ("qwen2", 4), ("gpt_neox", 3)])
def test_texts_of_different_lengths(tmp_path, architecture, bits, side, write_quantized):
    """Prompts that are filled up to one length, then one token after the other, as generating does it."""
    written = write_quantized(tmp_path, architecture, QuantSpec(bits, 32))
    model = load(written.folder, written.adapter, deterministic=True)
    lengths, longest = (9, 1, 4, 20, 17, 2), 20
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 90, (length + 2,), generator=generator) for length in lengths]

    def steps_of(numbers, width):
        """Return number -> logits of its prompt and of two tokens more, of these texts in one batch."""
        ids, mask = torch.zeros(2, len(numbers), width, dtype=torch.int64)
        places = []
        for row, number in enumerate(numbers):
            count = lengths[number]
            places.append(slice(width - count, None) if side == "left" else slice(0, count))
            ids[row, places[-1]], mask[row, places[-1]] = texts[number][:count], 1
        cache, found = None, []
        with torch.no_grad():
            for step in range(3):
                if step:
                    ids = torch.stack([texts[number][lengths[number] + step - 1] for number in numbers])[:, None]
                    mask = torch.cat([mask, torch.ones_like(ids)], 1)
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                answer = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
                cache = answer.past_key_values
                found.append(
                    [logits if step else logits[place] for logits, place in zip(answer.logits, places, strict=True)]
                )
        return {number: torch.cat(parts) for number, parts in zip(numbers, zip(*found, strict=True), strict=True)}

    alone = {}
    for number, length in enumerate(lengths):
        alone |= steps_of([number], length)
    for numbers, width in (([0, 1, 2, 3, 4, 5], longest), ([4, 2], 17), ([5, 1], 33)):
        for number, logits in steps_of(numbers, width).items():
            assert torch.equal(logits, alone[number]), (numbers, number)


def test_masks_and_caches_that_do_not_tell_texts_apart(tmp_path, write_quantized):
    model = load(write_quantized(tmp_path).folder, deterministic=True)
    ids = IDS[:2, :4]
    with pytest.raises(UnsupportedModelError, match="does not say where a text ends"):
        model(input_ids=ids, attention_mask=torch.zeros(2, 1, 4, 4))
    with pytest.raises(UnsupportedModelError, match="use a cache that grows"):
        model.generate(ids, max_new_tokens=4, cache_implementation="static", pad_token_id=0)


def test_it_serves_alone_and_on_the_cpu(tmp_path, write_quantized):
    written = write_quantized(tmp_path)
    for options in ({"trainable": True}, {"device": "cuda"}):
        with pytest.raises(UsageError, match="for models that only serve, on the CPU; leave it out"):
            load(written.folder, written.adapter, deterministic=True, **options)
    model = load(written.folder, deterministic=True)
    with pytest.raises(UsageError, match="a deterministic model only serves"):
        model(inputs_embeds=torch.zeros(1, 2, model.config.hidden_size, requires_grad=True))


def test_parts_that_may_depend_on_the_batch_are_refused():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 8))

    for part in (Router(), nn.Conv1d(2, 2, 3), ClippedGELUActivation(-1, 1)):
        with pytest.raises(UnsupportedModelError, match=rf"0 is a {type(part).__name__}, of which it is not known"):
            make_deterministic(nn.Sequential(part))


def test_without_the_library_it_is_refused(tmp_path, write_quantized, monkeypatch):
    written = write_quantized(tmp_path)
    monkeypatch.setattr(cpu.library, "load", lambda: None)
    with pytest.raises(UsageError, match="is for layers of the native library on the CPU"):
        load(written.folder, deterministic=True)


def test_a_layer_stays_so_when_it_is_moved_and_filled_again(tmp_path, write_quantized):
    model = load(write_quantized(tmp_path).folder, deterministic=True)
    model.load_state_dict(model.state_dict())
    packed = [module for module in model.to("cpu").modules() if isinstance(module, PackedLinear)]
    assert packed
    assert all(module.native is not None and module.native.deterministic for module in packed)


@pytest.mark.parametrize("isa", cpu.runnable_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float_layers(isa, dtype):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(37, 51, generator=generator).to(dtype)
    bias, x = torch.randn(37, generator=generator), torch.randn(70, 51, generator=generator).to(dtype)
    with cpu.select_isa(isa):
        y = dense_linear(x, weight, bias)
        alone = torch.stack([dense_linear(row, weight, bias) for row in x])
        assert torch.equal(y, alone)
        assert torch.equal(dense_linear(x[3:8].view(5, 1, 51), weight, bias)[:, 0], alone[3:8])
    truth = x.double() @ weight.double().t() + bias.double()
    torch.testing.assert_close(y.double(), truth, rtol=0, atol=1e-5 + torch.finfo(dtype).eps * float(truth.abs().max()))
    with pytest.raises(ValueError, match=r"the input is \(70, 50\)"):
        dense_linear(x[:, :50], weight)


def test_the_plugin_asks_the_environment(monkeypatch):
    for said, meant in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("CLOQ_EXPORT_VLLM_DETERMINISTIC", said)
        assert is_deterministic() is meant
    monkeypatch.setenv("CLOQ_EXPORT_VLLM_DETERMINISTIC", "yes")
    with pytest.raises(UsageError, match="CLOQ_EXPORT_VLLM_DETERMINISTIC is 'yes'; allowed are 1 and 0"):
        is_deterministic()
