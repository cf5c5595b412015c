"""Square roots of the Gram matrix: any R with R^T R = H serves Theorem 3.1."""

from __future__ import annotations

import dataclasses

import torch

_RELATIVE_CUTOFF = 1e-12


@dataclasses.dataclass(frozen=True)
class GramRoot:
    """A root R of the Gram matrix, `R^T R = H`, with its (pseudo-)inverse.

    Args:
        matrix: R, (k, in) float64; upper triangular (k = in) or rows scaled eigenvectors (k = rank of H).
        eigenvalues: None for a triangular R; else the k kept eigenvalues of H, (k,) float64.
    """

    matrix: torch.Tensor
    eigenvalues: torch.Tensor | None = None

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """Return `R^-1 M` (triangular) or `R^+ M` (pseudo-inverse), (in, columns), for M (k, columns) float64."""
        if self.eigenvalues is None:
            return torch.linalg.solve_triangular(self.matrix, right, upper=True)
        return self.matrix.t() @ (right / self.eigenvalues.unsqueeze(1))


def cholesky_root(lower: torch.Tensor) -> GramRoot:
    """Return the triangular root `R = L^T` of a positive definite `H = L L^T`; `lower` is (in, in) float64."""
    return GramRoot(lower.t())


def eigen_root(gram: torch.Tensor) -> GramRoot:
    """Return `R = S^(1/2) U^T` over the non-zero eigenvalues of a singular H (CLoQ section 3.1, last remark).

    Args:
        gram: H, (in, in) float64, positive semi-definite.

    Returns:
        GramRoot with the pseudo-inverse: directions that no input uses get no correction.
    """
    values, vectors = torch.linalg.eigh(gram)
    kept = values > values[-1].clamp_min(0.0) * _RELATIVE_CUTOFF * gram.shape[0]
    values, vectors = values[kept], vectors[:, kept]
    return GramRoot(values.sqrt().unsqueeze(1) * vectors.t(), values)
