"""OPTQ against the textbook elimination in float64, on correlated inputs: beating plain rounding would prove little."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cloq_export.quantize.grid import fit_grid, round_to_grid
from cloq_export.quantize.optq import BLOCK_COLUMNS, feedback_factor, optq_codes, processing_order, tile_columns
from cloq_export.types import QuantSpec


def problem(in_features, spec, seed, out_features=12, method="searched"):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.05
    scales, zeros = fit_grid(weight, spec, method)
    span = spec.columns_per_group(in_features)
    return weight, scales.float().repeat_interleave(span, 1), zeros.float().repeat_interleave(span, 1)


# One column; either side of a tile; either side of a block; several blocks with an odd rest; groups across tiles.
@pytest.mark.parametrize(
    ("in_features", "bits", "group_size", "symmetric"),
    [
        (1, 4, -1, False),
        (31, 2, -1, False),
        (32, 3, 32, True),
        (33, 3, -1, False),
        (64, 8, 32, False),
        (127, 4, -1, True),
        (129, 2, -1, False),
        (192, 2, 64, False),
        (192, 4, 64, True),
        (300, 3, -1, False),
    ],
)
def test_codes_equal_the_column_by_column_elimination(
    in_features, bits, group_size, symmetric, correlated_gram, eliminate
) -> None:
    spec = QuantSpec(bits, group_size, symmetric)
    gram = correlated_gram(in_features, seed=in_features)
    weight, scales, zeros = problem(in_features, spec, seed=bits)
    codes = optq_codes(weight, scales, zeros, spec.max_code, gram)
    assert codes.dtype == torch.uint8
    assert codes.is_contiguous()
    eliminate(weight, scales, zeros, spec.max_code, gram).assert_equal_up_to_ties(codes)


def test_the_sizes_above_cross_tiles_and_blocks() -> None:
    assert (tile_columns(17), BLOCK_COLUMNS) == (32, 128), "choose the sizes of this file anew around tiles and blocks"


def test_the_elimination_itself_lets_the_rest_answer_optimally(correlated_gram, eliminate) -> None:
    """First principles: each value is the best response to all codes before it, solved from the original W."""
    spec = QuantSpec(2, -1)
    gram = correlated_gram(40, seed=3)
    weight, scales, zeros = problem(40, spec, seed=3)
    oracle = eliminate(weight, scales, zeros, spec.max_code, gram)
    metric, original = gram.numpy(), weight.double().numpy()
    quantized = scales.double().numpy() * (oracle.codes - zeros.double().numpy())
    for step, column in enumerate(oracle.order):
        done, left = oracle.order[:step], oracle.order[step:]
        pull = (original - quantized)[:, done] @ metric[np.ix_(done, left)]
        best = original[:, left] + np.linalg.solve(metric[np.ix_(left, left)], pull.T).T
        wanted = best[:, 0] / scales.double().numpy()[:, column] + zeros.double().numpy()[:, column]
        np.testing.assert_allclose(oracle.wanted[:, column], wanted, rtol=1e-8, atol=1e-8)


def test_uncorrelated_inputs_make_it_plain_rounding() -> None:
    spec = QuantSpec(3, 16)
    weight, scales, zeros = problem(80, spec, seed=0)
    gram = torch.diag(torch.rand(80, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1)
    codes = optq_codes(weight, scales, zeros, spec.max_code, gram)
    assert torch.equal(codes, round_to_grid(weight, scales, zeros, spec.max_code).to(torch.uint8))


def test_the_column_visited_last_gets_its_best_code(correlated_gram) -> None:
    spec = QuantSpec(2, -1)
    gram = correlated_gram(50, seed=7)
    weight, scales, zeros = problem(50, spec, seed=7, out_features=64)
    codes = optq_codes(weight, scales, zeros, spec.max_code, gram)
    last = int(processing_order(gram)[-1])
    errors = []
    for code in range(spec.max_code + 1):
        tried = codes.clone()
        tried[:, last] = code
        difference = weight.double() - scales.double() * (tried.double() - zeros.double())
        errors.append(((difference @ gram) * difference).sum(1))
    chosen = torch.stack(errors).gather(0, codes[:, last].long().unsqueeze(0))[0]
    assert bool((chosen <= torch.stack(errors).amin(0) * (1 + 1e-6)).all())


def test_the_objective_is_well_below_that_of_rounding(correlated_gram) -> None:
    spec = QuantSpec(3, -1)
    gram = correlated_gram(160, seed=1)
    weight, scales, zeros = problem(160, spec, seed=1)

    def objective(codes: torch.Tensor) -> float:
        error = weight.double() - scales.double() * (codes.double() - zeros.double())
        return float(((error @ gram) * error).sum())

    walked = objective(optq_codes(weight, scales, zeros, spec.max_code, gram))
    assert walked < 0.4 * objective(round_to_grid(weight, scales, zeros, spec.max_code))


def test_renaming_the_columns_renames_the_codes(correlated_gram, eliminate) -> None:
    """Static act-order: the saved order is the original one, whatever order the columns were visited in."""
    spec = QuantSpec(3, -1)
    gram = correlated_gram(70, seed=5)
    weight, scales, zeros = problem(70, spec, seed=5)
    names = torch.randperm(70, generator=torch.Generator().manual_seed(5))
    renamed = optq_codes(weight[:, names], scales[:, names], zeros[:, names], spec.max_code, gram[names][:, names])
    back = torch.empty_like(renamed)
    back[:, names] = renamed
    eliminate(weight, scales, zeros, spec.max_code, gram).assert_equal_up_to_ties(back)


def test_columns_are_visited_by_falling_diagonal_and_ties_by_position() -> None:
    gram = torch.diag(torch.tensor([2.0, 5.0, 2.0, 5.0, 1.0, 2.0], dtype=torch.float64))
    assert processing_order(gram).tolist() == [1, 3, 0, 2, 5, 4]


@pytest.mark.parametrize("in_features", [1, 2, 65])
def test_feedback_factor_is_unit_triangular_and_splits_the_gram(in_features, correlated_gram) -> None:
    gram = correlated_gram(in_features, seed=2)
    factor = feedback_factor(gram)
    assert torch.equal(factor, factor.triu())
    assert torch.equal(factor.diagonal(), torch.ones(in_features, dtype=torch.float64))
    inverse = torch.linalg.inv(factor)
    inner = inverse @ gram @ inverse.t()
    assert bool((inner.diagonal() > 0).all())
    torch.testing.assert_close(inner, inner.diagonal().diag(), rtol=0, atol=1e-9 * float(gram.diagonal().max()))


def test_inputs_are_left_as_they_were(correlated_gram) -> None:
    spec = QuantSpec(4, 8)
    gram = correlated_gram(40)
    tensors = (*problem(40, spec, seed=0), gram)
    copies = [tensor.clone() for tensor in tensors]
    optq_codes(*tensors[:3], spec.max_code, tensors[3])
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))
