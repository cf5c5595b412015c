"""What only a GPU can show: the operators reach Triton's kernels there, repeat their bits, and serve a whole model."""

from __future__ import annotations

import pytest
import torch

from cloq_export import kernels
from cloq_export.engines.packed_linear import PackedLinear
from cloq_export.kernels import dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def packed_layer(bits: int = 3, columns: int = 512, out: int = 384) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)

    groups = columns // 64
    scales = (torch.rand(groups, out, generator=generator) + 0.1).to(torch.float16)
    return words(columns * bits // 32, out), words(groups, out * bits // 32), scales


def test_the_line_about_kernels_names_the_gpu():
    assert dispatch.describe_gpu().startswith("GPU kernels: Triton ")


@pytest.mark.parametrize("tokens", [1, 7, 200])
def test_a_layer_on_the_gpu_agrees_with_the_cpu_and_repeats_its_bits(tokens):
    layer = packed_layer()
    x = torch.randn(tokens, 512, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    expected = kernels.packed_linear(x.float(), *layer, 3)
    moved = [tensor.cuda() for tensor in layer]
    results = [kernels.packed_linear(x.cuda(), *moved, 3) for _ in range(3)]
    assert all(torch.equal(results[0], other) for other in results)
    torch.testing.assert_close(results[0].cpu().float(), expected, rtol=5e-3, atol=5e-3 * float(expected.abs().max()))


def test_training_reaches_the_input_through_a_packed_module():
    layer = packed_layer()
    module = PackedLinear(*layer, bits=3)
    x = torch.randn(4, 100, 512, generator=torch.Generator().manual_seed(1))
    grads = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device).requires_grad_()
        module.to(device)(leaf).square().sum().backward()
        grads.append(leaf.grad.cpu())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-3 * float(grads[0].abs().max()))


def test_a_captured_graph_replays_the_decoding_kernel():
    layer = [tensor.cuda() for tensor in packed_layer()]
    x = torch.randn(1, 512, device="cuda", dtype=torch.float16)
    expected = kernels.packed_linear(x, *layer, 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = kernels.packed_linear(x, *layer, 3)
    result.zero_()
    graph.replay()
    assert torch.equal(result, expected)
