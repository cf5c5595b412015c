"""The packed linear as other code meets it: a linear layer without a weight that anyone could change."""

from __future__ import annotations

import copy
import dataclasses
import io

import pytest
import torch
from torch import nn

from cloq_export.engines.packed_linear import PackedLinear, PackedWeight
from cloq_export.errors import NonFiniteError, ShapeError
from cloq_export.kernels.cpu import library
from cloq_export.types import QuantizedLayer, QuantSpec


def with_bias(layer: PackedLinear, bias: torch.Tensor) -> PackedLinear:
    layer.bias = nn.Parameter(bias)
    return layer


def packed_tensors(bits=3, in_features=64, out_features=96, groups=2):
    generator = torch.Generator().manual_seed(0)

    def words(*shape):
        return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)

    return (
        words(in_features * bits // 32, out_features),
        words(groups, out_features * bits // 32),
        (0.1 + torch.rand(groups, out_features, generator=generator)).to(torch.float16),
    )


@pytest.fixture
def layer() -> PackedLinear:
    return with_bias(PackedLinear(*packed_tensors(), bits=3), torch.linspace(-1, 1, 96))


def test_it_is_a_linear_layer(layer):
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.group_size) == (64, 96, 32)
    assert "bits=3, group_size=32" in repr(layer)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert set(layer.state_dict()) == {"qweight", "qzeros", "scales", "bias"}
    x = torch.randn(3, 64)
    dense = nn.functional.linear(x, layer.dequantize(), layer.bias)
    torch.testing.assert_close(layer(x), dense)


def test_weight_tells_shape_dtype_and_device_without_computing(layer, monkeypatch):
    monkeypatch.setattr(PackedLinear, "dequantize", lambda self: pytest.fail("the weight was computed"))
    weight = layer.weight
    assert isinstance(weight, PackedWeight)
    assert weight.shape == (96, 64)
    assert weight.dtype == torch.float32
    assert weight.device == torch.device("cpu")
    assert weight.data.detach().ndim == 2
    assert "bits=3" in repr(weight)
    assert layer.bfloat16().weight.dtype == torch.bfloat16


def test_weight_computes_when_it_is_used(layer):
    weight = layer.dequantize()
    assert torch.equal(layer.weight + 0, weight)
    assert type(layer.weight.t()) is torch.Tensor
    assert torch.equal(layer.weight.clone(), weight)
    assert torch.equal(layer.weight.to(torch.float64), weight.to(torch.float64))
    assert torch.equal(nn.functional.linear(torch.eye(64), layer.weight), weight.t())
    assert torch.equal(layer.bfloat16().weight.clone(), weight.to(torch.bfloat16))


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.add_(1),
        lambda layer: layer.weight.zero_(),
        lambda layer: layer.weight.copy_(torch.zeros(96, 64)),
        lambda layer: layer.weight.data.mul_(2),
        lambda layer: nn.init.normal_(layer.weight),
        lambda layer: setattr(layer.weight, "data", torch.zeros(96, 64)),
        lambda layer: torch.add(torch.zeros(96, 64), 1, out=layer.weight),
    ],
)
def test_writing_into_the_weight_is_refused(layer, write):
    before = layer.dequantize()
    with pytest.raises(ShapeError, match=r"cannot be changed or merged into.*use cloq_export\.dequantized_model"):
        write(layer)
    assert torch.equal(layer.dequantize(), before)


def test_replacing_the_weight_is_refused(layer):
    with pytest.raises(KeyError, match="attribute 'weight' already exists"):
        layer.weight = nn.Parameter(torch.zeros(96, 64))
    with pytest.raises(AttributeError):
        layer.weight = torch.zeros(96, 64)


def test_casting_keeps_scales_and_codes(layer):
    x = torch.randn(3, 64)
    expected = layer(x)
    scales = layer.scales.clone()
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        layer.to(dtype)
        assert layer.scales.dtype == torch.float16
        assert layer.compute_dtype == layer.bias.dtype == layer.weight.dtype == dtype
    layer.float()
    assert torch.equal(layer.scales, scales)
    assert layer.qweight.dtype == torch.int32
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=2e-3)  # the bias went through bfloat16


def test_it_copies_and_reloads(layer):
    x = torch.randn(3, 64)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    zeros = (torch.zeros_like(t) if t.dtype == torch.int32 else t for t in packed_tensors())
    other = with_bias(PackedLinear(*zeros, bits=3), torch.zeros(96))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), layer(x))


def test_codes_are_held_once_and_given_back_in_gptq_order(layer):
    given = packed_tensors()
    assert layer.native is not None, "the native library must be there in a development checkout"
    assert layer.native.words is layer.packed_codes
    for name, tensor in zip(("qweight", "qzeros", "scales"), given, strict=True):
        assert torch.equal(getattr(layer, name), tensor)
        assert torch.equal(layer.state_dict()[name], tensor)
    assert {name for name, _ in layer.named_buffers()} == {"packed_codes", "packed_zeros", "packed_scales"}
    moved = copy.deepcopy(layer).to("meta")
    assert moved.native is None
    assert [tuple(tensor.shape) for tensor in moved.in_gptq_order()] == [tuple(tensor.shape) for tensor in given]


def test_a_layer_that_was_moved_away_is_filled_again_from_a_state_dict(layer):
    state = layer.state_dict()
    other = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    other.load_state_dict(state)
    assert other.native is not None
    x = torch.randn(3, 64)
    assert torch.equal(other(x), layer(x))


def test_state_dicts_that_do_not_fit_are_refused(layer):
    state = layer.state_dict()
    for part in ("qweight", "qzeros", "scales"):
        with pytest.raises(RuntimeError, match=f'Missing key.*"{part}"'):
            layer.load_state_dict({name: tensor for name, tensor in state.items() if name != part})
    with pytest.raises(RuntimeError, match="disagree; allowed are"):
        layer.load_state_dict(state | {"qweight": state["qweight"][:-1]})
    with pytest.raises(RuntimeError, match="a scale is NaN, Inf, zero or negative"):
        layer.load_state_dict(state | {"scales": state["scales"] * torch.nan})
    wider = PackedLinear(*packed_tensors(in_features=128, groups=4), bits=3).state_dict()
    with pytest.raises(RuntimeError, match=r"\(64, 96, 2\) cannot hold"):
        layer.load_state_dict(wider | {"bias": state["bias"]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_without_the_library_torch_computes_the_same(layer, dtype, monkeypatch):
    x = torch.randn(5, 64, dtype=torch.float64).to(dtype)
    monkeypatch.setattr(library, "load", lambda: None)
    plain = with_bias(PackedLinear(*packed_tensors(), bits=3), torch.linspace(-1, 1, 96))
    assert plain.native is None
    expected = plain(x).detach()
    monkeypatch.undo()
    result = layer(x).detach()
    assert result.dtype == dtype
    relative = torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-5
    torch.testing.assert_close(result, expected, rtol=relative, atol=relative * float(expected.abs().max()))


def test_gradients_pass_through_the_packed_weight(layer):
    x = torch.randn(3, 64, requires_grad=True)
    upstream = torch.randn(3, 96)
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ layer.dequantize())
    torch.testing.assert_close(layer.bias.grad, upstream.sum(0))


def test_export_finds_the_buffers_by_name(layer):
    x = torch.randn(3, 64)
    program = torch.export.export(layer.requires_grad_(False), (x,))
    assert set(program.graph_signature.buffers) == {"packed_codes", "packed_zeros", "packed_scales"}
    assert torch.equal(program.module()(x), layer(x))


def test_tensors_that_do_not_belong_together_are_refused():
    qweight, qzeros, scales = packed_tensors()
    with pytest.raises(ShapeError, match="disagree; allowed are"):
        PackedLinear(qweight[:-1], qzeros, scales, bits=3)
    with pytest.raises(ShapeError, match="qzeros is"):
        PackedLinear(qweight, qzeros[:, :-1], scales, bits=3)
    for bad in (torch.nan, torch.inf, 0.0, -1.0):
        broken = scales.clone()
        broken[0, 0] = bad
        with pytest.raises(NonFiniteError, match="a scale is NaN, Inf, zero or negative"):
            PackedLinear(qweight, qzeros, broken, bits=3)


# (out, in, bits, group size): sides that do not fill whole words, alone and together.
ODD = [
    (80, 96, 3, 16),
    (96, 80, 3, 16),
    (100, 100, 4, -1),
    (5, 24, 2, 8),
    (33, 40, 3, 8),
    (7, 9, 8, -1),
    (1, 1, 3, -1),
    (64, 48, 3, 24),
]


def odd_layer(out_features, in_features, bits, group_size):
    generator = torch.Generator().manual_seed(bits)
    spec = QuantSpec(bits, group_size)
    groups = spec.group_count(in_features)

    def codes(*shape):
        return torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8)

    scales = (0.1 + torch.rand(out_features, groups, generator=generator)).to(torch.float16)
    return QuantizedLayer(codes(out_features, in_features), scales, codes(out_features, groups), spec)


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("size", ODD, ids=str)
def test_widths_that_do_not_fill_whole_words(size, native, monkeypatch):
    layer = odd_layer(*size)
    out_features, in_features, _, _ = size
    if not native:
        monkeypatch.setattr(library, "load", lambda: None)
    packed = PackedLinear.of_layer(layer)
    assert (packed.native is not None) == native
    packed.bias = nn.Parameter(torch.linspace(-1, 1, out_features))
    weight = layer.dequantize()
    assert torch.equal(packed.dequantize(), weight)
    assert packed.weight.shape == weight.shape == (packed.out_features, packed.in_features)
    assert packed.group_size == in_features // layer.scales.shape[1]
    x = torch.randn(2, 3, in_features, requires_grad=True, generator=torch.Generator().manual_seed(0))
    y = packed(x)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(y, nn.functional.linear(x, weight, packed.bias), **close)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ weight, **close)
    torch.testing.assert_close(packed.bias.grad, upstream.sum((0, 1)), **close)
    other = PackedLinear.of_layer(dataclasses.replace(layer, codes=torch.zeros_like(layer.codes)))
    other.load_state_dict({name: part for name, part in packed.state_dict().items() if name != "bias"})
    assert torch.equal(other.dequantize(), weight)
    moved = copy.deepcopy(packed).to("meta").to_empty(device="cpu")
    moved.load_state_dict(packed.state_dict())
    assert torch.equal(moved(x), y)


def test_a_layer_that_fills_whole_words_is_not_padded():
    layer = odd_layer(64, 96, 3, 32)
    packed = PackedLinear.of_layer(layer)
    assert [tuple(part.shape) for part in packed.in_gptq_order()] == [(9, 64), (3, 6), (3, 64)]
    with pytest.raises(RuntimeError, match=r"\(96, 64, 3\) cannot hold"):
        packed.load_state_dict(PackedLinear.of_layer(odd_layer(64, 72, 3, 24)).state_dict())
