"""Triton's kernels of calibration and quantization against the torch code that they stand in for."""

from __future__ import annotations

import pytest
import torch

from cloq_export.calibrate.gram import GramAccumulator
from cloq_export.kernels import dispatch
from cloq_export.quantize.grid import fit_grid
from cloq_export.quantize.magr import reduce_magnitude, shrink_infinity_norm
from cloq_export.quantize.optq import optq_codes
from cloq_export.types import QuantSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not dispatch.has_triton(), reason="Triton exists for Linux only"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill outputs with NaN before anybody writes them."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(tensor):
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poisoned(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poisoned(empty_like(*args, **kwargs)))


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch):
    """Return a function that computes with Triton, under the interpreter without a GPU."""

    def compute(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "TRITON_DEVICES", {DEVICE})
            return function(*args, **kwargs)

    return compute


def correlated(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    return torch.randn(rows, columns, generator=generator) @ (mix + torch.eye(columns))


def damped_gram(columns: int) -> torch.Tensor:
    x = correlated(3 * columns, columns).to(torch.float64)
    gram = x.T @ x
    return gram + 0.01 * gram.diagonal().mean() * torch.eye(columns, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(37, 40), (5, 8), (70, 64)])
def test_gram_sums_exact_products_above_the_diagonal(tokens, width, dtype):
    from cloq_export.kernels.triton.gram import add_gram

    x = correlated(tokens, width).to(dtype).to(DEVICE)
    before = torch.full((width, width), torch.nan, device=DEVICE).tril(-1) + torch.ones(width, width, device=DEVICE)
    gram = before.clone()
    add_gram(gram, x)
    exact = x.to(torch.float64).T @ x.to(torch.float64) + 1.0
    upper = torch.ones(width, width, dtype=torch.bool, device=DEVICE).triu()
    torch.testing.assert_close(gram[upper].double(), exact[upper], rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
    assert bool(torch.isnan(gram[~upper]).all())


@pytest.mark.parametrize("drift", [False, True])
def test_an_accumulator_gives_the_same_statistics(on_kernels, drift):
    width = 24
    batches = [correlated(19, width, seed).to(torch.bfloat16).view(1, 19, width).to(DEVICE) for seed in range(3)]
    # Tokens of their own: a multiple of the inputs would make D symmetric, and hide that it is transposed.
    floats = [correlated(19, width, 10 + seed).to(torch.bfloat16).view(1, 19, width).to(DEVICE) for seed in range(3)]

    def collect(device):
        accumulator = GramAccumulator(width, drift=drift, device=device)
        for batch, target in zip(batches, floats, strict=True):
            accumulator.add(batch.to(device), target.to(device) if drift else None)
        return accumulator.stats()

    expected, found = collect("cpu"), on_kernels(collect, DEVICE)
    assert found.tokens == expected.tokens == 57
    torch.testing.assert_close(found.gram.cpu(), expected.gram, rtol=1e-5, atol=1e-4)
    assert torch.equal(found.gram, found.gram.T)
    if drift:
        x, f = (torch.cat(parts).view(-1, width).to("cpu", torch.float64) for parts in (batches, floats))
        exact = x.T @ (f - x)
        # D may be multiplied in bfloat16, which is what the layers themselves do on some machines.
        plain = x.to(torch.bfloat16).T @ (f - x).to(torch.bfloat16)
        allowed = float((plain.to(torch.float64) - exact).square().mean().sqrt())
        for drift_sum in (found.drift, expected.drift):
            assert float((drift_sum.cpu().to(torch.float64) - exact).square().mean().sqrt()) <= 2 * allowed
        assert float((exact - exact.T).abs().max()) > 0.1 * float(exact.abs().max())


@pytest.mark.parametrize(
    ("bits", "rows", "columns"), [(2, 37, 48), pytest.param(3, 8, 136, marks=pytest.mark.slow), (4, 33, 20)]
)
def test_the_walk_gives_the_same_codes(on_kernels, bits, rows, columns):
    weight, gram = correlated(rows, columns, 3), damped_gram(columns)
    spec = QuantSpec(bits, -1)
    scales, zeros = (tensor.to(torch.float32).repeat_interleave(columns, dim=1) for tensor in fit_grid(weight, spec))
    expected = optq_codes(weight, scales, zeros, spec.max_code, gram)
    moved = [tensor.to(DEVICE) for tensor in (weight, scales, zeros)]
    found = on_kernels(optq_codes, *moved, spec.max_code, gram.to(DEVICE))
    assert found.dtype == torch.uint8
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "rows", "columns", "group"), [(2, 13, 96, 32), (3, 5, 120, 24), (4, 3, 50, -1)])
def test_the_search_gives_the_same_grid(on_kernels, bits, rows, columns, group, symmetric):
    weight, spec = correlated(rows, columns, 4), QuantSpec(bits, group, symmetric)
    scales, zeros = fit_grid(weight, spec)
    found = on_kernels(fit_grid, weight.to(DEVICE), spec)
    assert (found[0].dtype, found[1].dtype) == (torch.float16, torch.uint8)
    assert torch.equal(found[0].cpu(), scales)
    assert torch.equal(found[1].cpu(), zeros)


def test_the_search_takes_groups_of_zeros_and_huge_weights(on_kernels):
    weight = torch.zeros(4, 64)
    weight[1, 3], weight[2, :] = 6e4, -3e-8
    spec = QuantSpec(2, 32)
    expected, found = fit_grid(weight, spec), on_kernels(fit_grid, weight.to(DEVICE), spec)
    assert all(torch.equal(one, other.cpu()) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("amount", [0.0, 0.3, 1e4])
@pytest.mark.parametrize(("rows", "span"), [(9, 24), (3, 70)])
def test_the_proximal_map_is_the_same(on_kernels, rows, span, amount):
    groups = correlated(rows, span, 5)
    expected = shrink_infinity_norm(groups, amount)
    found = on_kernels(shrink_infinity_norm, groups.to(DEVICE), amount)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_magr_ends_at_the_same_weight(on_kernels):
    weight, gram = correlated(2, 16, 6), damped_gram(16)
    expected = reduce_magnitude(weight, gram, 8, 1e-2)
    found = on_kernels(reduce_magnitude, weight.to(DEVICE), gram.to(DEVICE), 8, 1e-2)
    assert (found.iterations, found.converged) == (expected.iterations, expected.converged)
    torch.testing.assert_close(found.weight.cpu(), expected.weight, rtol=1e-4, atol=1e-5)
