"""The error-aware target against least squares on actual streams: what maps the changed input to the old output."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cloq_export.quantize import damp_gram, error_aware_target
from cloq_export.types import LayerStats

IN, OUT, TOKENS = 24, 10, 400


@pytest.fixture
def streams(correlated_inputs):
    """Return (float inputs F, changed inputs X, W, token weights), float64 numpy."""
    rng = np.random.default_rng(0)
    clean = correlated_inputs(TOKENS, IN)
    changed = clean @ (np.eye(IN) + 0.1 * rng.standard_normal((IN, IN))) + 0.1 * rng.standard_normal((TOKENS, IN))
    return clean, changed, rng.standard_normal((OUT, IN)), rng.random(TOKENS) + 0.1


def collect(clean, changed, token_weights=1.0) -> LayerStats:
    root = np.sqrt(np.broadcast_to(token_weights, TOKENS))[:, None]
    met, away = root * changed, root * (clean - changed)
    gram = torch.from_numpy(met.T @ met)
    return LayerStats(gram, TOKENS, torch.from_numpy(met.T @ away), gram)


def assert_same_outputs(target, expected, weight, inputs) -> None:
    """Compare on the inputs: where they hardly reach, float32 may leave digits that nobody will ever see."""
    missed = np.linalg.norm(inputs @ (target.double().numpy() - expected).T)
    assert missed <= 1e-4 * np.linalg.norm(inputs @ (weight - expected).T)


def test_the_full_move_is_the_least_squares_weight(streams) -> None:
    clean, changed, weight, _ = streams
    stats = collect(clean, changed)
    target = error_aware_target(torch.from_numpy(weight).float(), stats, damp_gram(stats.gram, 0.0), 1.0)
    expected = np.linalg.lstsq(changed, clean @ weight.T, rcond=None)[0].T
    assert target.dtype == torch.float32
    assert_same_outputs(target, expected, weight, changed)
    error, unmoved = (np.linalg.norm(changed @ moved.T - clean @ weight.T) for moved in (target.numpy(), weight))
    assert error < 0.5 * unmoved


def test_damping_pulls_towards_the_weight_and_not_towards_zero(streams) -> None:
    clean, changed, weight, _ = streams
    stats = collect(clean, changed)
    damped = damp_gram(stats.gram, 0.05)
    target = error_aware_target(torch.from_numpy(weight).float(), stats, damped, 1.0)
    rows = np.vstack([changed, np.sqrt(damped.damping) * np.eye(IN)])
    wanted = np.vstack([clean @ weight.T, np.sqrt(damped.damping) * weight.T])
    assert_same_outputs(target, np.linalg.lstsq(rows, wanted, rcond=None)[0].T, weight, rows)


def test_weighted_tokens_make_a_weighted_least_squares(streams) -> None:
    clean, changed, weight, token_weights = streams
    stats = collect(clean, changed, token_weights)
    target = error_aware_target(torch.from_numpy(weight).float(), stats, damp_gram(stats.gram, 0.0), 1.0)
    root = np.sqrt(token_weights)[:, None]
    expected = np.linalg.lstsq(root * changed, root * clean @ weight.T, rcond=None)[0].T
    assert_same_outputs(target, expected, weight, root * changed)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_share_goes_that_share_of_the_way(share, streams) -> None:
    clean, changed, weight, _ = streams
    stats = collect(clean, changed)
    damped, original = damp_gram(stats.gram, 0.01), torch.from_numpy(weight).float()
    whole = error_aware_target(original, stats, damped, 1.0)
    part = error_aware_target(original, stats, damped, share)
    torch.testing.assert_close(part, original + share * (whole - original), rtol=0, atol=1e-5)


def test_without_a_move_the_weight_itself_is_the_target(streams) -> None:
    clean, changed, weight, _ = streams
    original = torch.from_numpy(weight).float()
    stats = collect(clean, changed)
    damped = damp_gram(stats.gram, 0.01)
    assert error_aware_target(original, stats, damped, 0.0) is original
    assert error_aware_target(original, LayerStats(stats.gram, TOKENS), damped, 0.5) is original
    same = collect(clean, clean)
    torch.testing.assert_close(error_aware_target(original, same, damp_gram(same.gram, 0.01), 1.0), original)
