"""The reference kernel against integers unpacked by hand and against torch in float64."""

from __future__ import annotations

import pytest
import torch

from cloq_export import kernels
from cloq_export.kernels.reference import linear as reference

# (bits, in, out, groups): widths that the layout allows and no power of two, one group, one block, several periods.
CASES = [
    (2, 48, 16, 3),
    (2, 96, 80, 1),
    (3, 96, 32, 3),
    (3, 160, 96, 5),
    (3, 32, 32, 1),
    (4, 40, 24, 5),
    (4, 72, 8, 1),
    (8, 36, 12, 9),
    (8, 20, 4, 1),
]


def random_words(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Return words with every bit random, the sign bit too."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)


def packed_layer(bits, in_features, out_features, groups, seed=0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    scales = (torch.rand(groups, out_features, generator=generator) + 0.1).to(torch.float16)
    return (
        random_words((in_features * bits // 32, out_features), seed),
        random_words((groups, out_features * bits // 32), seed + 1),
        scales,
    )


def bitstream(words: list[int], bits: int) -> list[int]:
    """Unpack a dense little-endian bitstream one code at a time."""
    value = sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words))
    return [(value >> (bits * code)) & (2**bits - 1) for code in range(len(words) * 32 // bits)]


def slow_weight(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Return Q, (out, in) float64, from Python integers."""
    codes = torch.tensor([bitstream(column, bits) for column in qweight.t().tolist()], dtype=torch.float64)
    zeros = torch.tensor([bitstream(row, bits) for row in qzeros.tolist()], dtype=torch.float64).t()
    span = codes.shape[1] // zeros.shape[1]
    wide = scales.t().to(torch.float64).repeat_interleave(span, dim=1)
    return wide * (codes - zeros.repeat_interleave(span, dim=1))


@pytest.fixture(params=[reference.BLOCK_ELEMENTS, 97], ids=["one block", "many blocks"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with the usual block size, and with one that leaves a short last block; unwritten outputs become NaN."""
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", request.param)
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize(("bits", "in_features", "out_features", "groups"), CASES)
def test_codes_and_zeros_unpack_as_a_dense_bitstream(bits, in_features, out_features, groups):
    qweight, qzeros, _ = packed_layer(bits, in_features, out_features, groups)
    codes = kernels.unpack_codes(qweight, bits)
    assert codes.shape == (in_features, out_features)
    assert codes.t().tolist() == [bitstream(column, bits) for column in qweight.t().tolist()]
    zeros = kernels.unpack_zeros(qzeros, bits)
    assert zeros.shape == (groups, out_features)
    assert zeros.tolist() == [bitstream(row, bits) for row in qzeros.tolist()]


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize(("bits", "in_features", "out_features", "groups"), CASES)
def test_dequantize_is_exact(bits, in_features, out_features, groups):
    qweight, qzeros, scales = packed_layer(bits, in_features, out_features, groups)
    weight = kernels.dequantize(qweight, qzeros, scales, bits)
    assert weight.is_contiguous()
    assert weight.dtype == torch.float32
    # A code of at most 8 bits times an 11-bit float16 mantissa fits float32: no rounding at all.
    assert torch.equal(weight.to(torch.float64), slow_weight(qweight, qzeros, scales, bits))


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0, 4), (2, 1, 3)])
@pytest.mark.parametrize(("bits", "in_features", "out_features", "groups"), CASES[::2])
def test_packed_linear_is_no_worse_than_torch(bits, in_features, out_features, groups, leading, dtype):
    qweight, qzeros, scales = packed_layer(bits, in_features, out_features, groups)
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(*leading, in_features, generator=generator).to(dtype)
    bias = torch.randn(out_features, generator=generator).to(dtype)
    weight = slow_weight(qweight, qzeros, scales, bits)
    truth = x.to(torch.float64) @ weight.t() + bias.to(torch.float64)
    result = kernels.packed_linear(x, qweight, qzeros, scales, bits, bias)
    assert result.shape == (*leading, out_features)
    assert result.dtype == dtype
    if not result.numel():
        return
    plain = torch.nn.functional.linear(x, weight.to(dtype), bias)
    error = (result.to(torch.float64) - truth).abs().max()
    # float32 sums may come in another order than torch's: allow a few units in the last place of the largest term.
    slack = 1e-6 * float((x.to(torch.float64).abs() @ weight.t().abs()).max())
    assert error <= 2 * (plain.to(torch.float64) - truth).abs().max() + slack


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize(("bits", "in_features", "out_features", "groups"), CASES)
def test_gradients_match_the_dense_layer(bits, in_features, out_features, groups):
    qweight, qzeros, scales = packed_layer(bits, in_features, out_features, groups)
    x = torch.randn(2, 3, in_features, generator=torch.Generator().manual_seed(1), requires_grad=True)
    bias = torch.zeros(out_features, requires_grad=True)
    dense_x = x.detach().to(torch.float64).requires_grad_()
    dense_bias = bias.detach().to(torch.float64).requires_grad_()
    upstream = torch.randn(2, 3, out_features, generator=torch.Generator().manual_seed(2))

    kernels.packed_linear(x, qweight, qzeros, scales, bits, bias).backward(upstream)
    weight = slow_weight(qweight, qzeros, scales, bits)
    torch.nn.functional.linear(dense_x, weight, dense_bias).backward(upstream.to(torch.float64))
    assert x.grad is not None
    tolerance = 1e-5 * float(dense_x.grad.abs().max())
    torch.testing.assert_close(x.grad.to(torch.float64), dense_x.grad, rtol=1e-5, atol=tolerance)
    torch.testing.assert_close(bias.grad.to(torch.float64), dense_bias.grad, rtol=1e-5, atol=1e-5)


def test_backward_holds_no_activation_and_no_weight():
    qweight, qzeros, scales = packed_layer(4, 64, 64, 2)
    saved: list[torch.Tensor] = []
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        kernels.packed_linear(x, qweight, qzeros, scales, 4, None)
    packed = {tensor.data_ptr() for tensor in (qweight, qzeros, scales)}
    assert saved
    assert {tensor.data_ptr() for tensor in saved} <= packed


def test_autocast_does_not_lower_the_arithmetic():
    qweight, qzeros, scales = packed_layer(2, 96, 80, 3)
    x = torch.randn(4, 96)
    expected = kernels.packed_linear(x, qweight, qzeros, scales, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kernels.packed_linear(x, qweight, qzeros, scales, 2), expected)


def test_operators_satisfy_the_rules_of_torch():
    qweight, qzeros, scales = packed_layer(3, 64, 32, 2)
    x = torch.randn(2, 64, requires_grad=True)
    bias = torch.randn(32, requires_grad=True)
    torch.library.opcheck(kernels.packed_linear_op, (x, qweight, qzeros, scales, 3, bias))
    torch.library.opcheck(kernels.packed_linear_input_grad_op, (torch.randn(2, 32), qweight, qzeros, scales, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": torch.zeros(6, 32, dtype=torch.int64)}, "qweight must be a matrix of torch.int32"),
        ({"qweight": torch.zeros(5, 32, dtype=torch.int32)}, "disagree; allowed are"),
        ({"qzeros": torch.zeros(2, 4, dtype=torch.int32)}, r"qzeros is \(2, 4\); allowed is .* = \(2, 3\) for 32"),
        ({"scales": torch.ones(3, 32)}, "disagree; allowed are"),
        ({"x": torch.zeros(2, 32)}, "the input has 32 channels; this layer takes 64"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(change, message):
    qweight, qzeros, scales = packed_layer(3, 64, 32, 2)
    arguments = {"x": torch.zeros(2, 64), "qweight": qweight, "qzeros": qzeros, "scales": scales, "bits": 3} | change
    with pytest.raises(ValueError, match=message):
        kernels.packed_linear(**arguments)
