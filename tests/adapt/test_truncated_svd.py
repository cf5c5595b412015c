"""The truncated decomposition against NumPy's full one, on every path that it may take."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pretended_device import pretended_gpus

from cloq_export.adapt import cloq
from cloq_export.adapt.cloq import TruncatedSvd, split_factors, truncated_svd


def draw(rows: int, columns: int, decay: float, seed: int = 0) -> torch.Tensor:
    """Return a matrix with singular values falling from 1 to exp(-decay)."""
    rng = np.random.default_rng(seed)
    side = min(rows, columns)
    left, _ = np.linalg.qr(rng.standard_normal((rows, side)))
    right, _ = np.linalg.qr(rng.standard_normal((columns, side)))
    return torch.from_numpy(left * np.exp(-decay * np.arange(side) / side) @ right.T)


def decompose(matrix: torch.Tensor, rank: int, path: str, monkeypatch) -> TruncatedSvd:
    if path == "subspace":
        monkeypatch.setattr(cloq, "EXACT_SIDE", 0)
    found = truncated_svd(matrix, rank, "full" if path == "full" else "truncated")
    assert found.method == path
    return found


@pytest.mark.parametrize("path", ["full", "gram", "subspace"])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(90, 60, 8), (60, 90, 1), (60, 90, 59), (40, 40, 40), (1, 9, 1)])
@pytest.mark.parametrize("decay", [0.0, 0.3, 4.0])
def test_it_captures_what_the_full_one_captures(decay, rows, columns, rank, path, monkeypatch) -> None:
    matrix = draw(rows, columns, decay)
    found = decompose(matrix, rank, path, monkeypatch)
    values = np.linalg.svd(matrix.numpy(), compute_uv=False)
    identity = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(found.left.t() @ found.left, identity, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.right.t() @ found.right, identity, rtol=0, atol=1e-8)
    assert bool((found.values.diff() <= 1e-12).all())
    reached = float((matrix - found.left * found.values @ found.right.t()).norm())
    least = float(np.sqrt((values[rank:] ** 2).sum()))
    whole = float(np.sqrt((values**2).sum()))
    assert reached == pytest.approx(found.tail, rel=1e-6, abs=1e-7 * whole)
    assert least - 1e-9 * whole <= reached <= least * (1 + 1e-5) + 1e-7 * whole
    if path == "subspace":
        assert found.residual <= 1e-3
    else:
        np.testing.assert_allclose(found.values.numpy(), values[:rank], rtol=1e-6, atol=1e-9)
        assert found.residual == 0.0


@pytest.mark.parametrize("path", ["full", "gram", "subspace"])
def test_a_rank_beyond_that_of_the_matrix_gives_orthonormal_sides_all_the_same(path, monkeypatch) -> None:
    matrix = draw(30, 5, 1.0) @ draw(5, 24, 1.0, seed=1)
    found = decompose(matrix, 12, path, monkeypatch)
    identity = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(found.left.t() @ found.left, identity, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.right.t() @ found.right, identity, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.left * found.values @ found.right.t(), matrix, rtol=0, atol=1e-9)
    assert found.tail < 1e-7


def test_iterations_that_do_not_settle_give_way_to_the_full_one(monkeypatch) -> None:
    matrix = draw(90, 80, 0.01)
    monkeypatch.setattr(cloq, "EXACT_SIDE", 1)
    monkeypatch.setattr(cloq, "MOST_ITERATIONS", 1)
    found = truncated_svd(matrix, 8)
    assert found.method == "full"
    assert found.residual == 0.0
    np.testing.assert_allclose(found.values.numpy(), np.linalg.svd(matrix.numpy(), compute_uv=False)[:8])


def test_the_same_matrix_gives_the_same_bits(monkeypatch) -> None:
    matrix = draw(70, 50, 2.0)
    for path in ("gram", "subspace"):
        one, other = (decompose(matrix, 6, path, monkeypatch) for _ in range(2))
        assert torch.equal(one.left, other.left)
        assert torch.equal(one.right, other.right)
        torch.rand(3)  # the global generator must not matter


def test_every_split_has_the_same_product() -> None:
    svd = truncated_svd(draw(20, 30, 2.0), 6)
    whole = svd.left * svd.values @ svd.right.t()
    for split in ("paper", "balanced", "transposed"):
        left, right = split_factors(svd, split)
        torch.testing.assert_close(left @ right.t(), whole)
    assert torch.equal(split_factors(svd, "paper")[1], svd.right)
    assert torch.equal(split_factors(svd, "transposed")[0], svd.left)
    left, right = split_factors(svd, "balanced")
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=0))


@pytest.mark.parametrize("decay", [1.0, 12.0])
def test_a_gpu_that_iterates_in_float32_ends_in_float64(decay, monkeypatch) -> None:
    matrix = draw(90, 70, decay)
    dtypes, qr = [], torch.linalg.qr

    def watched(given: torch.Tensor):
        dtypes.append(given.dtype)
        return qr(given)

    monkeypatch.setattr(cloq, "_RESIDUAL_TOLERANCE", 1e-5)
    monkeypatch.setattr(torch.linalg, "qr", watched)
    with pretended_gpus():
        monkeypatch.setattr(cloq, "EXACT_SIDE", 0)
        found = truncated_svd(matrix.to("cuda"), 6)
        values, left = found.values.cpu(), found.left.cpu()
    assert found.method == "subspace"
    assert found.residual <= 1e-5
    # The start and the last step, of two factorisations, are exact ones.
    wide, narrow = dtypes.count(torch.float64), dtypes.count(torch.float32)
    assert wide <= 5
    assert narrow >= 2
    np.testing.assert_allclose(values.numpy(), np.linalg.svd(matrix.numpy(), compute_uv=False)[:6], rtol=1e-8)
    torch.testing.assert_close(left.t() @ left, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)
