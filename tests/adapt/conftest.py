"""A layer, its coarsely rounded form and correlated inputs: what CLoQ repairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from cloq_export.types import LoraPair


@dataclasses.dataclass(frozen=True)
class Layer:
    """W and Q, (out, in) float64, and inputs X, (tokens, in) float64."""

    weight: torch.Tensor
    quantized: torch.Tensor
    inputs: torch.Tensor

    @property
    def residual(self) -> torch.Tensor:
        return self.weight - self.quantized

    @property
    def gram(self) -> torch.Tensor:
        return self.inputs.t() @ self.inputs

    def error(self, correction: torch.Tensor) -> float:
        """Return `||X (W - Q - correction)^T||_F`, from the tokens themselves."""
        return float((self.inputs @ (self.residual - correction).t()).norm())

    def least_error(self, rank: int) -> float:
        """Return the Eckart-Young bound from the singular values of `X (W - Q)^T`, which needs neither H nor R."""
        values = np.linalg.svd((self.inputs @ self.residual.t()).numpy(), compute_uv=False)
        return float(np.sqrt((values[rank:] ** 2).sum()))


@pytest.fixture(scope="session")
def layer() -> Callable[..., Layer]:
    def draw(out_features: int, in_features: int, tokens: int = 0, seed: int = 0) -> Layer:
        """Draw a layer; fewer tokens than inputs make H singular, 0 takes plenty."""
        rng = np.random.default_rng(seed)
        basis, _ = np.linalg.qr(rng.standard_normal((in_features, in_features)))
        spectrum = np.exp(-3.0 * np.arange(in_features) / in_features)
        loudness = np.exp(0.6 * rng.standard_normal(in_features))
        inputs = (rng.standard_normal((tokens or 4 * in_features, in_features)) * spectrum) @ basis.T * loudness
        weight = rng.standard_normal((out_features, in_features))
        return Layer(torch.from_numpy(weight), torch.from_numpy(np.rint(weight / 1.5) * 1.5), torch.from_numpy(inputs))

    return draw


@pytest.fixture(scope="session")
def correction() -> Callable[[LoraPair], torch.Tensor]:
    def multiply(pair: LoraPair) -> torch.Tensor:
        """Return what a runtime adds to Q, `(alpha / rank) B A`, (out, in) float64."""
        return pair.alpha / pair.rank * pair.lora_B.double() @ pair.lora_A.double()

    return multiply
