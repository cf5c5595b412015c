"""Whether the scale of every quantized module is the one that it should have, seen from outside the engine.

With `e = s - r` the error of serving, `s` the log-probabilities that are served and `r` the reference's, and
`d_m = dr / d f_m` what a relative change of module m's output does to them, an engine whose scale of module m is off by
a share a_m serves `e = a_m d_m` beside its rounding. The least-squares share and its standard error, which holds
whatever the rounding of each token is (White, Econometrica 48, 1980), are

    a_m = <e, d_m> / <d_m, d_m>,    se(a_m)^2 = sum_i (e_i - a_m d_mi)^2 d_mi^2 / <d_m, d_m>^2.

One backward pass gives `<e, d_m>` of all modules, the gradient of `sum_i e_i r_i` with respect to their f_m; with drawn
signs in the place of e its square has the expectation `<d_m, d_m>` (Hutchinson, Communications in Statistics 19, 1990).
The few modules that explain the error best are then measured one by one, with d_m from a small change of f_m.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from cloq_export.engines.transformers.reference import ReferenceModel

# A third of the fault that is to be found, 1% of one module's scale, so that its standard error has room.
SCALE_LIMIT = 0.003
# An error of scale is sure beyond so many standard errors: of a thousand modules of a healthy engine none reaches that
# in a hundred thousand measurements.
SURE = 6.0
# Modules that are measured one by one.
CANDIDATES = 4
# Fewer tokens know too little of their spread.
LEAST_TOKENS = 8
_SIGN_DRAWS = 2
# Relative change of a module's output: small enough to be linear, large beside the rounding of float32.
_STEP = 0.01


@dataclasses.dataclass(frozen=True)
class ScaleError:
    """What was found of one module that explains the error of serving better than others.

    Args:
        module: full name.
        error: a_m, the relative error of its scale.
        standard_error: of it.
        sure: what of the error is sure, `max(0, |a_m| - SURE standard errors)`.
    """

    module: str
    error: float
    standard_error: float
    sure: float


def measure_scales(
    reference: ReferenceModel,
    token_ids: Sequence[Sequence[int]],
    adapter: str | None,
    modules: Sequence[str],
    served: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    *,
    screened: int,
    limit: float,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure the relative errors of the scales of all quantized modules, as served.

    Args:
        reference: the yardstick.
        token_ids: sequences of n tokens, all equally long.
        adapter: the adapter, or None.
        modules: full names of quantized modules.
        served: log-probabilities of the engine, one (n - 1,) tensor per sequence.
        expected: of the reference, same shapes.
        screened: tokens of each sequence, from its start, on which the modules are compared with each other.
        limit: error that is allowed, to say which one would have been found.
        seed: of the random signs.

    Returns:
        dict: "adapter", "tokens", "modules" (how many), "unseen" (modules that the text does not reach), "largest"
        (sure error; None if nothing can be said), "candidates" (`ScaleError` of each, the surest first) and "found"
        (full name of each module -> the smallest error that would have been beyond the limit).
    """
    table = torch.stack([a.double() - b.double() for a, b in zip(served, expected, strict=True)])
    count = table.numel()
    empty: dict[str, Any] = {"adapter": adapter, "tokens": count, "modules": len(modules), "unseen": []}
    if count < LEAST_TOKENS or not modules or not bool(torch.isfinite(table).all()):
        return empty | {"largest": None, "candidates": [], "found": {}}
    projections, squares = _screen(reference, token_ids, adapter, modules, table, screened, seed)
    seen = [number for number in range(len(modules)) if squares[number] > 0]
    explained = projections.square() / squares.clamp(min=1e-300)
    best = sorted(seen, key=lambda number: -float(explained[number]))[:CANDIDATES]
    candidates, widening = [], 1.0
    for number in best:
        d = _effect(reference, token_ids, adapter, modules[number], expected)
        found, factor = _judged(modules[number], table.flatten(), d)
        widening = max(widening, factor)
        candidates.append(found)
    candidates.sort(key=lambda each: (-each.sure, -abs(each.error) / (each.standard_error or math.inf)))
    # Of a module that was not measured by itself the standard error is that of equal rounding everywhere, widened as
    # much as it was for those that were.
    noise = widening * float(table.norm()) / math.sqrt(count - 1)
    shares = squares * (count / max(1, table[:, : screened - 1].numel()))
    return empty | {
        "unseen": [module for number, module in enumerate(modules) if number not in set(seen)],
        "largest": max((each.sure for each in candidates), default=None),
        "candidates": [dataclasses.asdict(each) for each in candidates],
        "found": {modules[number]: limit + SURE * noise / math.sqrt(float(shares[number])) for number in seen},
    }


def _screen(
    reference: ReferenceModel,
    token_ids: Sequence[Sequence[int]],
    adapter: str | None,
    modules: Sequence[str],
    table: torch.Tensor,
    screened: int,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `<e, d_m>` and an estimate of `<d_m, d_m>` on the first tokens of each sequence, (modules,) float64."""
    short = [ids[:screened] for ids in token_ids]
    errors = table[:, : len(short[0]) - 1]
    generator = torch.Generator().manual_seed(seed)
    signs = [2.0 * torch.randint(2, errors.shape, generator=generator) - 1 for _ in range(_SIGN_DRAWS)]
    # Rounding errors are small numbers: their size is taken out before float32 sees them.
    size = float(errors.abs().max()) or 1.0
    found = reference.scale_gradients(short, adapter, modules, [errors / size, *signs])
    return found[0].sum(0) * size, found[1:].square().mean(0).sum(0)


def _effect(
    reference: ReferenceModel,
    token_ids: Sequence[Sequence[int]],
    adapter: str | None,
    module: str,
    expected: Sequence[torch.Tensor],
) -> torch.Tensor:
    with reference.scaled(adapter, module, 1 + _STEP):
        changed = reference.prompt_logprobs(token_ids, [adapter] * len(token_ids))
    return torch.cat([(a.double() - b.double()) / _STEP for a, b in zip(changed, expected, strict=True)])


def _judged(module: str, e: torch.Tensor, d: torch.Tensor) -> tuple[ScaleError, float]:
    """Return what was found, and by how much the standard error exceeds that of equal rounding everywhere."""
    square = float(d @ d)
    if not square or not math.isfinite(square):
        return ScaleError(module, 0.0, 0.0, 0.0), 1.0
    error = float(e @ d) / square
    rest = e - error * d
    standard_error = float((rest * d).norm()) / square
    equal = float(rest.norm()) / math.sqrt(square * max(1, e.numel() - 1))
    sure = max(0.0, abs(error) - SURE * standard_error)
    return ScaleError(module, error, standard_error, sure), standard_error / equal if equal else 1.0
