"""Correlated inputs, and the slow column-by-column elimination that OPTQ must reproduce."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

# How close, in units of one code, a value must lie to a rounding boundary for float32 to be excused for the other code.
TIE = 1e-4


def draw_inputs(tokens: int, features: int, seed: int = 0) -> np.ndarray:
    """Return X, (tokens, features) float64: a fast decaying spectrum in a random basis, and a few loud channels."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((features, features)))
    spectrum = np.exp(-3.0 * np.arange(features) / features)
    loudness = np.exp(0.6 * rng.standard_normal(features))
    return (rng.standard_normal((tokens, features)) * spectrum) @ basis.T * loudness


@pytest.fixture(scope="session")
def correlated_inputs() -> Callable[..., np.ndarray]:
    return draw_inputs


@pytest.fixture(scope="session")
def correlated_gram() -> Callable[..., torch.Tensor]:
    def gram(features: int, seed: int = 0, fraction: float = 0.01) -> torch.Tensor:
        """Return a damped H, (features, features) float64."""
        inputs = draw_inputs(4 * features + 8, features, seed)
        exact = inputs.T @ inputs
        return torch.from_numpy(exact + fraction * np.trace(exact) / features * np.eye(features))

    return gram


@dataclasses.dataclass(frozen=True)
class Elimination:
    """What the oracle rounded, in which order, and what stood there before rounding (in units of one code)."""

    codes: np.ndarray
    wanted: np.ndarray
    order: list[int]
    max_code: int

    def margins(self) -> np.ndarray:
        """Return the distance of every value to the nearest boundary between two codes."""
        boundaries = np.arange(self.max_code) + 0.5
        return np.abs(self.wanted[..., None] - boundaries).min(-1)

    def assert_equal_up_to_ties(self, codes: torch.Tensor) -> None:
        """Fail unless every row agrees, or parts from the oracle first at a tie (what follows is then another path)."""
        actual, margins = codes.numpy().astype(np.int64), self.margins()
        assert actual.shape == self.codes.shape
        for row in range(actual.shape[0]):
            different = [column for column in self.order if actual[row, column] != self.codes[row, column]]
            if different:
                first = different[0]
                assert margins[row, first] < TIE, (
                    f"row {row} parts from the oracle at column {first}: code {actual[row, first]} against "
                    f"{self.codes[row, first]}, wanted {self.wanted[row, first]:.6f}"
                )
        # Most rows must have no tie at all, or the comparison above says little.
        assert (margins.min(1) > TIE).mean() > 0.5


@pytest.fixture(scope="session")
def eliminate() -> Callable[..., Elimination]:
    def eliminate_columns(
        weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, max_code: int, gram: torch.Tensor
    ) -> Elimination:
        """Round one column at a time by descending diag(H), solving with what remains of H anew at every step."""
        rest, scale, zero, metric = (tensor.double().numpy().copy() for tensor in (weight, scales, zeros, gram))
        columns = rest.shape[1]
        order = sorted(range(columns), key=lambda column: (-metric[column, column], column))
        wanted, codes = np.zeros_like(rest), np.zeros(rest.shape, dtype=np.int64)
        for step, column in enumerate(order):
            left = order[step:]
            # The first row of the inverse.
            inverse = np.linalg.solve(metric[np.ix_(left, left)], np.eye(len(left), 1)[:, 0])
            wanted[:, column] = rest[:, column] / scale[:, column] + zero[:, column]
            codes[:, column] = np.clip(np.rint(wanted[:, column]), 0, max_code)
            error = rest[:, column] - scale[:, column] * (codes[:, column] - zero[:, column])
            rest[:, left] -= np.outer(error, inverse / inverse[0])
        return Elimination(codes, wanted, order, max_code)

    return eliminate_columns
