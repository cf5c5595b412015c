"""Roots of H: their square is H, their inverse undoes them, and a singular H keeps its null space out."""

from __future__ import annotations

import pytest
import torch

from cloq_export.adapt import cholesky_root, eigen_root


@pytest.mark.parametrize("in_features", [1, 2, 40])
@pytest.mark.parametrize("kind", ["cholesky", "eigen"])
def test_the_square_is_h_and_solve_inverts(kind, in_features, layer) -> None:
    gram = layer(3, in_features).gram
    root = cholesky_root(torch.linalg.cholesky(gram)) if kind == "cholesky" else eigen_root(gram)
    torch.testing.assert_close(root.matrix.t() @ root.matrix, gram)
    right = torch.randn(in_features, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(root.solve(root.matrix @ right), right)
    torch.testing.assert_close(root.solve(right), torch.linalg.inv(root.matrix) @ right)


def test_a_singular_h_gets_its_pseudo_inverse(layer) -> None:
    drawn = layer(3, 40, tokens=15)
    drawn.inputs[:, 7] = 0.0
    root = eigen_root(drawn.gram)
    assert root.matrix.shape == (15, 40)
    torch.testing.assert_close(root.matrix.t() @ root.matrix, drawn.gram)
    right = torch.randn(15, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(root.solve(right), torch.linalg.pinv(root.matrix) @ right)
    assert float(root.solve(right)[7].abs().max()) < 1e-12


def test_directions_of_rounding_noise_are_no_directions(layer) -> None:
    drawn = layer(3, 40)
    drawn.inputs[:, 5] = drawn.inputs[:, 9] - 2.0 * drawn.inputs[:, 1]
    assert eigen_root(drawn.gram).matrix.shape == (39, 40)
    assert eigen_root(1e30 * drawn.gram).matrix.shape == (39, 40)
    assert eigen_root(1e-30 * drawn.gram).matrix.shape == (39, 40)


def test_an_h_of_zero_has_an_empty_root() -> None:
    assert eigen_root(torch.zeros(6, 6, dtype=torch.float64)).matrix.shape == (0, 6)
