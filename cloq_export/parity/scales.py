"""Whether the scale of every quantized module is the one that it should have, seen from outside the engine.

With `e = s - r` the error of serving, `s` the log-probabilities that are served and `r` the reference's, and
`d_m = dr / d f_m` what a relative change of module m's output does to them, an engine whose scale of module m is off by
a share a_m serves `e = a_m d_m` plus its rounding. The least-squares share and its standard error, which holds
whatever the rounding of each token is (White, Econometrica 48, 1980), are

    a_m = <e, d_m> / <d_m, d_m>,    se(a_m)^2 = sum_i (<e_i - a_m d_mi, d_mi>)^2 / <d_m, d_m>^2.

In float32, `e_i` is one number for each place i of the text, of the token that comes there. In half precision, where
rounding is what hides an error, it is a vector: the engine also lists the most probable others of each place, whose
rounding errors are less alike than what a module does to them. The reference says which others, and not the engine:
those whose rounding lifted them among the most probable would be chosen for their errors. And some places round much
more than others, so each has the weight `1 / (|e_i|^2 + median)` in all products, which leaves a_m as it is where e is
a multiple of d_m. What an engine in half precision rounds, the reference rounds in part alike when it computes in that
precision: with `c` the error that this gives it, `e - b c` stands in the place of e, `b = <e, c> / <c, c>` between 0
and 1. Without it, half precision in any engine would look like an error of a few thousandths of a scale.

One backward pass gives `<e, d_m>` of all modules, the gradient of `sum_i e_i r_i` with respect to their f_m; with drawn
signs in the place of e its square has the expectation `<d_m, d_m>` (Hutchinson, Communications in Statistics 19, 1990).
The few modules that explain the error best are then measured one by one, with d_m from a small change of f_m.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from cloq_export.engines.alternatives import Alternatives
from cloq_export.engines.transformers.reference import ReferenceModel
from cloq_export.parity.plain import Result

# A third of the fault that is to be found, 1% of one module's scale, so that its standard error has room.
SCALE_LIMIT = 0.003
# An error of scale is sure beyond so many standard errors: of a thousand modules of a healthy engine none reaches that
# in a hundred thousand measurements.
SURE = 6.0
# Modules that are measured one by one.
CANDIDATES = 4
# Other tokens of each place, of those that an engine lists: the last ones of its list may be missing there by rounding.
ALTERNATIVES = 16
# Fewer tokens know too little of their spread.
LEAST_TOKENS = 8
# Of one adapter among several: its own windows are judged too, and their spread must be known well.
_LEAST_TOKENS_OF_ONE_PATH = 128
_SIGN_DRAWS = 2
# Relative change of a module's output: small enough to be linear, large compared to the rounding of float32.
_STEP = 0.01


@dataclasses.dataclass(frozen=True)
class ServedWindow:
    """One window as it was served, with an adapter or without.

    Args:
        token_ids: n tokens.
        adapter: with which it was served; None is the base alone.
        tokens: that are looked at in each place, (n - 1, c) int64; ABSENT where the engine said nothing.
        served: log-probabilities of the engine, same shape.
        expected: of the reference, same shape.
        rounded: of the reference in the served precision, same shape; None where that is float32, or is not known.
    """

    ABSENT: ClassVar[int] = -1

    token_ids: Sequence[int]
    adapter: str | None
    tokens: torch.Tensor
    served: torch.Tensor
    expected: torch.Tensor
    rounded: torch.Tensor | None = None

    @classmethod
    def of_next(
        cls, token_ids: Sequence[int], adapter: str | None, served: torch.Tensor, expected: torch.Tensor
    ) -> ServedWindow:
        """Return a window of which the tokens that come are looked at alone.

        Args:
            token_ids: n tokens.
            adapter: as in the class.
            served: log-probabilities of the engine, (n - 1,) or more, of which the first count.
            expected: of the reference, same shape.
        """
        tokens = torch.tensor(token_ids[1:], dtype=torch.int64)[:, None]
        return cls(token_ids, adapter, tokens, served[: len(tokens), None], expected[: len(tokens), None])

    @classmethod
    def of_alternatives(
        cls,
        token_ids: Sequence[int],
        adapter: str | None,
        served: Alternatives,
        expected: Alternatives,
        rounded: torch.Tensor | None = None,
    ) -> ServedWindow:
        """Return a window of which the reference's most probable tokens are looked at too.

        Args:
            token_ids: n tokens.
            adapter: as in the class.
            served: what the engine lists.
            expected: what the reference lists.
            rounded: what the reference says of these tokens in the served precision, if that is known.
        """
        values, known = served.looked_up(expected.tokens)
        nothing = torch.zeros_like(expected.logprobs)
        return cls(
            token_ids,
            adapter,
            torch.where(known, expected.tokens, cls.ABSENT),
            values,
            torch.where(known, expected.logprobs, nothing),
            None if rounded is None else torch.where(known, rounded, nothing),
        )


@dataclasses.dataclass(frozen=True)
class ScaleError(Result):
    """What was found of one module that explains the error of serving better than others.

    Args:
        module: full name.
        adapters: with which the windows were served that show it; None is the base alone.
        error: a_m, the relative error of its scale.
        standard_error: of it.
        sure: what of the error is sure, `max(0, |a_m| - SURE standard errors)`.
    """

    module: str
    adapters: tuple[str | None, ...]
    error: float
    standard_error: float
    sure: float


@dataclasses.dataclass(frozen=True)
class ScaleErrors(Result):
    """What was found of the scales of all quantized modules.

    Args:
        adapters: that windows were served with; None is the base alone.
        tokens: on which scales were measured.
        modules: how many there are.
        unseen: modules that the text does not reach.
        largest: the largest sure error; None if nothing can be said.
        candidates: the modules that explain the error of serving best, the surest first.
        found: full name of each module -> the smallest error that would have been beyond the limit on all windows.
        rounding_shared: b, the share of the reference's own rounding in the served precision; None in float32.
    """

    adapters: tuple[str | None, ...]
    tokens: int
    modules: int
    unseen: tuple[str, ...] = ()
    largest: float | None = None
    candidates: tuple[ScaleError, ...] = ()
    found: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rounding_shared: float | None = None


def measure_scales(
    reference: ReferenceModel,
    windows: Sequence[ServedWindow],
    modules: Sequence[str],
    *,
    screened: int,
    limit: float,
    seed: int = 0,
) -> ScaleErrors:
    """Measure the relative errors of the scales of all quantized modules, as served.

    The codes are shared, so all windows are judged together, whatever they were served with; and each adapter's windows
    by themselves, where they are enough, because an engine may take another path for each.

    Args:
        reference: the yardstick.
        windows: all equally long, with as many tokens in each place.
        modules: full names of quantized modules.
        screened: tokens of each window, from its start, on which the modules are compared with each other.
        limit: error that is allowed, to say which one would have been found.
        seed: of the random signs.
    """
    adapters = tuple(dict.fromkeys(window.adapter for window in windows))
    # (windows, places, tokens in each place)
    table = torch.stack([window.served.double() - window.expected.double() for window in windows])
    table, shared = _without_shared_rounding(table, windows)
    count = table.shape[0] * table.shape[1]
    nothing = ScaleErrors(adapters, count, len(modules), rounding_shared=shared)
    if count < LEAST_TOKENS or not modules or not bool(torch.isfinite(table).all()):
        return nothing
    errors = _Errors.of_table(table)
    projections, squares = _screen(reference, windows, modules, errors, screened, seed)
    every = list(range(len(windows)))
    of_one = [rows for _, rows in _by_adapter(windows) if len(rows) * table.shape[1] >= _LEAST_TOKENS_OF_ONE_PATH]
    of_one = of_one if len(adapters) > 1 else []
    total = squares.sum(0)
    seen = [number for number in range(len(modules)) if total[number] > 0]
    # What one adapter's windows show is measured on these alone: in all, every window `CANDIDATES` times at most.
    chosen = [(number, every) for number in _best(projections, squares, every, seen)[: CANDIDATES - bool(of_one)]]
    on_every = {number for number, _ in chosen}
    for rows in of_one:
        chosen += [(number, rows) for number in _best(projections, squares, rows, seen)[:1] if number not in on_every]
    candidates, widening = [], 1.0
    for number, rows in chosen:
        d = dict(zip(rows, _effect(reference, [windows[row] for row in rows], modules[number]), strict=True))
        for own in [rows, *of_one] if rows is every else [rows]:
            names = tuple(dict.fromkeys(windows[row].adapter for row in own))
            effect = torch.stack([d[row] for row in own]).flatten(0, 1)
            found, factor = _judged(modules[number], names, errors.of(own), effect)
            widening = max(widening, factor) if own is every else widening
            candidates.append(found)
    candidates.sort(key=lambda each: (-each.sure, -abs(each.error) / (each.standard_error or math.inf)))
    # Of a module that was not measured by itself the standard error is that of equal rounding everywhere, widened as
    # much as it was for those that were.
    noise = widening * errors.size()
    shares = total * (table.numel() / max(1, table[:, : screened - 1].numel()))
    return dataclasses.replace(
        nothing,
        unseen=tuple(module for number, module in enumerate(modules) if number not in set(seen)),
        largest=max((each.sure for each in candidates), default=None),
        candidates=tuple(candidates),
        found={modules[number]: limit + SURE * noise / math.sqrt(float(shares[number])) for number in seen},
    )


def share_windows(windows: int, tokens: int, window: int, subjects: int) -> tuple[int, list[tuple[int, int]]]:
    """Return on how many tokens of which windows scales are measured, for a budget that all subjects share.

    Args:
        windows: how many there are.
        tokens: the budget.
        window: tokens in a window.
        subjects: how many adapters there are, and the base.

    Returns:
        (tokens from the start of each window, list of (number of a window, number of the subject)).
    """
    length = min(window, max(_LEAST_TOKENS_OF_ONE_PATH + 1, tokens // subjects))
    pieces = max(subjects, min(windows, -(-tokens // length)))
    return length, [(number % windows, number % subjects) for number in range(pieces)]


@dataclasses.dataclass(frozen=True)
class _Errors:
    """Errors of serving with the weights of their places.

    Args:
        e: (windows, places, tokens in each place), or without windows.
        w: of the places, with one entry where the tokens stand.
    """

    e: torch.Tensor
    w: torch.Tensor

    @classmethod
    def of_table(cls, e: torch.Tensor) -> _Errors:
        """Return errors, places that round little counting more where their tokens tell how much they round."""
        if e.shape[-1] == 1:
            return cls(e, torch.ones_like(e))
        square = e.square().mean(-1, keepdim=True)
        return cls(e, 1 / (1 + square / square.median().clamp(min=1e-300)))

    def of(self, rows: Sequence[int]) -> _Errors:
        """Return the errors of some windows, their places one behind the other."""
        return _Errors(self.e[rows].flatten(0, 1), self.w[rows].flatten(0, 1))

    def size(self) -> float:
        """Return the size of an error in a place of the weight 1."""
        return math.sqrt(float((self.w * self.e.square()).sum()) / max(1, self.e.numel() - 1))


def _without_shared_rounding(table: torch.Tensor, windows: Sequence[ServedWindow]) -> tuple[torch.Tensor, float | None]:
    """Return errors without what the reference's own rounding explains of them, and its share."""
    if any(window.rounded is None for window in windows):
        return table, None
    c = torch.stack([window.rounded.double() - window.expected.double() for window in windows])  # type: ignore[union-attr]
    square = float(c.square().sum())
    share = min(1.0, max(0.0, float((table * c).sum()) / square)) if square > 0 else 0.0
    if not math.isfinite(share):
        return table, None
    return table - share * c, share


def _best(projections: torch.Tensor, squares: torch.Tensor, rows: Sequence[int], seen: Sequence[int]) -> list[int]:
    """Return the numbers of the modules, those first that explain the error in these windows best."""
    explained = projections[rows].sum(0).square() / squares[rows].sum(0).clamp(min=1e-300)
    return sorted(seen, key=lambda number: -float(explained[number]))


def _screen(
    reference: ReferenceModel,
    windows: Sequence[ServedWindow],
    modules: Sequence[str],
    errors: _Errors,
    screened: int,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `<e, d_m>` and an estimate of `<d_m, d_m>` on the first tokens, (windows, modules) float64."""
    e, w = errors.e[:, : screened - 1], errors.w[:, : screened - 1]
    generator = torch.Generator().manual_seed(seed)
    signs = [2.0 * torch.randint(2, e.shape, generator=generator) - 1 for _ in range(_SIGN_DRAWS)]
    # Rounding errors are small numbers: their size is taken out before float32 sees them.
    size = float(e.abs().max()) or 1.0
    weights = [w * e / size, *(w.sqrt() * each for each in signs)]
    products = torch.zeros(len(weights), len(windows), len(modules), dtype=torch.float64)
    for adapter, rows in _by_adapter(windows):
        short = [windows[row].token_ids[:screened] for row in rows]
        tokens = torch.stack([windows[row].tokens[: screened - 1] for row in rows])
        weighted = [weight[rows] * (tokens != ServedWindow.ABSENT) for weight in weights]
        products[:, rows] = reference.scale_gradients(short, adapter, modules, tokens.clamp(min=0), weighted)
    return products[0] * size, products[1:].square().mean(0)


def _effect(reference: ReferenceModel, windows: Sequence[ServedWindow], module: str) -> torch.Tensor:
    """Return d of a module, (windows, n - 1, c) float64."""
    effects = [torch.empty(0)] * len(windows)
    for adapter, rows in _by_adapter(windows):
        own = [windows[row] for row in rows]
        with reference.scaled(adapter, module, 1 + _STEP):
            changed = reference.logprobs_of([window.token_ids for window in own], adapter, [w.tokens for w in own])
        for row, window, values in zip(rows, own, changed, strict=True):
            present = window.tokens != ServedWindow.ABSENT
            effects[row] = (values.double() - window.expected.double()) * present / _STEP
    return torch.stack(effects)


def _by_adapter(windows: Sequence[ServedWindow]) -> list[tuple[str | None, list[int]]]:
    names = dict.fromkeys(window.adapter for window in windows)
    return [(name, [row for row, window in enumerate(windows) if window.adapter == name]) for name in names]


def _judged(
    module: str, adapters: tuple[str | None, ...], errors: _Errors, d: torch.Tensor
) -> tuple[ScaleError, float]:
    """Return what was found, and by how much the standard error exceeds that of equal rounding everywhere.

    Args:
        module: full name.
        adapters: of the windows.
        errors: of serving, (places, tokens in each place).
        d: what the module does, same shape.
    """
    e, w = errors.e, errors.w
    square = float((w * d * d).sum())
    if not square or not math.isfinite(square):
        return ScaleError(module, adapters, 0.0, 0.0, 0.0), 1.0
    error = float((w * e * d).sum()) / square
    rest = dataclasses.replace(errors, e=e - error * d)
    # Tokens of one place round together; places do not.
    standard_error = float((w * rest.e * d).sum(-1).norm()) / square
    equal = rest.size() / math.sqrt(square)
    sure = max(0.0, abs(error) - SURE * standard_error)
    return ScaleError(module, adapters, error, standard_error, sure), standard_error / equal if equal else 1.0
