"""Coordinate descent against a plain loop in float64, and the scale refit against least squares row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cloq_export.quantize.comq import refit_scales, sweep_codes
from cloq_export.quantize.grid import fit_grid, round_to_grid
from cloq_export.types import QuantSpec

TIE = 1e-3


def rounded_problem(in_features, spec, seed, out_features=24):
    """Return W, rounded codes, and scales and zeros both per group and per column."""
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) * 0.05
    scales, zeros = fit_grid(weight, spec)
    span = spec.columns_per_group(in_features)
    column_scales, column_zeros = scales.float().repeat_interleave(span, 1), zeros.float().repeat_interleave(span, 1)
    codes = round_to_grid(weight, column_scales, column_zeros, spec.max_code).to(torch.uint8)
    return weight, codes, scales, zeros, column_scales, column_zeros


def row_objectives(weight, codes, scales, zeros, gram) -> torch.Tensor:
    """Return `||(w - q) H^(1/2)||^2` of every row; scales and zeros per column or per group."""
    span = weight.shape[1] // scales.shape[1]
    spread = (values.double().repeat_interleave(span, 1) for values in (scales, zeros))
    scale, zero = spread
    error = weight.double() - scale * (codes.double() - zero)
    return ((error @ gram) * error).sum(1)


def descend(weight, codes, scales, zeros, max_code, gram, sweeps):
    """Return (codes, least distance of each row to a rounding boundary) of plain coordinate descent in float64."""
    target, current, scale, zero, metric = (t.double().numpy().copy() for t in (weight, codes, scales, zeros, gram))
    margins = np.full(len(target), np.inf)
    boundaries = np.arange(max_code) + 0.5
    for _ in range(sweeps):
        for column in np.argsort(-metric.diagonal(), kind="stable"):
            error = target - scale * (current - zero)
            wanted = current[:, column] + error @ metric[:, column] / metric[column, column] / scale[:, column]
            margins = np.minimum(margins, np.abs(wanted[:, None] - boundaries).min(1))
            current[:, column] = np.clip(np.rint(wanted), 0, max_code)
    return current.astype(np.uint8), margins


@pytest.mark.parametrize(
    ("in_features", "bits", "group_size", "sweeps"), [(1, 2, -1, 1), (33, 3, -1, 3), (128, 2, 64, 2), (150, 4, -1, 2)]
)
def test_sweeps_equal_a_plain_loop(in_features, bits, group_size, sweeps, correlated_gram) -> None:
    spec = QuantSpec(bits, group_size)
    gram = correlated_gram(in_features, seed=bits)
    weight, codes, _, _, scales, zeros = rounded_problem(in_features, spec, seed=in_features)
    before = codes.clone()
    swept = codes
    for _ in range(sweeps):
        swept = sweep_codes(weight, swept, scales, zeros, spec.max_code, gram)
    expected, margins = descend(weight, codes, scales, zeros, spec.max_code, gram, sweeps)
    clear = margins > TIE
    assert clear.mean() > 0.4
    assert np.array_equal(swept.numpy()[clear], expected[clear])
    assert swept.dtype == torch.uint8
    assert torch.equal(codes, before)
    if in_features > 1:
        assert not torch.equal(swept, codes)


@pytest.mark.parametrize("bits", [2, 3])
def test_no_sweep_raises_the_objective_of_any_row(bits, correlated_gram) -> None:
    spec = QuantSpec(bits, 32)
    gram = correlated_gram(160, seed=9)
    weight, codes, scales, zeros, column_scales, column_zeros = rounded_problem(160, spec, seed=bits)
    last = row_objectives(weight, codes, scales, zeros, gram)
    start = last
    for _ in range(6):
        codes = sweep_codes(weight, codes, column_scales, column_zeros, spec.max_code, gram)
        now = row_objectives(weight, codes, scales, zeros, gram)
        assert bool((now <= last * (1 + 1e-5)).all())
        last = now
    assert float(last.sum()) < 0.5 * float(start.sum())


def test_many_sweeps_end_where_no_single_code_can_be_bettered(correlated_gram) -> None:
    spec = QuantSpec(2, -1)
    gram = correlated_gram(45, seed=1)
    weight, codes, _, _, scales, zeros = rounded_problem(45, spec, seed=1)
    settled = codes
    for _ in range(60):
        settled = sweep_codes(weight, settled, scales, zeros, spec.max_code, gram)
    assert torch.equal(sweep_codes(weight, settled, scales, zeros, spec.max_code, gram), settled)
    reached = row_objectives(weight, settled, scales, zeros, gram)
    for column in range(45):
        for code in range(spec.max_code + 1):
            tried = settled.clone()
            tried[:, column] = code
            assert bool((row_objectives(weight, tried, scales, zeros, gram) >= reached * (1 - 1e-5)).all())


def fit_by_least_squares(weight, codes, scales, zeros, gram) -> np.ndarray:
    """Return the free optimum of the scales, one least-squares problem per row: `min ||R (w - C s)||`, R^T R = H."""
    groups = scales.shape[1]
    root = np.linalg.cholesky(gram.numpy()).T
    fitted = np.zeros(scales.shape)
    for row in range(len(weight)):
        design = np.zeros((weight.shape[1], groups))
        for group in range(groups):
            members = slice(group * weight.shape[1] // groups, (group + 1) * weight.shape[1] // groups)
            design[members, group] = codes[row, members].double().numpy() - float(zeros[row, group])
        fitted[row] = np.linalg.lstsq(root @ design, root @ weight[row].double().numpy(), rcond=None)[0]
    return fitted


@pytest.mark.parametrize(("bits", "group_size"), [(3, 16), (4, 32), (4, -1), (8, 48)])
def test_refitted_scales_equal_least_squares(bits, group_size, correlated_gram) -> None:
    spec = QuantSpec(bits, group_size)
    gram = correlated_gram(96, seed=bits)
    weight, codes, scales, zeros, _, _ = rounded_problem(96, spec, seed=bits)
    scales = (scales.float() * 1.1).to(torch.float16)  # away from the optimum, so that there is something to find
    fitted = fit_by_least_squares(weight, codes, scales, zeros, gram)
    ratio = fitted / scales.double().numpy()
    free = ((ratio > 0.5) & (ratio < 2.0)).all(1)
    assert free.mean() > 0.8
    refitted = refit_scales(weight, codes, scales, zeros, gram)
    assert refitted.dtype == torch.float16
    np.testing.assert_allclose(refitted.double().numpy()[free], fitted[free], rtol=1e-3)
    better = row_objectives(weight, codes, refitted, zeros, gram)
    worse = row_objectives(weight, codes, scales, zeros, gram)
    assert bool((better < worse).all())


def test_refitting_never_raises_the_objective_of_any_row(correlated_gram) -> None:
    for seed in range(6):
        spec = QuantSpec([2, 3, 4][seed % 3], 16)
        gram = correlated_gram(128, seed=seed)
        weight, codes, scales, zeros, _, _ = rounded_problem(128, spec, seed=seed, out_features=64)
        refitted = refit_scales(weight, codes, scales, zeros, gram)
        before, after = (row_objectives(weight, codes, values, zeros, gram) for values in (scales, refitted))
        assert bool((after <= before * (1 + 1e-5)).all())
        ratio = refitted.double() / scales.double()
        assert bool(((ratio >= 0.499) & (ratio <= 2.001)).all())


def test_scales_fitted_together_with_one_that_is_kept_do_not_make_the_row_worse() -> None:
    """Two groups with nearly the same inputs: the fit takes 1.7 and 0.3 of the old scales, and 0.3 is out of bounds."""
    inputs = np.random.default_rng(0).standard_normal((100, 8))
    inputs = np.hstack([inputs, inputs + 0.01 * np.random.default_rng(1).standard_normal((100, 8))])
    gram = torch.from_numpy(inputs.T @ inputs)
    codes = torch.tensor([[0, 3, 5, 7, 1, 6, 2, 4] * 2], dtype=torch.uint8)
    zeros, scales = torch.full((1, 2), 3, dtype=torch.uint8), torch.full((1, 2), 0.125, dtype=torch.float16)
    shares = torch.tensor([1.7] * 8 + [0.3] * 8)
    weight = shares * 0.125 * (codes.float() - 3.0)
    np.testing.assert_allclose(fit_by_least_squares(weight, codes, scales, zeros, gram), [[0.2125, 0.0375]], rtol=1e-4)
    assert torch.equal(refit_scales(weight, codes, scales, zeros, gram), scales)


def test_a_group_that_says_nothing_keeps_its_scale(correlated_gram) -> None:
    spec = QuantSpec(3, 8)
    gram = correlated_gram(32, seed=0)
    weight, codes, scales, zeros, _, _ = rounded_problem(32, spec, seed=0)
    codes[:, 8:16] = zeros[:, 1:2]
    refitted = refit_scales(weight, codes, scales, zeros, gram)
    assert torch.equal(refitted[:, 1], scales[:, 1])
    assert not torch.equal(refitted, scales)


def test_a_scale_near_the_end_of_float16_does_not_overflow(correlated_gram) -> None:
    codes = torch.tensor([[0, 1, 2, 3] * 4], dtype=torch.uint8)
    zeros, scales = torch.ones(1, 1, dtype=torch.uint8), torch.full((1, 1), 40000.0, dtype=torch.float16)
    refitted = refit_scales((codes.float() - 1.0) * 70000.0, codes, scales, zeros, correlated_gram(16))
    assert torch.equal(refitted, scales)
