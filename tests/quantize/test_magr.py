"""MagR against solvers that share nothing with it: root finding, sequential quadratic programming, optimality."""

from __future__ import annotations

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_device import pretended_gpus
from scipy.optimize import brentq, minimize

from cloq_export.quantize.magr import reduce_magnitude, shrink_infinity_norm

rows = arrays.arrays(
    np.float64,
    (4, 7),
    elements=st.one_of(st.floats(-100.0, 100.0, allow_subnormal=False), st.sampled_from([0.0, 1.0, -1.0])),
)
amounts = st.one_of(st.floats(1e-4, 1000.0), st.just(0.0))
quick = settings(max_examples=150, deadline=None, derandomize=True)


def clip_level(row: np.ndarray, amount: float) -> float:
    """Return tau with sum(max(|v| - tau, 0)) = amount by bracketing, 0 if the whole row is within the amount."""
    magnitude = np.abs(row)
    if magnitude.sum() <= amount:
        return 0.0
    return brentq(lambda tau: np.maximum(magnitude - tau, 0).sum() - amount, 0.0, magnitude.max() + 1.0, xtol=1e-14)


def assert_is_the_proximal_map(groups: torch.Tensor, amount: float, tolerance: float) -> None:
    shrunk = shrink_infinity_norm(groups, amount)
    for row, result in zip(groups.double().numpy(), shrunk.double().numpy(), strict=True):
        level = clip_level(row, amount)
        np.testing.assert_allclose(result, np.clip(row, -level, level), rtol=0, atol=tolerance * max(1.0, level))


@quick
@given(rows, amounts)
def test_shrinking_is_the_proximal_map(values, amount) -> None:
    assert_is_the_proximal_map(torch.from_numpy(values), amount, 1e-6)


@quick
@given(rows, st.floats(1e-3, 1000.0))
def test_shrinking_is_optimal(values, amount) -> None:
    """The condition of `min_p amount ||p||_inf + 1/2 ||p - v||^2`: (v - p) / amount is a subgradient of the norm."""
    shrunk = shrink_infinity_norm(torch.from_numpy(values), amount).numpy()
    step = values - shrunk
    reach = np.abs(step).sum(1)
    assert (reach <= amount * (1 + 1e-6) + 1e-9).all()
    np.testing.assert_allclose((step * shrunk).sum(1), amount * np.abs(shrunk).max(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("span", [1, 2, 64, 2000])
@pytest.mark.parametrize("amount", [1e-3, 0.05, 1.0, 30.0])
def test_shrinking_in_float32_handles_wide_and_heavy_tailed_groups(span, amount) -> None:
    generator = torch.Generator().manual_seed(span)
    groups = torch.randn(6, span, generator=generator)
    assert_is_the_proximal_map(groups, amount, 1e-5)
    assert_is_the_proximal_map(groups.sign() * torch.exp(2.0 * groups), amount, 1e-5)


def test_shrinking_ends_where_every_newton_step_drops_only_some() -> None:
    """Magnitudes that crowd under the level: each Newton step leaves out two fifths, no more."""
    amount, gap, values = 1e-3, 1e-4, [1.0]
    level = 1.0 - amount
    while len(values) < 11008:
        count, extra = len(values), max(1, int(0.67 * len(values)))
        values += [level - gap] * extra
        level, gap = level - gap * extra / (count + extra), 1.6 * gap
    assert_is_the_proximal_map(torch.tensor([values]), amount, 1e-6)


def normalised(gram: torch.Tensor) -> np.ndarray:
    return (gram / torch.linalg.eigvalsh(gram)[-1]).numpy()


def objective(values: np.ndarray, weight: np.ndarray, metric: np.ndarray, alpha: float, span: int) -> np.ndarray:
    """Return `1/2 (v - w) M (v - w) + alpha sum_groups ||v||_inf` of every row."""
    error = values - weight
    penalty = np.abs(values).reshape(len(values), -1, span).max(2).sum(1)
    return 0.5 * ((error @ metric) * error).sum(1) + alpha * penalty


@pytest.mark.parametrize("span", [4, 6, 12])
@pytest.mark.parametrize("alpha", [1e-3, 0.03])
def test_smoothing_equals_a_quadratic_program(span, alpha, correlated_gram) -> None:
    """Epigraph form: a variable u per group bounds its magnitudes, `-u <= v <= u`, and the objective is smooth."""
    columns, groups = 12, 12 // span
    gram = correlated_gram(columns, seed=span, fraction=0.05)
    metric = normalised(gram)
    weight = torch.randn(3, columns, generator=torch.Generator().manual_seed(span)) * 0.2
    smoothed = reduce_magnitude(weight, gram, span, alpha, max_iterations=20000, tolerance=1e-8)
    member = np.kron(np.eye(groups), np.ones((span, 1)))
    bounds = np.block([[-np.eye(columns), member], [np.eye(columns), member]])
    found = []
    for row in weight.double().numpy():
        solved = minimize(
            lambda z, row=row: 0.5 * (z[:columns] - row) @ metric @ (z[:columns] - row) + alpha * z[columns:].sum(),
            np.concatenate([row, np.abs(row).reshape(groups, span).max(1)]),
            jac=lambda z, row=row: np.concatenate([metric @ (z[:columns] - row), np.full(groups, alpha)]),
            constraints={"type": "ineq", "fun": lambda z: bounds @ z, "jac": lambda z: bounds},
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 1000},
        )
        assert solved.success, solved.message
        found.append(solved.x[:columns])
    exact, original = np.array(found), weight.double().numpy()
    ours = smoothed.weight.double().numpy()
    best = objective(exact, original, metric, alpha, span)
    np.testing.assert_allclose(objective(ours, original, metric, alpha, span), best, rtol=1e-5)
    np.testing.assert_allclose(ours, exact, atol=2e-3 * np.abs(original).max())
    assert (best < 0.999 * objective(original, original, metric, alpha, span)).all()


@pytest.mark.parametrize("span", [16, 64])
def test_smoothing_meets_the_optimality_conditions(span, correlated_gram) -> None:
    """In every group the negative gradient over alpha is a subgradient of the maximum norm at v."""
    alpha = 3e-3
    gram = correlated_gram(64, seed=1, fraction=0.05)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)) * 0.2
    values = reduce_magnitude(weight, gram, span, alpha, max_iterations=20000, tolerance=1e-8).weight.double()
    metric = torch.from_numpy(normalised(gram))
    downhill = ((weight.double() - values) @ metric).view(8, -1, span).numpy()
    grouped = values.view(8, -1, span).numpy()
    np.testing.assert_allclose(np.abs(downhill).sum(2), alpha, rtol=2e-3)
    np.testing.assert_allclose((downhill * grouped).sum(2), alpha * np.abs(grouped).max(2), rtol=2e-3)


@pytest.mark.parametrize("span", [16, 64])
def test_the_default_effort_comes_within_a_thousandth_of_the_optimum(span, correlated_gram) -> None:
    alpha = 1e-3
    gram = correlated_gram(64, seed=2)
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(2)) * 0.1
    metric, original = normalised(gram), weight.double().numpy()
    ours = reduce_magnitude(weight, gram, span, alpha).weight.double().numpy()
    # A long plain proximal descent in float64, each step of which is checked above.
    exact = torch.from_numpy(original.copy())
    for _ in range(4000):
        moved = exact - (exact - weight.double()) @ torch.from_numpy(metric)
        exact = shrink_infinity_norm(moved.view(-1, span), alpha).view_as(exact)
    best = objective(exact.numpy(), original, metric, alpha, span).sum()
    assert objective(ours, original, metric, alpha, span).sum() <= 1.001 * best
    assert np.abs(ours).max() < 0.95 * np.abs(original).max()


def test_the_size_of_the_gram_does_not_matter(correlated_gram) -> None:
    gram = correlated_gram(32, seed=4)
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(4))
    small, large = (reduce_magnitude(weight, gram * factor, 8, 1e-2).weight for factor in (2.0**-10, 2.0**20))
    torch.testing.assert_close(small, large, rtol=0, atol=1e-5)


def test_no_penalty_leaves_the_weight_and_a_huge_one_leaves_nothing(correlated_gram) -> None:
    gram = correlated_gram(32, seed=4)
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(4))
    kept = weight.clone()
    untouched = reduce_magnitude(weight, gram, 8, 0.0)
    assert torch.equal(untouched.weight, weight)
    assert untouched.converged
    assert bool((reduce_magnitude(weight, gram, 8, 1e6).weight == 0).all())
    assert torch.equal(weight, kept)


def test_running_out_of_steps_is_said(correlated_gram) -> None:
    gram = correlated_gram(32, seed=4)
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(4))
    stopped = reduce_magnitude(weight, gram, 8, 1e-2, max_iterations=3)
    assert (stopped.iterations, stopped.converged) == (3, False)
    settled = reduce_magnitude(weight, gram, 8, 1e-2, max_iterations=20000)
    assert settled.converged
    assert 3 < settled.iterations < 20000


def test_rounded_steps_of_a_gpu_end_where_exact_ones_do(correlated_gram, monkeypatch) -> None:
    """A GPU that rounds operands to TF32, ten bits, is pretended; float32 has the last word."""
    gram = correlated_gram(96, seed=5)
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(5)) * 0.2
    here = reduce_magnitude(weight, gram, 16, 1e-2, max_iterations=2000)
    product, asked = torch.addmm, []

    def rounding(addend: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        asked.append(torch.get_float32_matmul_precision())
        if asked[-1] == "high":
            left, right = (((m.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for m in (left, right))
        return product(addend, left, right)

    monkeypatch.setattr(torch, "addmm", rounding)
    with pretended_gpus():
        there = reduce_magnitude(weight.to("cuda"), gram.to("cuda"), 16, 1e-2, max_iterations=2000)
        found = there.weight.cpu()
    exact = asked.count("highest")
    assert asked == ["high"] * (len(asked) - exact) + ["highest"] * exact
    assert 1 <= exact <= 3 < len(asked) == there.iterations
    assert here.converged
    assert there.converged
    metric = normalised(gram)
    ours, theirs, start = (
        objective(values.double().numpy(), weight.double().numpy(), metric, 1e-2, 16).sum()
        for values in (found, here.weight, weight)
    )
    # Both stop at one tolerance; between them lies little of what was gained.
    assert abs(ours - theirs) < 0.02 * (start - theirs)
