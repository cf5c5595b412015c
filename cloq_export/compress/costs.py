"""What every grid and rank of each layer costs the model, measured."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from cloq_export.adapt import GramRoot, init_cloq
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.artifact.stored_sizes import bytes_of
from cloq_export.compress.low_rank_first import leading_product, taken_out
from cloq_export.compress.problem import ADAPTER_DTYPES, SolvedLayer
from cloq_export.compress.session import Session
from cloq_export.compress.solve import SolveRequest, root_of
from cloq_export.compress.workers import LocalWorkers
from cloq_export.errors import CloqError, ShapeError
from cloq_export.formats.registry import LAYOUTS
from cloq_export.models.blocks import find_linears
from cloq_export.models.stream import BlockStream
from cloq_export.quantize import DampedGram, QuantizeOptions, damp_gram, quantize_group
from cloq_export.recipe import Recipe
from cloq_export.types import QuantSpec

_DIVERGENCES = "divergences"

BITS = (2, 3, 4)
GROUP_SIZES = (32, 64, 128)
RANKS = (0, 8, 16, 32, 64, 128)


@dataclasses.dataclass(frozen=True)
class GridCosts:
    """What the layers that read one input lose on one grid.

    Args:
        bits: width of a code.
        group_size: input channels that share a scale.
        left: full module name -> error that is left with each rank of `candidate_ranks`.
    """

    bits: int
    group_size: int
    left: Mapping[str, Sequence[float]]


@dataclasses.dataclass(frozen=True)
class GroupCosts:
    """What the layers that read one input lose on every grid.

    Args:
        grids: what they lose on each.
        left_by_cheapest: the error on the grid on which their divergence is measured, without adapters.
    """

    grids: Sequence[GridCosts]
    left_by_cheapest: float

    @property
    def names(self) -> list[str]:
        """Return the full names of the layers."""
        return list(self.grids[0].left)

    @classmethod
    def read(cls, directory: RunDirectory, module: str) -> GroupCosts:
        """Return the costs of the group whose first layer is named, as `CostMeter` has written them."""
        content = directory.read_report(report_of(module))
        return cls([GridCosts(**grid) for grid in content["grids"]], content["left_by_cheapest"])


class CostMeter:
    """Solves each layer on its cheapest grid, and records the error of every other grid at every rank.

    The loss of a layer is `sum_{k > r} s_k^2`, s the singular values of `(Q - W) R^T`, `R^T R = H`: what the closed
    form of rank r leaves (CLoQ Theorem 3.1). With rounds of low rank first Q differs for each rank: it is the better of
    Q for the weight itself and Q of a single round, because all rounds on all grids would take hours.

    Args:
        recipe: every option of the run.
        device: where to solve.
        directory: where the figures go, under a report of its own for each group.
    """

    def __init__(self, recipe: Recipe, device: torch.device, directory: RunDirectory) -> None:
        self._recipe = recipe
        self._device = device
        self._directory = directory
        self._cheapest = LocalWorkers([device])

    def solve(self, requests: Iterable[SolveRequest]) -> Iterator[dict[str, SolvedLayer]]:
        """Yield the layers of each request on its cheapest grid, after the costs of all grids were written."""
        for request in requests:
            free = [plan.name for plan in request.plans if not self._recipe.override_for(plan.name)]
            for solved in self._cheapest.solve([request]):
                if free:
                    self._directory.write_report(report_of(request.plans[0].name), self._measure(request, free, solved))
                yield solved

    @torch.no_grad()
    def _measure(self, request: SolveRequest, names: Sequence[str], cheapest: Mapping[str, SolvedLayer]) -> GroupCosts:
        gram = request.stats.gram.to(self._device)
        empty = request.stats.tokens + request.stats.lent_tokens == 0 or float(gram.diagonal().sum()) == 0.0
        damped = None if empty else damp_gram(gram, self._recipe.damping)
        recipe = self._recipe
        options = QuantizeOptions(
            recipe.method,
            recipe.grid,
            recipe.magr_alpha,
            recipe.sweeps,
            recipe.refit,
            range_shrink=recipe.range_shrink,
        )
        weights = [request.weights[name].to(self._device, torch.float32) for name in names]
        shapes = [tuple(weight.shape) for weight in weights]
        grids = []
        taken = None
        if recipe.low_rank_rounds and damped is not None:
            taken = _TakenOut(recipe, dict(zip(names, weights, strict=True)), damped, root_of(request.stats, damped))
        for spec in candidate_grids(recipe, shapes):
            layers = quantize_group(weights, spec, damped, options).layers
            left = {
                name: _left_by_rank(weight - layer.dequantize(), damped, candidate_ranks(recipe, name, shape))
                for name, weight, layer, shape in zip(names, weights, layers, shapes, strict=True)
            }
            if taken is not None:
                for name, at, value in taken.left(spec, options):
                    left[name][at] = min(left[name][at], value)
            grids.append(GridCosts(spec.bits, spec.group_size, left))
        stored = (weight - cheapest[name].weight for name, weight in zip(names, weights, strict=True))
        return GroupCosts(grids, sum(_left_by_rank(error, damped, [0])[0] for error in stored))


class _TakenOut:
    """What one round of low rank first leaves of some layers of one input, for every rank.

    Args:
        recipe: every option of the run.
        weights: module -> W, (out, in) float32.
        damped: the damped H.
        root: its root.
    """

    def __init__(self, recipe: Recipe, weights: Mapping[str, torch.Tensor], damped: DampedGram, root: GramRoot) -> None:
        self._recipe, self._weights, self._damped = recipe, weights, damped
        self._ranks = {name: candidate_ranks(recipe, name, tuple(weight.shape)) for name, weight in weights.items()}
        # A round takes less than the whole layer out, see `LowRankFirst`.
        self._pairs = {
            name: init_cloq(weight, torch.zeros_like(weight), root, self._ranks[name][-1]).pair
            for name, weight in weights.items()
            if self._ranks[name][-1]
        }

    def left(self, spec: QuantSpec, options: QuantizeOptions) -> Iterator[tuple[str, int, float]]:
        """Yield module, number of its rank, and `sum_{k > r} s_k^2` of what the codes of the round leave on a grid."""
        for rank in sorted({rank for name in self._pairs for rank in self._ranks[name] if rank}):
            kept = taken_out(rank, self._recipe.low_rank_share)
            names = [
                name for name in self._pairs if rank in self._ranks[name] and kept < min(self._weights[name].shape)
            ]
            if not names:
                continue
            rest = [self._weights[name] - leading_product(self._pairs[name], kept) for name in names]
            layers = quantize_group(rest, spec, self._damped, options).layers
            for name, layer in zip(names, layers, strict=True):
                error = self._weights[name] - layer.dequantize()
                yield name, self._ranks[name].index(rank), _left_by_rank(error, self._damped, [rank])[0]


def _left_by_rank(error: torch.Tensor, damped: DampedGram | None, ranks: Sequence[int]) -> list[float]:
    """Return `sum_{k > r} s_k^2` of an error (out, in) under H for each rank r."""
    weighted = (error if damped is None else damped.weighted(error)).to(torch.float64)
    gram = weighted @ weighted.t() if weighted.shape[0] <= weighted.shape[1] else weighted.t() @ weighted
    squares = torch.linalg.eigvalsh(gram).clamp_min(0.0)  # ascending
    return [float(squares[: len(squares) - rank].sum()) for rank in ranks]


def candidate_grids(recipe: Recipe, shapes: Sequence[tuple[int, ...]]) -> list[QuantSpec]:
    """Return the grids that layers of some shapes, (out, in), can take in the recipe's layout.

    Raises:
        ShapeError: there is none.
    """
    sizes = dict.fromkeys((*GROUP_SIZES, recipe.group_size))
    grids = []
    for bits in BITS:
        for size in sizes:
            spec = QuantSpec(bits, size, recipe.symmetric)
            with contextlib.suppress(CloqError):
                for out_features, in_features in shapes:
                    spec.group_count(in_features)
                    LAYOUTS[recipe.format].check_packable(out_features, in_features, spec)
                grids.append(spec)
    if not grids:
        raise ShapeError(
            f"no grid of {', '.join(map(str, BITS))} bits with groups of {', '.join(map(str, sizes))} fits layers of "
            f"{' and '.join(f'{out} x {into}' for out, into in shapes)}; leave them in float with `overrides`."
        )
    return grids


def candidate_ranks(recipe: Recipe, module: str, shape: tuple[int, ...]) -> list[int]:
    """Return the ranks that a layer of a shape, (out, in), can take: at most the recipe's."""
    largest = min(recipe.rank_for(module), *shape)
    return sorted({*(rank for rank in RANKS if rank <= largest), largest})


def stored_bits(recipe: Recipe, shape: tuple[int, ...], spec: QuantSpec, rank: int) -> int:
    """Return the bits of codes, scales, zeros and adapter of a layer, as `cloq inspect` counts them."""
    layout = LAYOUTS[recipe.format]
    parts = layout.headers(shape[0], shape[1], spec)
    coded = bytes_of(header for part, header in parts.items() if layout.roles[part] != "index")
    return 8 * (coded + rank * sum(shape) * ADAPTER_DTYPES[recipe.adapter_dtype].itemsize)


def report_of(module: str) -> str:
    """Return the name of the report on the group whose first layer is named."""
    return f"costs-{module}"


def divergences_of(
    session: Session,
    stream: BlockStream,
    tokens: int,
    groups: Sequence[GroupCosts],
    work: RunDirectory,
) -> dict[str, float]:
    """Return the divergence of the model with each group of layers as `work` holds it, by the group's first layer.

    Args:
        session: the call.
        stream: the float model on some windows.
        tokens: how many tokens those hold.
        groups: the costs of each group of layers.
        work: holds the codes, and keeps the divergences.
    """
    measured: dict[str, float] = dict(work.read_report(_DIVERGENCES)) if _DIVERGENCES in work.reports() else {}
    of_group = [group.names for group in groups]
    missing = [names for names in of_group if names[0] not in measured]
    if not missing:
        return measured
    hidden = stream.hidden[0]
    shown = session.progress("measure each layer's weight in the whole")
    with torch.no_grad(), shown as progress, stream.head_on_device():
        expected = _log_probabilities(stream, _through(stream, 0, hidden))
        for index, block in enumerate(stream.blocks):
            linears = find_linears(block, stream.blocks.prefix(index))
            for names in (names for names in missing if names[0] in linears):
                with stream.block_on_device(index), _replaced(linears, names, work):
                    after = stream.forward_batch(index, 0, hidden)
                reached = _log_probabilities(stream, _through(stream, index + 1, after))
                divergence = nn.functional.kl_div(reached, expected, reduction="sum", log_target=True)
                # Rounding can leave a sum of almost nothing below zero.
                measured[names[0]] = max(0.0, float(divergence) / tokens)
                work.write_report(_DIVERGENCES, measured)
                progress(len(measured), len(of_group))
            hidden = stream.forward_batch(index, 0, hidden)
    return measured


def _through(stream: BlockStream, start: int, hidden: torch.Tensor) -> torch.Tensor:
    for index in range(start, len(stream.blocks)):
        hidden = stream.forward_batch(index, 0, hidden)
    return hidden


def _log_probabilities(stream: BlockStream, hidden: torch.Tensor) -> torch.Tensor:
    return stream.differentiable_logits(0, hidden, slice(None)).float().log_softmax(dim=-1)


@contextlib.contextmanager
def _replaced(linears: Mapping[str, nn.Linear], names: Sequence[str], work: RunDirectory) -> Iterator[None]:
    """Put the codes of a run into some linears for a while."""
    kept = {name: linears[name].weight.data for name in names}
    try:
        for name, weight in kept.items():
            linears[name].weight.data = work.read_codes(name).dequantize().to(weight)
        yield
    finally:
        for name, weight in kept.items():
            linears[name].weight.data = weight
