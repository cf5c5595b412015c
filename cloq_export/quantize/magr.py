"""MagR: shrink the largest weights of each group along directions that the layer's inputs hardly use."""

from __future__ import annotations

import dataclasses

import torch

# Newton settles in about five steps; only a wide group whose magnitudes crowd around the level takes a dozen or more.
_PROJECTION_STEPS = 64


@dataclasses.dataclass(frozen=True)
class MagrResult:
    """What MagR did.

    Args:
        weight: the smoothed weight, (out, in) float32.
        iterations: proximal gradient steps taken.
        converged: True if the relative change fell under the tolerance before the count ran out.
    """

    weight: torch.Tensor
    iterations: int
    converged: bool


def shrink_infinity_norm(groups: torch.Tensor, amount: float) -> torch.Tensor:
    """Return the proximal map of `amount * ||v||_inf` on each row, `v - proj_{l1 ball of radius amount}(v)`.

    By Moreau's identity this clips `|v|` at the level tau with `sum(max(|v| - tau, 0)) = amount` (MagR section 3);
    tau is found by Newton's method on that piecewise linear equation, which ends after finitely many steps.

    Args:
        groups: (n, span) float.
        amount: radius, >= 0.

    Returns:
        Same shape: `sign(v) * min(|v|, tau)`, all zero where the l1 norm is at most `amount`.
    """
    magnitude = groups.abs()
    level = ((magnitude.sum(-1, keepdim=True) - amount) / groups.shape[-1]).clamp_min(0.0)
    for _ in range(_PROJECTION_STEPS):
        above = magnitude > level
        count = above.sum(-1, keepdim=True).clamp_min(1)
        new_level = ((magnitude * above).sum(-1, keepdim=True) - amount) / count
        if bool((new_level <= level * (1 + 1e-7)).all()):
            break
        level = torch.maximum(level, new_level)
    return torch.clamp(groups, -level, level)


def reduce_magnitude(
    weight: torch.Tensor,
    gram: torch.Tensor,
    span: int,
    alpha: float,
    max_iterations: int = 150,
    tolerance: float = 1e-4,
) -> MagrResult:
    """Minimise `1/2 ||(V - W) H^(1/2)||_F^2 + alpha * sum_groups ||v||_inf` from V = W (MagR eq. 3 and section 3).

    Accelerated proximal gradient (FISTA with restart on a rising step) with H divided by its largest eigenvalue,
    step 1. It stops when `||V_k+1 - V_k||_F <= tolerance * ||W||_F`, or after `max_iterations`.

    Args:
        weight: W, (out, in) float32.
        gram: damped H, (in, in) float.
        span: columns per group.
        alpha: weight of the penalty.
        max_iterations: upper limit of steps.
        tolerance: relative change under which it has converged.

    Returns:
        MagrResult.
    """
    metric = (gram / torch.linalg.eigvalsh(gram)[-1]).to(torch.float32)
    current = weight.clone()
    lookahead = current
    momentum = 1.0
    limit = tolerance * float(weight.norm())
    for iteration in range(1, max_iterations + 1):
        stepped = lookahead - (lookahead - weight) @ metric
        updated = shrink_infinity_norm(stepped.reshape(-1, span), alpha).view_as(weight)
        change = updated - current
        if float(change.norm()) <= limit:
            return MagrResult(updated, iteration, True)
        # Restart the momentum where it points uphill (O'Donoghue and Candes, gradient scheme).
        if float(((lookahead - updated) * change).sum()) > 0:
            momentum = 1.0
        next_momentum = (1.0 + (1.0 + 4.0 * momentum**2) ** 0.5) / 2.0
        lookahead = updated + ((momentum - 1.0) / next_momentum) * change
        current, momentum = updated, next_momentum
    return MagrResult(current, max_iterations, False)
