"""LoRA pairs made fit for an engine: evenly split, padded, brought to one rank and one scaling; see SPEC.md.

All of it works on the small factors: the product, (out, in), is never formed.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping

import torch

from cloq_export.errors import NonFiniteError, ShapeError
from cloq_export.types import LoraPair

VLLM_MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM 0.32 and 0.33 allow as `--max-lora-rank`. An adapter of any smaller rank is served under it."""


def balanced(pair: LoraPair, dtype: torch.dtype | None = None) -> LoraPair:
    """Return the same product split evenly, so that it loses as little as possible in half precision.

    With `(alpha / rank) B A = U S V^T` the new factors are `B' = U S^(1/2)` and `A' = S^(1/2) V^T`, and alpha is the
    rank: an engine has nothing to multiply. Each rank-one term has one magnitude on both sides, so the largest entry
    is at most the square root of the largest singular value; and the rows of A' and the columns of B' are orthogonal,
    so rounding both to a dtype of unit roundoff u changes the product by at most `2u + u^2` in relative Frobenius
    norm, whatever its condition, as long as no entry falls among the subnormal numbers.

    Args:
        pair: A (rank, in) and B (out, rank).
        dtype: of the result; None keeps the pair's.

    Returns:
        A pair of the same rank with scaling 1. What it lost is `product_difference(result, pair)`.

    Raises:
        NonFiniteError: the product itself is beyond the range of the dtype.
    """
    left, right = _factors(pair)
    orthonormal_b, triangle_b = torch.linalg.qr(left)
    orthonormal_a, triangle_a = torch.linalg.qr(right.T)
    u, s, vt = torch.linalg.svd(triangle_b @ triangle_a.T, full_matrices=False)
    root = s.sqrt()
    lora_b = left.new_zeros(left.shape)
    lora_a = right.new_zeros(right.shape)
    # A rank above the number of inputs or outputs leaves terms that are zero.
    lora_b[:, : len(s)] = orthonormal_b @ (u * root)
    lora_a[: len(s)] = (root[:, None] * vt) @ orthonormal_a.T
    wanted = dtype or pair.lora_A.dtype
    return LoraPair(lora_a.to(wanted), lora_b.to(wanted), float(pair.rank))


def product_difference(pair: LoraPair, reference: LoraPair) -> float:
    """Return `||P - P_ref||_F / ||P_ref||_F` of the served products `P = (alpha / rank) B A`.

    The difference is the product of the stacked factors `[B, B_ref] [A; -A_ref]`, whose norm is that of the product
    of their two triangular QR factors. Computed in float64, it is exact to about 1e-16 of the sum of the norms of all
    rank-one terms.

    Args:
        pair: the pair in question.
        reference: the pair that it stands in for, of any rank and alpha.

    Returns:
        0 if both products are zero, infinity if only the reference is.

    Raises:
        ShapeError: the pairs belong to layers of different shapes.
    """
    shapes = [(each.lora_B.shape[0], each.lora_A.shape[1]) for each in (pair, reference)]
    if shapes[0] != shapes[1]:
        raise ShapeError(f"the products are {shapes[0]} and {shapes[1]}; only pairs of one layer can be compared.")
    left, right = _factors(pair)
    left_ref, right_ref = (factor.to(left.device) for factor in _factors(reference))
    difference = _product_norm(torch.cat([left, left_ref], dim=1), torch.cat([right, -right_ref]))
    size = _product_norm(left_ref, right_ref)
    if size == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / size


def padded(pair: LoraPair, rank: int) -> LoraPair:
    """Return the same product in a larger rank: rows and columns of zeros are added, and alpha grows with the rank.

    Args:
        pair: A (r, in) and B (out, r).
        rank: at least r.

    Returns:
        A (rank, in), B (out, rank), and an alpha for which `alpha / rank` is the same float64 as before.

    Raises:
        ShapeError: the rank is smaller than the pair's, or no alpha keeps the scaling.
    """
    if rank < pair.rank:
        raise ShapeError(f"a pair of rank {pair.rank} cannot be padded to rank {rank}; give {pair.rank} or more.")
    if rank == pair.rank:
        return pair
    lora_a = torch.cat([pair.lora_A, pair.lora_A.new_zeros(rank - pair.rank, pair.lora_A.shape[1])])
    lora_b = torch.cat([pair.lora_B, pair.lora_B.new_zeros(pair.lora_B.shape[0], rank - pair.rank)], dim=1)
    return LoraPair(lora_a, lora_b, _alpha_for(pair.scaling, rank))


def allowed_rank(rank: int, allowed: Iterable[int] = VLLM_MAX_LORA_RANKS) -> int:
    """Return the smallest allowed rank that holds a rank.

    Args:
        rank: of an adapter, the largest over its modules.
        allowed: the ranks to choose from.

    Raises:
        ShapeError: every allowed rank is smaller.
    """
    ranks = sorted(allowed)
    for candidate in ranks:
        if candidate >= rank:
            return candidate
    raise ShapeError(
        f"rank {rank} is above {ranks[-1]}, the largest that is allowed; make the adapter with `rank={ranks[-1]}` or "
        "less."
    )


@dataclasses.dataclass(frozen=True)
class UniformPairs:
    """Pairs of one rank and one alpha, for engines that read no `rank_pattern` and no `alpha_pattern`.

    Args:
        pairs: full module name -> pair.
        rank: of all pairs.
        alpha: of all pairs.
        inexact: module -> relative Frobenius error of its product, for the modules whose B had to be rounded; empty
            if every product is exactly what it was.
    """

    pairs: Mapping[str, LoraPair]
    rank: int
    alpha: float
    inexact: Mapping[str, float]


def uniform(pairs: Mapping[str, LoraPair], rank: int | None = None) -> UniformPairs:
    """Bring pairs of mixed ranks and alphas to one rank and one alpha, so that the adapter needs no patterns.

    Ranks are padded with zeros. Where scalings differ, B is multiplied by the ratio of a module's scaling to the
    common one, which loses nothing when the ratio is a power of two; the common scaling is the one that leaves the
    fewest modules rounded.

    Args:
        pairs: full module name -> pair, at least one.
        rank: of the result; None takes the largest rank among the pairs.

    Returns:
        The pairs, with what rounding B cost.

    Raises:
        ShapeError: there is no pair, or one has a larger rank.
        NonFiniteError: a B leaves the range of its dtype.
    """
    if not pairs:
        raise ShapeError("there is no LoRA pair to bring to one rank; give at least one.")
    largest = max(pair.rank for pair in pairs.values())
    if rank is None:
        rank = largest
    elif rank < largest:
        raise ShapeError(f"the largest rank among the pairs is {largest}; rank {rank} cannot hold it: give {largest}.")
    counts = collections.Counter(pair.scaling for pair in pairs.values())

    def cost(common: float) -> tuple[int, bool, int, float]:
        rounded = sum(count for scaling, count in counts.items() if not _is_exact_ratio(scaling, common))
        # At equal cost scaling 1 wins: no engine has to multiply by it.
        return rounded, common != 1.0, -counts[common], common

    common = min({1.0, *(scaling for scaling in counts if scaling > 0)}, key=cost)
    alpha = _alpha_for(common, rank)
    result: dict[str, LoraPair] = {}
    inexact: dict[str, float] = {}
    for module, pair in pairs.items():
        lora_b = pair.lora_B
        if pair.scaling != common:
            lora_b = (lora_b.to(torch.float64) * (pair.scaling / common)).to(lora_b.dtype)
        try:
            wide = padded(LoraPair(pair.lora_A, lora_b, float(pair.rank)), rank)
        except NonFiniteError:
            raise NonFiniteError(
                f"{module}: B times {pair.scaling / common:g} leaves the range of {lora_b.dtype}; store the adapter in "
                "float32 (`adapter_dtype=float32`), or split it evenly first."
            ) from None
        result[module] = LoraPair(wide.lora_A, wide.lora_B, alpha)
        if pair.scaling != common:
            # A power of two changes no digit, unless it pushes an entry among the subnormal numbers.
            back = lora_b.to(torch.float64) * (common / pair.scaling if pair.scaling else 1.0)
            same = torch.equal(back, pair.lora_B.to(torch.float64)) or pair.scaling == 0
            if not same or not _is_exact_ratio(pair.scaling, common):
                inexact[module] = product_difference(result[module], pair)
    return UniformPairs(result, rank, alpha, inexact)


def _factors(pair: LoraPair) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B (out, rank) and A (rank, in) in float64 with the scaling in A, each rank-one term spread evenly."""
    left = pair.lora_B.to(torch.float64)
    right = pair.lora_A.to(torch.float64) * pair.scaling
    # By powers of two, which are exact: without it a QR factorisation loses the small terms beside the large ones.
    steps = (torch.log2(torch.linalg.vector_norm(right, dim=1) / torch.linalg.vector_norm(left, dim=0)) / 2).round()
    steps = torch.where(torch.isfinite(steps), steps, 0.0)
    return left * torch.exp2(steps), right * torch.exp2(-steps)[:, None]


def _product_norm(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the Frobenius norm of `left @ right` through the triangular factors of both."""
    _, triangle_left = torch.linalg.qr(left, mode="r")
    _, triangle_right = torch.linalg.qr(right.T, mode="r")
    return float(torch.linalg.matrix_norm(triangle_left @ triangle_right.T))


def _alpha_for(scaling: float, rank: int) -> float:
    """Return the alpha that every reader divides by the rank to get exactly this scaling."""
    alpha = scaling * rank
    # The neighbours of this float64 do no better where it fails, e.g. for a scaling of 1/9 at rank 10.
    if alpha / rank != scaling:
        raise ShapeError(
            f"no alpha gives exactly the scaling {scaling!r} at rank {rank}; split the pairs evenly first, which makes "
            "the scaling 1, or choose a rank that is a power of two."
        )
    return alpha


def _is_exact_ratio(scaling: float, common: float) -> bool:
    """Return whether multiplying by `scaling / common` changes no digit: it is zero or a power of two."""
    if scaling == 0:
        return True
    return math.frexp(scaling)[0] == math.frexp(common)[0]
