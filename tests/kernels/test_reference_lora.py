"""The reference of a packed linear with adapters: dense arithmetic in float64, gradients, torch's rules, refusals."""

from __future__ import annotations

import pytest
import torch

from cloq_export import kernels


def layer_and_adapters() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "qweight": torch.randint(-(2**31), 2**31, (6, 32), generator=generator, dtype=torch.int64).to(torch.int32),
        "qzeros": torch.randint(-(2**31), 2**31, (2, 3), generator=generator, dtype=torch.int64).to(torch.int32),
        "scales": torch.rand(2, 32, generator=generator) + 0.1,
        "bias": torch.randn(32, generator=generator),
        "lora_a": torch.randn(2, 5, 64, generator=generator),
        "lora_b": torch.randn(2, 32, 5, generator=generator),
        "scaling": torch.tensor([0.5, 2.0]),
        "index": torch.tensor([[1, -1, 0], [0, 1, 1]], dtype=torch.int32),
    }


def compute(x: torch.Tensor, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    layer = [parts[name] for name in ("qweight", "qzeros", "scales")]
    adapters = kernels.Adapters(*(parts[name] for name in ("lora_a", "lora_b", "scaling", "index")))
    return kernels.packed_lora_linear(x, layer, 3, parts["bias"], adapters)


def test_every_token_meets_its_own_merged_weight_and_so_do_gradients():
    parts = layer_and_adapters()
    x = torch.randn(2, 3, 64, requires_grad=True, generator=torch.Generator().manual_seed(1))
    parts["bias"].requires_grad_()
    y = compute(x, parts)
    upstream = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(2))
    y.backward(upstream)
    weight = kernels.dequantize(parts["qweight"], parts["qzeros"], parts["scales"], 3).to(torch.float64)
    for place, adapter in [((i, j), int(parts["index"][i, j])) for i in range(2) for j in range(3)]:
        merged = weight
        if adapter >= 0:
            product = parts["lora_b"][adapter].double() @ parts["lora_a"][adapter].double()
            merged = weight + product * float(parts["scaling"][adapter])
        expected = merged @ x[place].double() + parts["bias"].double()
        torch.testing.assert_close(y[place].double(), expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(x.grad[place].double(), upstream[place].double() @ merged, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(parts["bias"].grad, upstream.sum((0, 1)))


def test_the_operator_satisfies_the_rules_of_torch():
    parts = layer_and_adapters()
    x = torch.randn(2, 3, 64, requires_grad=True)
    layer = [parts[name] for name in ("qweight", "qzeros", "scales")]
    adapters = [parts[name] for name in ("lora_a", "lora_b", "scaling", "index")]
    torch.library.opcheck(kernels.packed_lora_linear_op, (x, layer, 3, None, adapters))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_a": torch.zeros(2, 5, 32)}, r"A \(2, 5, 32\) .* takes \(adapters, rank, 64\)"),
        ({"lora_b": torch.zeros(3, 32, 5)}, r"B \(3, 32, 5\)"),
        ({"scaling": torch.ones(3)}, r"scaling is \(3,\) torch.float32; allowed is \(2,\)"),
        ({"index": torch.zeros(2, 3, dtype=torch.int64)}, r"index is \(2, 3\) torch.int64; allowed is \(2, 3\)"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        compute(torch.zeros(2, 3, 64), layer_and_adapters() | change)
