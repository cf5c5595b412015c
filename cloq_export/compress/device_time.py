"""How long a run would take a GPU at its published rates, counted before the work from the shapes of its layers.

Operations, bytes and launches follow the code: `test_device_time.py` holds the operations against torch's own
counter. What is counted is the least: no kernel reaches a card's peak, and what a library does beside the arithmetic is
not in it.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cloq_export.adapt.cloq import EXACT_SIDE, MOST_ITERATIONS, OVERSAMPLING
from cloq_export.compress.block_shape import BlockShape, InputGroup
from cloq_export.compress.cards import Arithmetic, Card
from cloq_export.compress.strategies import TOKENS_PER_BATCH
from cloq_export.quantize.damping import SUBSPACE, SUBSPACE_ITERATIONS
from cloq_export.quantize.magr import MOST_STEPS
from cloq_export.quantize.optq import BLOCK_COLUMNS
from cloq_export.recipe import Recipe

# What a launch costs at the least when nothing else is going on; it is what CUDA's own samples measure.
LAUNCH_SECONDS = 5e-6
_HALF, _SINGLE, _DOUBLE = 2, 4, 8
# Launches of one visited column of a sweep, which torch computes.
_OF_COLUMN = 7
# Rows and columns of H that one program sums, as in `kernels.triton.gram`.
_GRAM_TILE = 128


@dataclasses.dataclass(frozen=True)
class Work:
    """What one kernel has to do in one stage of a run.

    Args:
        stage: its name, for people.
        kernel: its name, for people.
        arithmetic: how it multiplies.
        operations: a multiplication and an addition are two.
        bytes: that it reads from and writes to the device's memory at the least.
        launches: how often something is launched.
        link: bytes between host and device.
    """

    stage: str
    kernel: str
    arithmetic: Arithmetic = "float32"
    operations: float = 0.0
    bytes: float = 0.0
    launches: float = 0.0
    link: float = 0.0

    def times(self, factor: float) -> Work:
        """Return the work done so many times."""
        done = {name: getattr(self, name) * factor for name in ("operations", "bytes", "launches", "link")}
        return dataclasses.replace(self, **done)

    def seconds(self, card: Card) -> float:
        """Return the least time that it takes a card: that of what limits it most."""
        return max(
            self.operations / card.operations[self.arithmetic],
            self.bytes / card.memory,
            self.link / card.link,
            self.launches * LAUNCH_SECONDS,
        )


@dataclasses.dataclass(frozen=True)
class CountedSteps:
    """How many steps the iterations are counted with whose end their numbers decide.

    Args:
        magr: proximal steps of MagR with rounded operands.
        exact: those in float32 that follow.
        subspace: steps of the truncated SVD in float32.
        subspace_exact: those in float64 that follow.
    """

    magr: int = MOST_STEPS
    exact: int = 1
    subspace: int = MOST_ITERATIONS
    subspace_exact: int = 1


LIMITS = CountedSteps()


def forward_work(shape: BlockShape, recipe: Recipe, *, narrow: bool) -> list[Work]:
    """Return the forward passes of a block over all windows, and the copies of its weights.

    Args:
        shape: of the block.
        recipe: every option of the run.
        narrow: weights and activations have 16 bits.
    """
    windows, refined = recipe.samples, recipe.refine != "none"
    streams = 1.0
    if recipe.error_aware or refined:
        # The float stream; behind a refinement the compressed one runs again.
        streams += (1.0 if refined else recipe.float_share) + refined
    passes = Work(
        "forward",
        "blocks",
        "half" if narrow else "float32",
        shape.operations * windows * streams,
        shape.traffic * windows * streams,
        shape.launches * windows * streams,
    )
    return [passes, Work("weights from the host", "copy", link=float(shape.weights), launches=1)]


def statistics_work(shape: BlockShape, recipe: Recipe, tokens: int, *, narrow: bool) -> list[Work]:
    """Return the sums of all inputs of a block.

    Args:
        shape: of the block.
        recipe: every option of the run.
        tokens: of all calibration windows.
        narrow: activations have 16 bits, so that H is summed on the matrix units.
    """
    drifts = recipe.error_aware > 0.0
    narrow = narrow and recipe.token_weighting == "none"
    item = _HALF if narrow else _SINGLE
    batches = max(1, tokens // TOKENS_PER_BATCH)
    found = []
    for group in shape.groups:
        n, met = group.in_features, tokens * group.share
        tiles = math.ceil(n / _GRAM_TILE)
        # Tiles on and above the diagonal; a cache hands a token's numbers to all of them.
        gram = met * tiles * (tiles + 1) * _GRAM_TILE**2
        moved = item * met * n + _DOUBLE * n * n
        found.append(Work("statistics", "gram", "half" if narrow else "float32", gram, moved, batches))
        if drifts and group.share == 1.0:
            paired = met * recipe.float_share
            found.append(Work("statistics", "drift", "tf32", 2 * paired * n * n, 6 * _SINGLE * paired * n, 4 * batches))
    return found


def solve_work(group: InputGroup, recipe: Recipe, steps: CountedSteps = LIMITS) -> list[Work]:
    """Return the solve of the layers that read one input, with their certificates.

    Args:
        group: the layers.
        recipe: every option of the run.
        steps: of the iterations whose end their numbers decide.
    """
    n, outs, rank = group.in_features, group.outs, group.rank
    square, every = float(n * n), sum(outs)
    moves = recipe.error_aware > 0.0 and group.share == 1.0
    rounds = recipe.low_rank_rounds if rank else 0
    found = [
        Work("factorisations", "Cholesky", "float64", n**3 / 3, 3 * _DOUBLE * square, 3),
        # The condition number, by power iteration and its inverse.
        Work("factorisations", "power iteration", "float32", 8 * 4 * square, 8 * 3 * _SINGLE * square, 8 * 6),
    ]
    if moves:
        if recipe.float_share < 1.0:
            found.append(Work("factorisations", "Cholesky", "float32", n**3 / 3, 3 * _SINGLE * square, 3))
        pulled = Work("targets", "pull and triangular solves", "float32", 4 * square * every)
        found.append(dataclasses.replace(pulled, bytes=_SINGLE * (2 * square + 4 * n * every), launches=5 * len(outs)))
    codes = _codes_work(n, every, recipe, steps)
    pairs = [work for out in outs for work in _pair_work(n, out, rank, recipe, steps)] if rank else []
    found += [work.times(1 + rounds) for work in codes]
    found += [work.times(1 + rounds + bool(rounds)) for work in pairs]
    # Weighted by L: the target, what codes leave of it and, with an adapter, what both leave; what a round leaves.
    products = 3 + rounds + bool(rounds) if rank else 2
    weighted = 2 * square * every * products + (2 * rank * n * every if rank else 0)
    norms = 2 * (2 * SUBSPACE_ITERATIONS + 1) * 2 * SUBSPACE * n * every
    found.append(
        Work("certificates", "errors under H", "float32", weighted, _SINGLE * products * (square + 2 * n * every), 20)
    )
    passes = 2 * (2 * SUBSPACE_ITERATIONS + 1)
    found.append(Work("certificates", "largest singular value", "float32", norms, passes * _SINGLE * n * every, 60))
    stored = n * every + (_HALF * rank * (n * len(outs) + every) if rank else 0)
    return [*found, Work("layers to the host", "copy", link=float(stored), launches=3 * len(outs))]


def _codes_work(n: int, every: int, recipe: Recipe, steps: CountedSteps) -> list[Work]:
    square, matrix = float(n * n), float(n * every)
    found = []
    if recipe.method == "magr":
        # Each step: the product, then about ten passes over matrices of the weight's size; the last one is exact.
        step = Work("MagR", "proximal steps", "tf32", 2 * square * every, 10 * _SINGLE * matrix, 12)
        found += [
            step.times(steps.magr),
            dataclasses.replace(step, kernel="exact steps", arithmetic="float32").times(steps.exact),
            Work("MagR", "largest eigenvalue", "float64", 300 * 2 * square, 300 * _DOUBLE * square, 300 * 4),
        ]
    trials = 16 if recipe.grid == "searched" else 1
    found.append(Work("grids", "grid search", "float32", 8 * trials * matrix, 2 * _SINGLE * matrix, 8))
    if recipe.method == "rtn":
        return found
    blocks = math.ceil(n / BLOCK_COLUMNS)
    handed = max(0.0, square - BLOCK_COLUMNS * n) * every
    # Every block reads and writes what it hands errors on to.
    moved = _SINGLE * (matrix * blocks + 5 * matrix)
    found += [
        Work("factorisations", "Cholesky, reversed", "float64", n**3 / 3, 5 * _DOUBLE * square, 8),
        Work("columns", "errors handed on", "float32", handed, moved, blocks),
        Work("columns", "column walk", "float32", BLOCK_COLUMNS * matrix, 4 * _SINGLE * matrix, 2 * blocks),
    ]
    if recipe.sweeps:
        swept = Work("sweeps", "sweep", "float32", 3 * square * every, moved, _OF_COLUMN * n)
        found.append(swept.times(recipe.sweeps))
    if recipe.refit:
        groups = 1 if recipe.group_size < 0 else n // recipe.group_size
        fitted = Work("sweeps", "refit", "float32", 4 * square * every, _SINGLE * 4 * matrix * groups, 4 * groups)
        solved = Work("sweeps", "refit", "float64", every * (2 * groups**3 / 3 + 4 * groups**2))
        found += [work.times(max(recipe.sweeps, 1)) for work in (fitted, solved)]
    return found


def _pair_work(n: int, out: int, rank: int, recipe: Recipe, steps: CountedSteps) -> list[Work]:
    if recipe.init == "svd":
        rooted = []
    else:
        rooted = [
            Work("adapters", "R dW", "float64", 2.0 * n * n * out, _DOUBLE * (n * n + 3.0 * n * out), 4),
            Work("adapters", "triangular solve", "float64", float(n * n * rank), _DOUBLE * float(n * n), 1),
        ]
    side, other = min(n, out), max(n, out)
    matrix = float(n * out)
    if recipe.svd == "full":
        # Thin, by a QR first (Golub and Van Loan, Matrix Computations, figure 8.6.1).
        return [*rooted, Work("adapters", "full SVD", "float64", 6.0 * other * side**2 + 20.0 * side**3)]
    if side <= EXACT_SIDE:
        products = 2 * matrix * (side + rank) + 2.0 * rank * rank * (n + out) + 4.0 * other * rank**2
        exact = Work("adapters", "eigenvectors", "float64", 9.0 * side**3)
        return [*rooted, exact, Work("adapters", "SVD products", "float64", products, 4 * _DOUBLE * matrix, 10)]
    width = min(rank + OVERSAMPLING, side)
    once = 2 * matrix * width + 4.0 * n * width**2
    step = 2 * matrix * (3 * width + rank) + (4.0 * (n + out) + 2.0 * n + 6.0 * out) * width**2 + 20.0 * width**3
    iteration = Work("adapters", "subspace iteration", "float32", step, 4 * _SINGLE * matrix, 40)
    exact = Work("adapters", "exact subspace steps", "float64", step, 4 * _DOUBLE * matrix, 40)
    return [
        *rooted,
        Work("adapters", "start of the subspace", "float64", once, _DOUBLE * matrix, 4),
        iteration.times(steps.subspace),
        exact.times(steps.subspace_exact),
    ]


def run_work(shapes: Iterable[BlockShape], recipe: Recipe, *, narrow: bool, steps: CountedSteps = LIMITS) -> list[Work]:
    """Return the work of the walk over all blocks, each kernel of a stage once.

    Args:
        shapes: every kind of block, with how many there are of it.
        recipe: every option of the run.
        narrow: weights and activations have 16 bits.
        steps: of the iterations whose end their numbers decide.
    """
    tokens = recipe.samples * recipe.seqlen
    every: list[Work] = []
    for shape in shapes:
        of_block = forward_work(shape, recipe, narrow=narrow) + statistics_work(shape, recipe, tokens, narrow=narrow)
        for group, count in collections.Counter(shape.groups).items():
            of_block += [work.times(count) for work in solve_work(group, recipe, steps)]
        every += [work.times(shape.alike) for work in of_block]
    kinds: dict[tuple[str, str, str], list[Work]] = {}
    for work in every:
        kinds.setdefault((work.stage, work.kernel, work.arithmetic), []).append(work)
    return [_summed(same) for same in kinds.values()]


def _summed(same: Sequence[Work]) -> Work:
    total: Callable[[str], float] = lambda name: sum(getattr(work, name) for work in same)  # noqa: E731
    return dataclasses.replace(
        same[0],
        operations=total("operations"),
        bytes=total("bytes"),
        launches=total("launches"),
        link=total("link"),
    )


@dataclasses.dataclass(frozen=True)
class CardTime:
    """The least time that a run takes a card.

    Args:
        card: its name.
        source: of its figures.
        stages: stage -> seconds.
        dominating: the kernel that takes most, with its stage.
        share: of the whole that it takes.
    """

    card: str
    source: str
    stages: Mapping[str, float]
    dominating: str
    share: float

    @property
    def seconds(self) -> float:
        """Return the whole time, if nothing runs beside anything else."""
        return sum(self.stages.values())

    @classmethod
    def of(cls, works: Sequence[Work], card: Card) -> CardTime:
        """Return what a card needs for works."""
        stages: dict[str, float] = {}
        for work in works:
            stages[work.stage] = stages.get(work.stage, 0.0) + work.seconds(card)
        most = max(works, key=lambda work: work.seconds(card))
        name = most.stage if most.kernel in ("blocks", "copy") else f"{most.stage}: {most.kernel}"
        return cls(card.name, card.source, stages, name, most.seconds(card) / sum(stages.values()))

    def to_json(self) -> dict[str, Any]:
        """Return what `cloq run --plan --json` prints of it."""
        return {**dataclasses.asdict(self), "seconds": self.seconds}
