"""CLoQ: the closed-form LoRA pair that best repairs one quantized layer on its calibration inputs."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from cloq_export.adapt.root import GramRoot
from cloq_export.adapt.stored import stored_pair
from cloq_export.errors import ShapeError
from cloq_export.kernels.products import float32_products
from cloq_export.types import LoraPair, Split

# Above this size the exact decomposition of the smaller side gives way to subspace iteration.
EXACT_SIDE = 2048
OVERSAMPLING = 32
MOST_ITERATIONS = 60
_RESIDUAL_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class TruncatedSvd:
    """The leading singular triplets of a matrix Z, with a check of how good they are.

    Args:
        left: U_r, (rows, rank).
        values: S_r, (rank,), descending.
        right: V_r, (columns, rank).
        tail: `||Z - U_r S_r V_r^T||_F`, by Pythagoras from the captured energy.
        residual: `max_i ||Z v_i - s_i u_i|| / s_1`, 0 for the exact decomposition.
        method: "full", "gram" or "subspace".
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor
    tail: float
    residual: float
    method: str


def _tail(matrix: torch.Tensor, values: torch.Tensor) -> float:
    return float((matrix.square().sum() - values.square().sum()).clamp_min(0.0).sqrt())


def _svd_by_gram(matrix: torch.Tensor, rank: int) -> TruncatedSvd:
    """Return the leading triplets through the eigenvectors of the smaller of `Z Z^T` and `Z^T Z`, in float64."""
    wide = matrix.shape[0] <= matrix.shape[1]
    side = matrix @ matrix.t() if wide else matrix.t() @ matrix
    vectors = torch.linalg.eigh(side).eigenvectors.flip(1)[:, :rank]
    other = (matrix.t() if wide else matrix) @ vectors
    # Normalising by a QR keeps the other side orthonormal even where singular values vanish.
    basis, triangle = torch.linalg.qr(other)
    inner_left, values, inner_right = torch.linalg.svd(triangle)
    other = basis @ inner_left
    vectors = vectors @ inner_right.t()
    left, right = (vectors, other) if wide else (other, vectors)
    return TruncatedSvd(left, values, right, _tail(matrix, values), 0.0, "gram")


def _svd_by_subspace(matrix: torch.Tensor, rank: int) -> TruncatedSvd | None:
    """Return the leading triplets by block power iteration, or None if they do not settle.

    A GPU iterates in float32, where many have sixty-four times their speed of float64, until the basis has settled
    there; the last step, by which the residual is judged, is always one in the dtype of the matrix.
    """
    generator = torch.Generator().manual_seed(0)
    width = min(rank + OVERSAMPLING, *matrix.shape)
    start = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis, steps = torch.linalg.qr(matrix @ start).Q, MOST_ITERATIONS
    if matrix.device.type != "cpu":
        with float32_products("highest"):
            basis, _, taken = _iterate(matrix.to(torch.float32), basis.to(torch.float32), rank, steps)
        basis, steps = basis.to(matrix.dtype), max(1, steps - taken)
    return _iterate(matrix, basis, rank, steps)[1]


def _iterate(
    matrix: torch.Tensor, basis: torch.Tensor, rank: int, most: int
) -> tuple[torch.Tensor, TruncatedSvd | None, int]:
    """Return the basis after at most so many steps, the triplets or None, and how many steps were taken."""
    for step in range(1, most + 1):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis).Q).Q
        inner_left, values, right = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
        left = (basis @ inner_left)[:, :rank]
        settled = values[:rank]
        drift = matrix @ right[:rank].t() - left * settled
        residual = float(drift.norm(dim=0).max() / values[0].clamp_min(torch.finfo(matrix.dtype).tiny))
        if residual <= _RESIDUAL_TOLERANCE:
            found = TruncatedSvd(left, settled, right[:rank].t(), _tail(matrix, settled), residual, "subspace")
            return basis, found, step
    return basis, None, most


def truncated_svd(matrix: torch.Tensor, rank: int, method: Literal["truncated", "full"] = "truncated") -> TruncatedSvd:
    """Return the best rank-r approximation of Z as its leading singular triplets (Eckart and Young).

    Args:
        matrix: Z, (rows, columns) float64 or float32.
        rank: 1 <= rank <= min(rows, columns).
        method: "full" computes every triplet; "truncated" takes the eigenvectors of the smaller side's Gram matrix up
            to `EXACT_SIDE` and subspace iteration above it, which falls back to "full" if its residual does not
            settle (visible in `method` of the result).

    Returns:
        TruncatedSvd.
    """
    if method == "truncated":
        if min(matrix.shape) <= EXACT_SIDE:
            return _svd_by_gram(matrix, rank)
        settled = _svd_by_subspace(matrix, rank)
        if settled is not None:
            return settled
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = values[:rank]
    return TruncatedSvd(left[:, :rank], kept, right[:rank].t(), _tail(matrix, kept), 0.0, "full")


def split_factors(svd: TruncatedSvd, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (U C, V C') with C C' = S, one of the three splits of CLoQ Table 6.

    `paper` gives all of S to the A side (U S, V), which trains best; `balanced` gives each side the square root;
    `transposed` gives all of S to the B side (U, V S).
    """
    if split == "paper":
        return svd.left * svd.values, svd.right
    if split == "balanced":
        root = svd.values.sqrt()
        return svd.left * root, svd.right * root
    return svd.left, svd.right * svd.values


@dataclasses.dataclass(frozen=True)
class CloqResult:
    """The LoRA pair of one layer with its optimality bound.

    Args:
        pair: A and B in the adapter's dtype, or in float32 where that cannot hold them; alpha equal to the rank.
        bound: the Eckart-Young bound `||dW R^T - LR_r||_F` that no pair of this rank can beat, absolute.
        residual: residual of the truncated SVD.
        svd_method: which decomposition was used.
    """

    pair: LoraPair
    bound: float
    residual: float
    svd_method: str


@dataclasses.dataclass(frozen=True)
class CloqOptions:
    """How a pair is computed and stored.

    Args:
        split: which side carries the singular values.
        svd: "truncated" or "full".
        dtype: dtype of the stored pair.
    """

    split: Split = "paper"
    svd: Literal["truncated", "full"] = "truncated"
    dtype: torch.dtype = torch.float16


_DEFAULT = CloqOptions()


def init_cloq(
    weight: torch.Tensor,
    quantized: torch.Tensor,
    root: GramRoot,
    rank: int,
    options: CloqOptions = _DEFAULT,
) -> CloqResult:
    """Return the LoRA pair that minimises `||(W - Q - B A) H^(1/2)||_F` over all pairs of this rank (CLoQ eq. 4, 5).

    Theorem 3.1 holds for any root `R^T R = H`, so a Cholesky factor replaces the paper's first SVD. With
    `R dW^T = U S V^T` (best rank r), `A = (R^-1 U S)^T` and `B = V` (algorithm 1, lines 5 and 6).

    Args:
        weight: W, (out, in) float; the original weight or the error-aware target, never MagR's.
        quantized: Q, (out, in) float.
        root: R of the damped H, see `cholesky_root` and `eigen_root`.
        rank: 1 <= rank <= min(out, in).
        options: how the pair is computed and stored.

    Returns:
        CloqResult.

    Raises:
        ShapeError: rank is out of range or shapes disagree.
        NonFiniteError: the pair does not fit float32.
    """
    out_features, in_features = weight.shape
    if not 1 <= rank <= min(out_features, in_features):
        raise ShapeError(
            f"rank {rank} does not fit a layer of {in_features} inputs and {out_features} outputs; choose 1 to "
            f"{min(out_features, in_features)} with `rank`, or lower it for this module with `overrides`."
        )
    if quantized.shape != weight.shape or root.matrix.shape[1] != in_features:
        raise ShapeError(
            f"W is {tuple(weight.shape)}, Q {tuple(quantized.shape)} and R {tuple(root.matrix.shape)}; W and Q must "
            "agree and R must have one column per input."
        )
    residual = (weight.to(torch.float64) - quantized.to(torch.float64)).t()
    leading = truncated_svd(root.matrix @ residual, min(rank, root.matrix.shape[0]), options.svd)
    left, right = split_factors(leading, options.split)
    lora_a = root.solve(left).t()
    missing = rank - lora_a.shape[0]
    if missing:
        # H has a smaller rank than asked for: the rest of A is zero; B is completed orthonormally so that it can train.
        generator = torch.Generator().manual_seed(0)
        more = torch.randn(out_features, missing, generator=generator, dtype=right.dtype).to(right.device)
        lora_a = torch.nn.functional.pad(lora_a, (0, 0, 0, missing))
        right = torch.cat([right, torch.linalg.qr(torch.cat([right, more], dim=1)).Q[:, -missing:]], dim=1)
    seen = torch.nn.functional.pad(left.t(), (0, 0, 0, missing))
    pair = stored_pair(lora_a, right, options.dtype, input_energy=root.matrix.square().sum(0), seen=seen)
    return CloqResult(pair, leading.tail, leading.residual, leading.method)
