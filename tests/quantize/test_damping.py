"""Damping is what the paper says, rises only where it must, and every rise is counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cloq_export.errors import SingularStatsError
from cloq_export.quantize import QuantizeOptions, damp_gram, effective_rank, quantize_group, spectral_norm
from cloq_export.types import QuantSpec


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_damping_is_a_share_of_the_mean_diagonal(fraction, dtype, correlated_inputs) -> None:
    inputs = correlated_inputs(200, 24)
    gram = torch.from_numpy(inputs.T @ inputs).to(dtype)
    damped = damp_gram(gram, fraction)
    expected = fraction * float(gram.double().trace()) / 24
    assert damped.damping == pytest.approx(expected, rel=1e-12)
    assert damped.increases == 0
    assert damped.gram.dtype == damped.lower.dtype == torch.float64
    torch.testing.assert_close(damped.gram, gram.double() + expected * torch.eye(24, dtype=torch.float64))
    torch.testing.assert_close(damped.lower @ damped.lower.t(), damped.gram)
    assert torch.equal(damped.lower, damped.lower.tril())


def test_an_indefinite_gram_is_damped_tenfold_until_it_factorises(correlated_inputs) -> None:
    inputs = correlated_inputs(200, 24)
    exact = inputs.T @ inputs
    values, vectors = np.linalg.eigh(exact)
    for depth, increases in ((0.05, 1), (0.5, 2), (5.0, 3)):
        # The smallest eigenvalue stands `depth` mean diagonals under zero, and the mean diagonal is kept.
        bent = values.copy()
        bent[0] = -depth * values.mean()
        bent[-1] += values[0] - bent[0]
        damped = damp_gram(torch.from_numpy((vectors * bent) @ vectors.T), 0.01)
        assert damped.increases == increases
        assert damped.damping == pytest.approx(0.01 * 10**increases * values.mean(), rel=1e-9)


@pytest.mark.parametrize("kind", ["fewer tokens than inputs", "one token too few", "a repeated input", "a dead input"])
def test_a_singular_gram_without_damping_never_passes_by_luck(kind) -> None:
    """A zero pivot comes out as plus or minus a rounding error; half of these factorise if nobody looks closer."""
    columns = 48
    for seed in range(25):
        generator = torch.Generator().manual_seed(seed)
        tokens = {"fewer tokens than inputs": 20, "one token too few": columns - 1}.get(kind, 100)
        inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
        if kind == "a repeated input":
            inputs[:, 7] = inputs[:, 3]
        if kind == "a dead input":
            inputs[:, 7] = 0.0
        damped = damp_gram(inputs.t() @ inputs, 0.0)
        assert damped.increases >= 1
        assert damped.damping > 0
        weight = torch.randn(2, columns, generator=generator)
        quantize_group([weight], QuantSpec(4, 16), damped, QuantizeOptions())


def test_a_gram_that_is_all_zero_is_refused() -> None:
    with pytest.raises(
        SingularStatsError,
        match=r"the Gram matrix is all zero: no calibration token reached this layer; calibrate on more text\.",
    ):
        damp_gram(torch.zeros(8, 8), 0.01)


def test_a_gram_that_no_damping_mends_is_refused() -> None:
    gram = torch.diag(torch.tensor([1e9, 1.0, -0.999e9 - 1.0, 1.0], dtype=torch.float64))
    gram[1, 2] = gram[2, 1] = 1e14
    with pytest.raises(
        SingularStatsError, match=r"does not factorise with damping up to 10000 of its mean diagonal; .*raise"
    ):
        damp_gram(gram, 0.01)


def test_the_norm_is_the_error_on_the_tokens(correlated_inputs) -> None:
    inputs = correlated_inputs(150, 20)
    error = torch.randn(7, 20, generator=torch.Generator().manual_seed(0))
    damped = damp_gram(torch.from_numpy(inputs.T @ inputs), 0.0)
    assert float(damped.weighted(error).norm()) == pytest.approx(
        np.linalg.norm(inputs @ error.double().numpy().T), rel=1e-5
    )
    regularised = damp_gram(torch.from_numpy(inputs.T @ inputs), 0.1)
    expected = np.linalg.norm(inputs @ error.double().numpy().T) ** 2 + regularised.damping * float(error.norm()) ** 2
    assert float(regularised.weighted(error).norm()) ** 2 == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("features", [1, 2, 40, 130])
def test_the_condition_number_is_about_right(features, correlated_gram) -> None:
    damped = damp_gram(correlated_gram(features, fraction=0.0), 0.01)
    exact = np.linalg.cond(damped.gram.numpy())
    # The power iterations run in float32.
    assert 0.6 * exact <= damped.condition() <= exact * (1 + 1e-6)
    assert damped.condition() == damped.condition()


def test_the_effective_rank_counts_directions(correlated_inputs) -> None:
    assert effective_rank(torch.eye(12)) == pytest.approx(12)
    one = torch.arange(1.0, 13.0).unsqueeze(1)
    assert effective_rank(one @ one.t()) == pytest.approx(1)
    assert effective_rank(torch.zeros(4, 4)) == 0.0
    inputs = correlated_inputs(100, 30)
    values = np.linalg.svd(inputs, compute_uv=False) ** 2
    expected = values.sum() ** 2 / (values**2).sum()
    assert effective_rank(torch.from_numpy(inputs.T @ inputs)) == pytest.approx(expected)
    assert effective_rank(torch.from_numpy(inputs.T @ inputs).float()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shape", [(1, 7), (40, 3), (96, 64)])
def test_the_spectral_norm_is_the_largest_singular_value(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    # Correlated columns: singular values fall slowly, as those of a layer's error do.
    mixing = torch.randn(shape[1], shape[1], generator=generator) / shape[1] ** 0.5 + torch.eye(shape[1])
    matrix = torch.randn(*shape, generator=generator) @ mixing
    largest = float(torch.linalg.svdvals(matrix.double())[0])
    assert 0.97 * largest <= spectral_norm(matrix) <= largest * (1 + 1e-5)
    assert spectral_norm(torch.zeros(shape)) == 0.0
