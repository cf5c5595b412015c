"""CLoQ's pair reaches the Eckart-Young bound on the tokens themselves, by any root, and nothing else gets below it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cloq_export.adapt import CloqOptions, GramRoot, cholesky_root, cloq, eigen_root, init_cloq
from cloq_export.errors import NonFiniteError, ShapeError

SPLITS = ("paper", "balanced", "transposed")


def exact_root(gram: torch.Tensor) -> GramRoot:
    return cholesky_root(torch.linalg.cholesky(gram))


@pytest.mark.parametrize(
    ("out_features", "in_features", "rank"),
    [(24, 40, 8), (40, 24, 8), (30, 30, 1), (1, 20, 1), (20, 1, 1), (16, 40, 15)],
)
@pytest.mark.parametrize("svd", ["truncated", "full"])
def test_the_pair_reaches_the_least_error_on_the_tokens(
    svd, out_features, in_features, rank, layer, correction
) -> None:
    drawn = layer(out_features, in_features, seed=rank)
    result = init_cloq(
        drawn.weight, drawn.quantized, exact_root(drawn.gram), rank, CloqOptions(svd=svd, dtype=torch.float64)
    )
    least, start = drawn.least_error(rank), drawn.error(torch.zeros_like(drawn.weight))
    assert drawn.error(correction(result.pair)) == pytest.approx(least, rel=1e-7, abs=1e-7 * start)
    assert result.bound == pytest.approx(least, rel=1e-7, abs=1e-7 * start)
    assert result.residual == 0.0
    assert result.svd_method == {"truncated": "gram", "full": "full"}[svd]
    assert result.pair.lora_A.shape == (rank, in_features)
    assert result.pair.lora_B.shape == (out_features, rank)
    assert result.pair.alpha == rank
    assert result.pair.scaling == 1.0


def test_subspace_iteration_reaches_it_as_well(layer, correction, monkeypatch) -> None:
    drawn = layer(90, 120)
    monkeypatch.setattr(cloq, "EXACT_SIDE", 16)
    result = init_cloq(drawn.weight, drawn.quantized, exact_root(drawn.gram), 12, CloqOptions(dtype=torch.float64))
    assert result.svd_method == "subspace"
    assert result.residual <= 1e-3
    error = drawn.error(correction(result.pair))
    assert error == pytest.approx(result.bound, rel=1e-7)
    assert error == pytest.approx(drawn.least_error(12), rel=1e-5)


def test_the_full_rank_repairs_everything(layer, correction) -> None:
    drawn = layer(18, 30)
    result = init_cloq(drawn.weight, drawn.quantized, exact_root(drawn.gram), 18, CloqOptions(dtype=torch.float64))
    torch.testing.assert_close(correction(result.pair), drawn.residual)
    assert result.bound <= 1e-6 * drawn.error(torch.zeros_like(drawn.weight))


def test_it_beats_the_best_approximation_of_the_residual_itself(layer, correction) -> None:
    """LoftQ's choice, which ignores the inputs, must lose by a margin: otherwise H plays no part in these tests."""
    drawn = layer(32, 48)
    result = init_cloq(drawn.weight, drawn.quantized, exact_root(drawn.gram), 8, CloqOptions(dtype=torch.float64))
    left, values, right = np.linalg.svd(drawn.residual.numpy())
    blind = torch.from_numpy(left[:, :8] * values[:8] @ right[:8])
    assert drawn.error(correction(result.pair)) < 0.9 * drawn.error(blind)


def test_random_pairs_do_not_get_below_it(layer, correction) -> None:
    drawn = layer(10, 14)
    pair = init_cloq(drawn.weight, drawn.quantized, exact_root(drawn.gram), 3, CloqOptions(dtype=torch.float64)).pair
    best, generator = drawn.error(correction(pair)), torch.Generator().manual_seed(0)
    for trial in range(400):
        size = 10.0 ** -(trial % 8)  # from anywhere to the closest neighbourhood
        shift_a = torch.randn(pair.lora_A.shape, generator=generator, dtype=torch.float64) * size
        shift_b = torch.randn(pair.lora_B.shape, generator=generator, dtype=torch.float64) * size
        assert drawn.error((pair.lora_B + shift_b) @ (pair.lora_A + shift_a)) > best * (1 - 1e-12)


def test_descent_from_many_starts_ends_at_it(layer, correction) -> None:
    """L-BFGS on A and B from random starts: none passes the bound, and the problem has no other valley to end in."""
    drawn, rank = layer(10, 14, seed=1), 3
    pair = init_cloq(drawn.weight, drawn.quantized, exact_root(drawn.gram), rank, CloqOptions(dtype=torch.float64)).pair
    best, generator = drawn.error(correction(pair)), torch.Generator().manual_seed(0)
    reached = []
    for _ in range(4):
        a = torch.randn(rank, 14, generator=generator, dtype=torch.float64).requires_grad_()
        b = torch.randn(10, rank, generator=generator, dtype=torch.float64).requires_grad_()
        solver = torch.optim.LBFGS([a, b], max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

        def squared_error(a=a, b=b, solver=solver) -> torch.Tensor:
            solver.zero_grad()
            loss = (drawn.inputs @ (drawn.residual - b @ a).t()).square().sum()
            loss.backward()
            return loss

        solver.step(squared_error)
        reached.append(drawn.error((b @ a).detach()))
    assert min(reached) >= best * (1 - 1e-9)
    assert min(reached) == pytest.approx(best, rel=1e-4)


def test_any_root_gives_the_same_correction(layer, correction) -> None:
    drawn = layer(20, 32)
    triangle = torch.linalg.qr(drawn.inputs).R
    roots = (exact_root(drawn.gram), eigen_root(drawn.gram), GramRoot(triangle))
    products = [
        correction(init_cloq(drawn.weight, drawn.quantized, root, 6, CloqOptions(dtype=torch.float64)).pair)
        for root in roots
    ]
    torch.testing.assert_close(products[1], products[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(products[2], products[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("split", SPLITS)
def test_the_correction_projects_the_residual_on_b(split, layer, correction) -> None:
    """`B A = V V^T (W - Q)`: R cancels, so the stored A must be `V^T (W - Q)` for the paper's split."""
    drawn = layer(20, 32)
    paper = init_cloq(drawn.weight, drawn.quantized, exact_root(drawn.gram), 6, CloqOptions(dtype=torch.float64)).pair
    torch.testing.assert_close(paper.lora_B.t() @ paper.lora_B, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(paper.lora_A, paper.lora_B.t() @ drawn.residual)
    pair = init_cloq(
        drawn.weight, drawn.quantized, exact_root(drawn.gram), 6, CloqOptions(split=split, dtype=torch.float64)
    ).pair
    torch.testing.assert_close(correction(pair), correction(paper))


def test_the_splits_put_the_singular_values_where_they_say(layer) -> None:
    drawn = layer(20, 32)
    root = exact_root(drawn.gram)
    values = torch.from_numpy(np.linalg.svd((drawn.inputs @ drawn.residual.t()).numpy(), compute_uv=False)[:6].copy())
    for split, power in zip(SPLITS, (0.0, 0.5, 1.0), strict=True):
        pair = init_cloq(drawn.weight, drawn.quantized, root, 6, CloqOptions(split=split, dtype=torch.float64)).pair
        torch.testing.assert_close(pair.lora_B.norm(dim=0), values**power)
        torch.testing.assert_close((root.matrix @ pair.lora_A.t()).norm(dim=0), values ** (1.0 - power))


@pytest.mark.parametrize("rank", [3, 11])
def test_a_singular_gram_is_repaired_on_the_span_of_the_inputs(rank, layer, correction) -> None:
    drawn = layer(16, 40, tokens=12, seed=2)
    result = init_cloq(drawn.weight, drawn.quantized, eigen_root(drawn.gram), rank, CloqOptions(dtype=torch.float64))
    product, start = correction(result.pair), drawn.error(torch.zeros_like(drawn.weight))
    assert drawn.error(product) == pytest.approx(drawn.least_error(rank), rel=1e-7, abs=1e-7 * start)
    assert result.bound == pytest.approx(drawn.least_error(rank), rel=1e-7, abs=1e-7 * start)
    unseen = torch.from_numpy(np.linalg.svd(drawn.inputs.numpy())[2][12:].copy())
    assert float((product @ unseen.t()).abs().max()) < 1e-10


def test_a_rank_beyond_that_of_the_gram_repairs_every_token(layer, correction) -> None:
    drawn = layer(30, 40, tokens=7)
    result = init_cloq(drawn.weight, drawn.quantized, eigen_root(drawn.gram), 20, CloqOptions(dtype=torch.float64))
    assert (result.pair.lora_A.shape, result.pair.lora_B.shape) == ((20, 40), (30, 20))
    assert result.pair.alpha == 20
    assert drawn.error(correction(result.pair)) <= 1e-7 * drawn.error(torch.zeros_like(drawn.weight))


def test_nothing_to_repair_gives_no_correction(layer, correction) -> None:
    drawn = layer(12, 16)
    result = init_cloq(drawn.weight, drawn.weight, exact_root(drawn.gram), 4)
    assert bool((correction(result.pair) == 0).all())
    assert result.bound == 0.0


@pytest.mark.parametrize(
    ("dtype", "excess"), [(torch.float32, 1e-6), (torch.float16, 1e-4), (torch.bfloat16, 5e-3)], ids=str
)
@pytest.mark.parametrize("split", SPLITS)
def test_rounding_to_the_stored_dtype_costs_little(split, dtype, excess, layer, correction) -> None:
    drawn = layer(32, 48)
    result = init_cloq(drawn.weight, drawn.quantized, exact_root(drawn.gram), 8, CloqOptions(split=split, dtype=dtype))
    assert result.pair.lora_A.dtype == result.pair.lora_B.dtype == dtype
    assert result.pair.lora_A.is_contiguous()
    assert result.pair.lora_B.is_contiguous()
    least = drawn.least_error(8)
    assert least * (1 - 1e-9) <= drawn.error(correction(result.pair)) <= least * (1 + excess)
    # The bound speaks of the exact pair, whatever it is stored in.
    assert result.bound == pytest.approx(least, rel=1e-7)


def test_weights_may_come_in_float32(layer, correction) -> None:
    drawn = layer(24, 40)
    result = init_cloq(
        drawn.weight.float(), drawn.quantized.float(), exact_root(drawn.gram), 8, CloqOptions(dtype=torch.float32)
    )
    assert drawn.error(correction(result.pair)) == pytest.approx(drawn.least_error(8), rel=1e-5)


def test_a_pair_too_large_for_every_dtype_is_refused(layer) -> None:
    drawn = layer(8, 12)
    with pytest.raises(NonFiniteError, match=r"LoRA A holds NaN or Inf in torch\.float32"):
        init_cloq(1e100 * drawn.weight, drawn.quantized, exact_root(drawn.gram), 2)
    assert init_cloq(1e6 * drawn.weight, drawn.quantized, exact_root(drawn.gram), 2).pair.lora_A.dtype == torch.float16


@pytest.mark.parametrize("rank", [0, -1, 9, 13])
def test_ranks_out_of_range_are_refused(rank, layer) -> None:
    drawn = layer(8, 12)
    with pytest.raises(
        ShapeError, match=rf"rank {rank} does not fit a layer of 12 inputs and 8 outputs; choose 1 to 8 "
    ):
        init_cloq(drawn.weight, drawn.quantized, exact_root(drawn.gram), rank)


def test_shapes_that_disagree_are_refused(layer) -> None:
    drawn = layer(8, 12)
    message = r"W is \(8, 12\), Q \(8, 11\) and R \(12, 12\); W and Q must agree and R must have one column per input\."
    with pytest.raises(ShapeError, match=message):
        init_cloq(drawn.weight, drawn.quantized[:, :11], exact_root(drawn.gram), 2)
    with pytest.raises(ShapeError, match=r"R \(11, 11\); W and Q must agree"):
        init_cloq(drawn.weight, drawn.quantized, exact_root(drawn.gram[:11, :11]), 2)
