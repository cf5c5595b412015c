"""Adapters over packed layers: what is fused equals what PEFT computes, and PEFT computes what is not."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.tuners import lora

from cloq_export.engines import packed_lora
from cloq_export.engines.packed_lora import PackedLoraLinear, _holds
from cloq_export.engines.transformers.loading import load
from cloq_export.kernels import dispatch


@pytest.fixture
def model(written):
    return load(written.folder, written.adapter)


@pytest.fixture
def layer(model) -> PackedLoraLinear:
    layer = model.model.layers[0].mlp.down_proj
    assert type(layer) is PackedLoraLinear
    return layer


@pytest.fixture
def peft_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Note the input of every layer that PEFT computes."""
    calls: list[tuple[int, ...]] = []
    plain = lora.Linear.forward

    def noted(self, x, *args, **kwargs):
        calls.append(tuple(x.shape))
        return plain(self, x, *args, **kwargs)

    monkeypatch.setattr(lora.Linear, "forward", noted)
    return calls


def add_adapter(layer: PackedLoraLinear, name: str, rank: int) -> None:
    layer.update_layer(name, rank, lora_alpha=3 * rank, config=peft.LoraConfig(lora_alpha=3 * rank, r=rank))
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        layer.lora_B[name].weight.normal_(generator=generator)
    layer.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_adapter_is_fused(layer, peft_calls, dtype):
    for leading in [(5,), (1, 1), (2, 3)]:
        x = torch.randn(*leading, layer.in_features).to(dtype)
        fused = layer(x)
        assert not peft_calls
        apart = lora.Linear.forward(layer, x)
        peft_calls.clear()
        assert fused.dtype == apart.dtype == dtype
        tolerance = 2 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-5
        torch.testing.assert_close(fused, apart, rtol=tolerance, atol=tolerance * float(apart.abs().max()))


def test_an_adapter_for_every_row(layer, peft_calls):
    add_adapter(layer, "wide", 9)
    add_adapter(layer, "narrow", 2)
    x = torch.randn(5, 4, layer.in_features)
    rows = ["narrow", "__base__", "default", "wide", "narrow"]
    fused = layer(x, adapter_names=rows)
    assert not peft_calls
    torch.testing.assert_close(fused, lora.Linear.forward(layer, x, adapter_names=rows), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(fused[1], layer.base_layer(x[1]))
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        layer(x, adapter_names=rows[1:])


def test_what_was_found_for_a_batch_serves_the_next_one_only_while_it_holds(layer, peft_calls, monkeypatch):
    add_adapter(layer, "other", 3)
    prompt, x = torch.randn(3, 6, layer.in_features), torch.randn(3, 1, layer.in_features)
    found = []
    plain = PackedLoraLinear._only_served
    monkeypatch.setattr(PackedLoraLinear, "_only_served", lambda *args: found.append(None) or plain(*args))

    def check(rows, *, anew):
        found.clear()
        for given in (prompt, x):
            fused = layer(given, adapter_names=rows)
            assert not peft_calls
            torch.testing.assert_close(
                fused, lora.Linear.forward(layer, given, adapter_names=rows), rtol=1e-5, atol=1e-4
            )
            peft_calls.clear()
        assert len(found) == anew

    with torch.no_grad():
        check(["other", "__base__", "default"], anew=True)
        check(["other", "__base__", "default"], anew=False)
        check(["default", "__base__", "default"], anew=True)
        layer.lora_A["default"].weight.mul_(2)
        check(["default", "__base__", "default"], anew=True)
        layer.scaling["default"] *= 0.5
        check(["default", "__base__", "default"], anew=True)
        with pytest.raises(ValueError, match="Length of `adapter_names`"):
            layer(x[1:], adapter_names=["default", "__base__", "default"])


def test_changed_factors_are_seen(layer, peft_calls):
    x = torch.randn(2, layer.in_features)
    before = layer(x)
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(2)
    doubled = layer(x)
    torch.testing.assert_close(doubled - layer.base_layer(x), 2 * (before - layer.base_layer(x)), rtol=1e-4, atol=1e-4)
    layer.scaling["default"] *= 0.5
    torch.testing.assert_close(layer(x), before)
    layer.lora_B["default"].weight.data = torch.zeros_like(layer.lora_B["default"].weight)
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    assert not peft_calls


def test_peft_computes_what_is_not_only_served(layer, peft_calls):
    x = torch.randn(2, layer.in_features)
    layer(x.clone().requires_grad_())
    assert len(peft_calls) == 1
    layer.lora_A["default"].weight.requires_grad_()
    layer(x)
    assert len(peft_calls) == 2
    with torch.no_grad():
        layer(x)
    assert len(peft_calls) == 2
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer(x.to(torch.float64))
    assert len(peft_calls) == 4


def test_two_active_adapters_are_left_to_peft(layer, peft_calls):
    add_adapter(layer, "other", 3)
    layer.set_adapter(["default", "other"])
    layer.requires_grad_(False)
    layer(torch.randn(2, layer.in_features))
    assert len(peft_calls) == 1


@pytest.fixture
def there(layer, monkeypatch) -> PackedLoraLinear:
    """Return the layer as it stands on a GPU; the reference computes in the place of Triton."""
    base = layer.base_layer
    base._register(*base.in_gptq_order(), None)
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", {"cpu"})
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    # What a GPU's kernel cannot take is left to PEFT; the layer's own groups may be any.
    monkeypatch.setattr(dispatch, "_UNIT", 1)
    return layer


@pytest.mark.parametrize("rows", [None, ["wide", "__base__", "default", "wide"]], ids=["one", "several"])
def test_few_tokens_of_a_gpu_take_one_call(there, peft_calls, rows, monkeypatch):
    add_adapter(there, "wide", 9)
    packed = []
    monkeypatch.setattr(packed_lora, "_holds", lambda *given: packed.append(given) or _holds(*given))
    kwargs = {} if rows is None else {"adapter_names": rows}
    for length in (1, 2):
        x = torch.randn(4, length, there.in_features)
        fused = there(x, **kwargs)
        assert not peft_calls
        torch.testing.assert_close(fused, lora.Linear.forward(there, x, **kwargs), rtol=1e-5, atol=1e-4)
        peft_calls.clear()
        asked, packed[:] = len(packed), []
        # Pairs are brought together once, and again only when they have changed.
        assert bool(asked) == (length == 1)
    with torch.no_grad():
        there.lora_B["default"].weight.mul_(2.0)
    torch.testing.assert_close(there(x, **kwargs), lora.Linear.forward(there, x, **kwargs), rtol=1e-5, atol=1e-4)


def test_many_tokens_and_old_gpus_are_left_to_peft(there, peft_calls, monkeypatch):
    there(torch.randn(dispatch.MOST_TOKENS, there.in_features))
    assert not peft_calls
    there(torch.randn(dispatch.MOST_TOKENS + 1, there.in_features))
    assert len(peft_calls) == 1
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", {"cuda"})
    there(torch.randn(2, there.in_features))
    assert len(peft_calls) == 2
