"""MagR: shrink the largest weights of each group along directions that the layer's inputs hardly use."""

from __future__ import annotations

import dataclasses

import torch

from cloq_export.kernels.dispatch import triton_takes_groups
from cloq_export.kernels.products import Precision, float32_products

# Newton settles in about five steps; only a wide group whose magnitudes crowd around the level takes a dozen or more.
_PROJECTION_STEPS = 64
_POWER_ITERATIONS = 300
# Proximal gradient steps, at most.
MOST_STEPS = 150
# Rows are independent given H. A chunk of them with all its temporaries stays in the cache through all iterations.
_CHUNK_ELEMENTS = 1 << 17


@dataclasses.dataclass(frozen=True)
class MagrResult:
    """What MagR did.

    Args:
        weight: the smoothed weight, (out, in) float32.
        iterations: proximal gradient steps of the slowest rows.
        converged: True if every row's relative change fell under the tolerance before the count ran out.
    """

    weight: torch.Tensor
    iterations: int
    converged: bool


def _clip_level(magnitude: torch.Tensor, amount: float, start: torch.Tensor) -> torch.Tensor:
    """Return tau with `sum(max(|v| - tau, 0)) = amount` per row, 0 where the l1 norm is at most `amount`.

    Newton's method on a convex, falling, piecewise linear function: one step from anywhere lands at or below the root,
    and from there on it climbs to the root in finitely many steps. So an old level is a good start.
    """
    level = start
    for step in range(_PROJECTION_STEPS):
        above = magnitude > level
        count = above.sum(-1, keepdim=True).clamp_min(1)
        new_level = (((magnitude * above).sum(-1, keepdim=True) - amount) / count).clamp_min(0.0)
        if step and bool((new_level <= level * (1 + 1e-7)).all()):
            break
        level = torch.maximum(level, new_level) if step else new_level
    return level


def shrink_infinity_norm(groups: torch.Tensor, amount: float, level: torch.Tensor | None = None) -> torch.Tensor:
    """Return the proximal map of `amount * ||v||_inf` on each row, `v - proj_{l1 ball of radius amount}(v)`.

    By Moreau's identity this clips `|v|` at the level tau with `sum(max(|v| - tau, 0)) = amount` (MagR section 3).

    Args:
        groups: (n, span) float.
        amount: radius, >= 0.
        level: tau, (n, 1): where the search starts, overwritten with where it ends; None starts at 0.

    Returns:
        Same shape: `sign(v) * min(|v|, tau)`, all zero where the l1 norm is at most `amount`.
    """
    level = groups.new_zeros(groups.shape[0], 1) if level is None else level
    if triton_takes_groups(groups.shape[1], groups, level):
        from cloq_export.kernels.triton.prox import clip_groups

        return clip_groups(groups.contiguous(), amount, level)
    level.copy_(_clip_level(groups.abs(), amount, level))
    return torch.clamp(groups, -level, level)


def _largest_eigenvalue(gram: torch.Tensor) -> float:
    """Return the largest eigenvalue of H by power iteration; inputs of real layers have a dominant direction."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(gram.shape[0], 1, generator=generator, dtype=gram.dtype).to(gram.device)
    value = 0.0
    for _ in range(_POWER_ITERATIONS):
        vector = gram @ (vector / vector.norm())
        previous, value = value, float(vector.norm())
        if value - previous <= 1e-9 * value:
            break
    return value


def reduce_magnitude(
    weight: torch.Tensor,
    gram: torch.Tensor,
    span: int,
    alpha: float,
    max_iterations: int = MOST_STEPS,
    tolerance: float = 3e-4,
) -> MagrResult:
    """Minimise `1/2 ||(V - W) H^(1/2)||_F^2 + alpha * sum_groups ||v||_inf` from V = W (MagR eq. 3 and section 3).

    Accelerated proximal gradient (FISTA with restart on a rising step) with H divided by its largest eigenvalue,
    step 1. It stops when `||V_k+1 - V_k||_F <= tolerance * ||W||_F`, or after `max_iterations`. A GPU takes its steps
    with operands rounded to TF32, which is seven times as fast. Where they have ended, a step in float32 is the check;
    if that still moves, it goes on in float32.

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
    metric = (gram / _largest_eigenvalue(gram)).to(torch.float32)
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[1]) if weight.device.type == "cpu" else weight.shape[0]
    descent = _Descent(metric, span, alpha, tolerance)
    parts = [descent.reduce(part, max_iterations) for part in weight.split(rows)]
    return MagrResult(
        torch.cat([part.weight for part in parts]),
        max(part.iterations for part in parts),
        all(part.converged for part in parts),
    )


@dataclasses.dataclass(frozen=True)
class _Descent:
    """FISTA on some rows of a weight.

    Args:
        metric: H over its largest eigenvalue, (in, in) float32.
        span: columns per group.
        alpha: weight of the penalty.
        tolerance: relative change under which it has converged.
    """

    metric: torch.Tensor
    span: int
    alpha: float
    tolerance: float

    def reduce(self, weight: torch.Tensor, most: int) -> MagrResult:
        """Return some rows after at most so many steps, and on a GPU one more, which checks where they ended."""
        if weight.device.type == "cpu":
            return self._descend(weight, weight, most, "highest")
        rounded = self._descend(weight, weight, most, "high")
        if not rounded.converged:
            return rounded
        exact = self._descend(weight, rounded.weight, max(1, most - rounded.iterations), "highest")
        steps = rounded.iterations + exact.iterations
        if exact.converged and exact.iterations == 1:
            return MagrResult(rounded.weight, steps, True)
        return MagrResult(exact.weight, steps, exact.converged)

    def _descend(self, weight: torch.Tensor, start: torch.Tensor, most: int, precision: Precision) -> MagrResult:
        current = lookahead = start
        momentum = 1.0
        limit = self.tolerance * float(weight.norm())
        level = weight.new_zeros(weight.numel() // self.span, 1)
        for iteration in range(1, most + 1):
            with float32_products(precision):
                stepped = torch.addmm(lookahead, weight - lookahead, self.metric).view(-1, self.span)
            updated = shrink_infinity_norm(stepped, self.alpha, level).view_as(weight)
            change = updated - current
            # Read together: a GPU's host waits once.
            moved, uphill = torch.stack([change.norm(), ((lookahead - updated) * change).sum()]).tolist()
            if moved <= limit:
                return MagrResult(updated, iteration, True)
            # Restart the momentum where it points uphill (O'Donoghue and Candes, gradient scheme).
            if uphill > 0:
                momentum = 1.0
            next_momentum = (1.0 + (1.0 + 4.0 * momentum**2) ** 0.5) / 2.0
            lookahead = updated + ((momentum - 1.0) / next_momentum) * change
            current, momentum = updated, next_momentum
        return MagrResult(current, most, False)
