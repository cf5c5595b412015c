"""Gradients through packed layers of the CPU library, and what torch asks of its operators."""

from __future__ import annotations

import pytest
import torch
from cpu_layers import DTYPES, SHAPES, assert_as_good_as_torch, make_layer, make_lora, random_input

from cloq_export.kernels import cpu
from cloq_export.kernels.cpu import linear as kernel
from cloq_export.kernels.cpu import lora as cpu_lora
from cloq_export.kernels.cpu import weight as cpu_weight
from cloq_export.kernels.reference import canonical
from cloq_export.kernels.reference.lora import Adapters

pytestmark = [
    pytest.mark.parametrize("isa", cpu.runnable_isas(), indirect=True),
    pytest.mark.usefixtures("_nan_outputs"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_input_gradients(isa, shape, dtype):
    codes, scales, zeros, q = make_layer(*shape, 3)
    weight = cpu_weight.pack_weight(codes, scales, zeros, 3)
    for leading in [(0,), (1,), (2, 3), (33,), *([(530,)] if shape[0] == 48 else [])]:
        grad = random_input(*leading, shape[0], dtype=dtype)
        result = kernel.cpu_linear_input_grad_op(grad, *weight.operands(), [])
        truth, plain = grad.to(torch.float64) @ q, grad @ q.to(dtype)
        largest = float((grad.to(torch.float64).abs() @ q.abs()).max()) if grad.numel() else 0.0
        assert_as_good_as_torch(result, plain, truth, largest)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_gradient(isa, dtype):
    codes, scales, zeros, _ = make_layer(330, 256, 64, 3)
    w = cpu_weight.pack_weight(codes, scales, zeros, 3)
    grad = random_input(70, 330, dtype=dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(kernel.cpu_linear_input_grad_op(grad, *w.operands(), []))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(isa, dtype):
    codes, scales, zeros, q = make_layer(100, 96, 32, 3)
    weight = cpu_weight.pack_weight(codes, scales, zeros, 3)
    a, b, scaling = make_lora(2, 8, 100, 96, torch.float32)
    lora = cpu_lora.pack_lora(a, b, scaling)
    index = torch.tensor([[0, -1, 1], [1, 1, 0]], dtype=torch.int32)
    x = random_input(2, 3, 96, dtype=dtype).requires_grad_()
    bias = torch.zeros(100, dtype=dtype, requires_grad=True)
    upstream = random_input(2, 3, 100, dtype=dtype, seed=5)
    kernel.lora_linear(x, weight, bias, lora, index).backward(upstream)
    dense = {}
    for wide in (torch.float64, dtype):
        dense_x, dense_bias = (tensor.detach().to(wide).requires_grad_() for tensor in (x, bias))
        pairs = Adapters(a.to(wide), b.to(wide), scaling, index)
        canonical.lora_linear(dense_x, q.to(wide), dense_bias, pairs).backward(upstream.to(wide))
        dense[wide] = (dense_x.grad, dense_bias.grad)
    for ours, plain, truth in zip((x.grad, bias.grad), dense[dtype], dense[torch.float64], strict=True):
        assert_as_good_as_torch(ours, plain, truth, float(truth.abs().max()))
    with pytest.raises(RuntimeError, match="8-bit activations have no gradient"):
        kernel.linear(x, weight, precision="int8")


@pytest.mark.slow
def test_operators_satisfy_the_rules_of_torch(isa):
    if isa != cpu.runnable_isas()[-1]:
        pytest.skip("one instruction set is enough for the registration")
    codes, scales, zeros, _ = make_layer(48, 64, 32, 3)
    w = cpu_weight.pack_weight(codes, scales, zeros, 3)
    lora = cpu_lora.pack_lora(*make_lora(2, 4, 48, 64, torch.float32))
    index = torch.tensor([0, -1], dtype=torch.int32)
    layer = w.operands()
    x = torch.randn(2, 64, requires_grad=True)
    bias = torch.randn(48, requires_grad=True)
    adapters = [lora.a, lora.b, lora.scaling, lora.ranks, lora.ends, index]
    torch.library.opcheck(kernel.cpu_linear_op, (x, *layer, bias, adapters, False))
    torch.library.opcheck(kernel.cpu_linear_op, (x, *layer, None, [], False))
    torch.library.opcheck(kernel.cpu_linear_input_grad_op, (torch.randn(2, 48), *layer, adapters))


@pytest.mark.slow
def test_compiled_layers_compute_and_train(isa):
    if isa != cpu.runnable_isas()[-1]:
        pytest.skip("one instruction set is enough for the registration")
    codes, scales, zeros, _ = make_layer(48, 64, 32, 3)
    weight = cpu_weight.pack_weight(codes, scales, zeros, 3)
    lora = cpu_lora.pack_lora(*make_lora(1, 4, 48, 64, torch.float32))

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(kernel.lora_linear(x, weight, None, lora))

    results = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        x = random_input(3, 64).requires_grad_()
        y = function(x)
        y.sum().backward()
        results.append((y.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_export_holds_the_operator(isa):
    if isa != cpu.runnable_isas()[-1]:
        pytest.skip("one instruction set is enough for the registration")
    codes, scales, zeros, _ = make_layer(48, 64, 32, 3)
    weight = cpu_weight.pack_weight(codes, scales, zeros, 3)

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return kernel.linear(x, weight)

    x = torch.randn(3, 64)
    program = torch.export.export(Layer(), (x,))
    assert "cloq_export.cpu_linear" in str(program.graph)
    assert torch.equal(program.module()(x), kernel.linear(x, weight))
