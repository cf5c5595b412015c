"""Triton's packed linears against the torch reference: on a GPU where there is one, else through its interpreter."""

from __future__ import annotations

import pytest
import torch

from cloq_export import kernels
from cloq_export.kernels import dispatch, operators
from cloq_export.kernels.reference import linear as reference
from cloq_export.kernels.reference.lora import Adapters, compute_packed_lora_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not dispatch.has_triton(), reason="Triton exists for Linux only"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SLOW = pytest.mark.slow

# (bits, in, out, groups): no tile divides the outputs, several groups and one, groups of 32, 64, 96 and 128.
CASES = [(2, 192, 80, 3), (3, 96, 96, 3), (3, 256, 64, 2), (4, 128, 40, 1), (8, 96, 12, 1)]
# What the fast tier runs of the products, by bits: the interpreter takes its time.
FAST = {
    2: [(torch.float16, 1), (torch.float16, 5)],
    3: [(torch.float32, 1), (torch.bfloat16, 1)],
    4: [(torch.bfloat16, 1)],
    8: [(torch.float32, 5)],
}


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels take CPU tensors under the interpreter; outputs that nobody writes are NaN."""
    from cloq_export.kernels.triton import dequantize, linear_kernels

    monkeypatch.setattr(dispatch, "TRITON_DEVICES", {DEVICE})
    for kernel in (dequantize._dequantize, linear_kernels.vector_product, linear_kernels.matrix_product):
        # Any shape must give right results; trying all would compile for minutes on a GPU.
        monkeypatch.setattr(kernel, "configs", kernel.configs[:1])
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def packed_layer(bits: int, in_features: int, out_features: int, groups: int) -> tuple[torch.Tensor, ...]:
    """Return qweight, qzeros and scales with every bit random, the sign bit too."""
    generator = torch.Generator().manual_seed(bits + in_features)

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)

    scales = (torch.rand(groups, out_features, generator=generator) + 0.1).to(torch.float16)
    layer = (words(in_features * bits // 32, out_features), words(groups, out_features * bits // 32), scales)
    return tuple(tensor.to(DEVICE) for tensor in layer)


def random_tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def assert_no_worse_than_torch(result: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, truth: torch.Tensor):
    """Hold the error under twice that of torch in the dtype of x, both against float64."""
    plain = torch.nn.functional.linear(x, weight.to(x.dtype)).to(torch.float64)
    worst = (plain - x.to(torch.float64) @ weight.to(torch.float64).t()).abs().max()
    # float32 sums in another order: a few units in the last place of the largest sum of terms.
    slack = 1e-6 * (x.to(torch.float64).abs() @ weight.to(torch.float64).abs().t()).max()
    rounding = torch.finfo(x.dtype).eps * truth.abs().max()
    assert (result.to(torch.float64) - truth).abs().max() <= 2 * worst + slack + rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "in_features", "out_features", "groups"), CASES)
def test_dequantize_is_the_reference_rounded_once(bits, in_features, out_features, groups, dtype):
    from cloq_export.kernels.triton.dequantize import dequantize

    layer = packed_layer(bits, in_features, out_features, groups)
    expected = reference.dequantize(*layer, bits)
    result = dequantize(*layer, bits, dtype)
    assert result.is_contiguous()
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        # Triton's interpreter cuts bfloat16 off where a GPU rounds: one unit in the last place.
        torch.testing.assert_close(result.float(), expected, rtol=2**-7, atol=0.0)
    else:
        assert torch.equal(result, expected.to(dtype))
    if dtype == torch.float32:
        assert torch.equal(kernels.dequantize(*layer, bits), expected)


@pytest.mark.parametrize(
    ("case", "dtype", "tokens"),
    [
        pytest.param(case, dtype, tokens, marks=() if (dtype, tokens) in FAST[case[0]] else SLOW)
        for case in CASES
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for tokens in (1, 5)
    ],
)
def test_few_tokens_are_no_worse_than_torch(case, dtype, tokens):
    bits, in_features, out_features, groups = case
    layer = packed_layer(bits, in_features, out_features, groups)
    x, bias = random_tensor(tokens, in_features, dtype=dtype), random_tensor(out_features, seed=1)
    weight = reference.dequantize(*layer, bits)
    truth = x.to(torch.float64) @ weight.to(torch.float64).t() + bias.to(torch.float64)
    result = operators.packed_linear_on_gpu(x, *layer, bits, bias)
    assert result.dtype == dtype
    assert_no_worse_than_torch(result, x, weight, truth)


@pytest.mark.parametrize("splits", [pytest.param(1, marks=SLOW), 3, pytest.param(8, marks=SLOW)])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("bits", [2, pytest.param(3, marks=SLOW)])
def test_any_split_of_the_inputs_gives_the_same_sums(bits, tokens, splits):
    from cloq_export.kernels.triton.linear import lora_linear

    layer = packed_layer(bits, 160, 32, 5)
    x, bias = random_tensor(tokens, 160), random_tensor(32, seed=1)
    expected = reference.compute_packed_linear(x, *layer, bits, bias)
    results = [lora_linear(x, layer, bits, bias, splits=splits) for _ in range(2)]
    torch.testing.assert_close(results[0], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(*results)


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "most"), [(17, 64), (64, 64), (65, 64), (0, 64)])
@pytest.mark.parametrize(("bits", "in_features", "out_features", "groups"), CASES[1:4])
def test_many_tokens_and_blocks(bits, in_features, out_features, groups, tokens, most, monkeypatch):
    monkeypatch.setattr(operators, "BLOCK_ELEMENTS", 1000)
    layer = packed_layer(bits, in_features, out_features, groups)
    x, bias = random_tensor(2, tokens, in_features)[:1], random_tensor(out_features, seed=1)
    result = operators.packed_linear_on_gpu(x, *layer, bits, bias)
    assert result.shape == (1, tokens, out_features)
    expected = reference.compute_packed_linear(x, *layer, bits, bias)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5 * float(1 + expected.abs().sum()))
    grad = random_tensor(1, tokens, out_features, seed=2)
    back = operators.packed_linear_input_grad_on_gpu(grad, *layer, bits)
    expected = reference.compute_packed_linear_input_grad(grad, *layer, bits)
    torch.testing.assert_close(back, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("block", [1 << 25, 1000])
@pytest.mark.parametrize(("bits", "in_features", "out_features", "groups"), CASES)
def test_gradients_match_the_reference_in_any_blocks(bits, in_features, out_features, groups, block, monkeypatch):
    monkeypatch.setattr(operators, "BLOCK_ELEMENTS", block)
    layer = packed_layer(bits, in_features, out_features, groups)
    grad = random_tensor(3, out_features)
    result = operators.packed_linear_input_grad_on_gpu(grad, *layer, bits)
    expected = reference.compute_packed_linear_input_grad(grad, *layer, bits)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=SLOW), torch.float16])
@pytest.mark.parametrize(
    ("tokens", "index"),
    [
        pytest.param(1, None, marks=SLOW),
        (1, [1]),
        pytest.param(1, [-1], marks=SLOW),
        pytest.param(5, None, marks=SLOW),
        (5, [0, -1, 2, 2, 0]),
        pytest.param(5, [-1] * 5, marks=SLOW),
        pytest.param(1, [7], marks=SLOW),
    ],
)
def test_every_token_gets_its_own_adapter(tokens, index, dtype):
    bits, in_features, out_features, adapters, rank = 2, 96, 48, 3, 20
    layer = packed_layer(bits, in_features, out_features, 3)
    x, bias = random_tensor(tokens, in_features, dtype=dtype), random_tensor(out_features, seed=1)
    lora_a = random_tensor(adapters, rank, in_features, dtype=torch.bfloat16, seed=2)
    lora_b = random_tensor(adapters, out_features, rank, dtype=torch.bfloat16, seed=3)
    scaling = torch.tensor([0.5, 1.0, 2.0], device=DEVICE)
    which = None if index is None else torch.tensor(index, dtype=torch.int32, device=DEVICE)
    adapted = (x, layer, bits, bias, Adapters(lora_a, lora_b, scaling, which).operands())
    expected = compute_packed_lora_linear(x.to(torch.float64).float(), *adapted[1:])
    result = operators.packed_lora_linear_on_gpu(*adapted)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(result.float(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert torch.equal(result, operators.packed_lora_linear_on_gpu(*adapted))


def test_groups_that_are_no_multiple_of_32_go_to_the_reference():
    layer = packed_layer(2, 48, 16, 3)
    x = random_tensor(2, 48)
    assert torch.equal(
        operators.packed_linear_on_gpu(x, *layer, 2, None), reference.compute_packed_linear(x, *layer, 2, None)
    )
    assert torch.equal(kernels.dequantize(*layer, 2), reference.dequantize(*layer, 2))


def test_tensors_of_no_gpu_are_left_to_the_reference(monkeypatch):
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", {"cuda"})
    assert not dispatch.triton_takes(torch.zeros(2))
    fake = torch._subclasses.FakeTensorMode()
    with fake:
        assert not dispatch.triton_takes(torch.zeros(2, device="cuda"))


def test_an_operator_takes_fake_tensors_of_a_gpu():
    with torch._subclasses.FakeTensorMode():
        qweight = torch.zeros(12, 80, dtype=torch.int32, device="cuda")
        qzeros = torch.zeros(3, 5, dtype=torch.int32, device="cuda")
        scales = torch.zeros(3, 80, dtype=torch.float16, device="cuda")
        x = torch.zeros(2, 7, 192, dtype=torch.bfloat16, device="cuda")
        y = kernels.packed_linear(x, qweight, qzeros, scales, 2)
        assert (y.shape, y.dtype, y.device.type) == ((2, 7, 80), torch.bfloat16, "cuda")
        grad = kernels.packed_linear_input_grad_op(y, qweight, qzeros, scales, 2)
        assert (grad.shape, grad.dtype, grad.device.type) == (x.shape, x.dtype, "cuda")
