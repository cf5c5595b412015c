"""The pair of the weight error alone: what the singular value decomposition leaves, and what is refused."""

from __future__ import annotations

import pytest
import torch

from cloq_export.adapt import init_svd
from cloq_export.errors import ShapeError


def a_weight(out_features: int, in_features: int) -> torch.Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))


def test_the_svd_is_the_best_pair_evenly_split() -> None:
    weight = a_weight(20, 16)
    quantized = weight.round()
    pair = init_svd(weight, quantized, 5, dtype=torch.float32)
    values = torch.linalg.svdvals((weight - quantized).double())
    error = (weight - quantized - pair.product()).double().norm()
    torch.testing.assert_close(error, values[5:].square().sum().sqrt(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pair.lora_A.norm(dim=1), pair.lora_B.norm(dim=0))


def test_ranks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match="rank 17 does not fit W"):
        init_svd(a_weight(20, 16), a_weight(20, 16), 17)
