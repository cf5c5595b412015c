"""Make a Gram matrix safe to factorise, and say what that took."""

from __future__ import annotations

import dataclasses

import torch

from cloq_export.errors import SingularStatsError

_GROWTH = 10.0
_ATTEMPTS = 6
_POWER_ITERATIONS = 8
SUBSPACE, SUBSPACE_ITERATIONS = 6, 8
_LARGEST_CONDITION = 1e12
# Damping from which on the condition number is at most in / _SAFE_FRACTION.
_SAFE_FRACTION = 1e-6


@dataclasses.dataclass(frozen=True)
class DampedGram:
    """A Gram matrix made safe to factorise: `H + damping * I`.

    Args:
        gram: the damped matrix, (in, in) float64.
        lower: its Cholesky factor L, `L L^T = H + damping * I`, (in, in) float64.
        damping: what was added to the diagonal.
        increases: how often damping had to be raised tenfold before the factorisation succeeded.
    """

    gram: torch.Tensor
    lower: torch.Tensor
    damping: float
    increases: int

    @property
    def lower_float32(self) -> torch.Tensor:
        """Return L in float32, for everything that only has to be as good as the weights; it is made for each call."""
        return self.lower.to(torch.float32)

    def weighted(self, error: torch.Tensor) -> torch.Tensor:
        """Return `E L`, (out, in) float32, for an error E (out, in); its norms are those of `E R^T`, `R^T R = H`."""
        return error.to(torch.float32) @ self.lower_float32

    def condition(self) -> float:
        """Return the 2-norm condition number of the damped H, estimated by power and inverse power iteration."""
        generator = torch.Generator().manual_seed(0)
        largest = torch.randn(self.gram.shape[0], 1, generator=generator).to(self.gram.device)
        smallest, gram, lower = largest, self.gram.to(torch.float32), self.lower_float32
        for _ in range(_POWER_ITERATIONS):
            largest = gram @ (largest / largest.norm())
            smallest = torch.cholesky_solve(smallest / smallest.norm(), lower)
        return float(largest.norm()) * float(smallest.norm())


def spectral_norm(matrix: torch.Tensor) -> float:
    """Return the largest singular value of a matrix by subspace iteration from a fixed start.

    Args:
        matrix: (m, n) float32.

    Returns:
        float: never above the largest singular value, and where the next ones are close to it a few percent below.
    """
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(matrix.shape[1], min(SUBSPACE, *matrix.shape), generator=generator).to(matrix.device)
    for _ in range(SUBSPACE_ITERATIONS):
        vectors = torch.linalg.qr(matrix.T @ (matrix @ vectors)).Q
    return float(torch.linalg.matrix_norm(matrix @ vectors, ord=2))


def damp_gram(gram: torch.Tensor, fraction: float, dtype: torch.dtype = torch.float64) -> DampedGram:
    """Return `H + lambda * I` with its Cholesky factor, `lambda = fraction * tr(H) / in` (CLoQ section 3.1).

    Damping is raised tenfold, and the rise counted, while the matrix does not factorise or is singular to working
    precision.

    Args:
        gram: H, (in, in) float, symmetric positive semi-definite.
        fraction: damping relative to the mean of the diagonal; 0 asks for none.
        dtype: of the factorisation.

    Returns:
        DampedGram on the device of `gram`.

    Raises:
        SingularStatsError: H is all zero, or does not factorise even when damped by its own diagonal.
    """
    exact = gram.to(dtype)
    mean = float(exact.diagonal().mean())
    if mean <= 0.0:
        raise SingularStatsError(
            "the Gram matrix is all zero: no calibration token reached this layer; calibrate on more text."
        )
    relative = fraction
    for attempt in range(_ATTEMPTS + 1):
        relative = fraction if attempt == 0 else max(fraction, _SAFE_FRACTION) * _GROWTH**attempt
        damped = exact.clone()
        damped.diagonal().add_(relative * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info):
            continue
        candidate = DampedGram(damped, lower, relative * mean, attempt)
        # With almost no damping rounding may let a singular matrix factorise: its condition number shows that.
        if relative >= _SAFE_FRACTION or candidate.condition() < _LARGEST_CONDITION:
            return candidate
    raise SingularStatsError(
        f"the Gram matrix does not factorise with damping up to {relative:g} of its mean diagonal; it is not positive "
        "semi-definite. Collect it in float32 (`precision=float32`), or raise `damping`."
    )


def effective_rank(gram: torch.Tensor) -> float:
    """Return the participation ratio of the eigenvalues of H, `tr(H)^2 / ||H||_F^2`, between 1 and `in`."""
    squares = float(gram.square().sum(dtype=torch.float64))
    return float(gram.diagonal().sum(dtype=torch.float64)) ** 2 / squares if squares > 0.0 else 0.0
