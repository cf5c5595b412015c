"""Walk through the blocks of a model: collect statistics, solve, store, and carry the activations on."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import nn

from cloq_export.calibrate.gram import GramAccumulator
from cloq_export.compress.batches import Batches
from cloq_export.compress.block_refined import SolvedBlock
from cloq_export.compress.block_shape import block_shapes
from cloq_export.compress.device_memory import Placement, largest_shape
from cloq_export.compress.ends import as_it_should_be, head_inputs
from cloq_export.compress.expert_tokens import ExpertTokens
from cloq_export.compress.plan import ModulePlan
from cloq_export.compress.problem import SolvedLayer
from cloq_export.compress.solve import SolveRequest, served_weight
from cloq_export.compress.walked_block import WalkedBlock
from cloq_export.compress.workers import LocalWorkers, Workers
from cloq_export.errors import NonFiniteError
from cloq_export.kernels.gpu import cuda
from cloq_export.models.blocks import find_linears
from cloq_export.models.experts import calling_experts
from cloq_export.models.lockstep import GroupInputs, run_in_lockstep
from cloq_export.models.shared_inputs import shared_inputs
from cloq_export.process.progress import show_progress
from cloq_export.types import LayerStats

if TYPE_CHECKING:
    from cloq_export.compress.job import CompressJob

FLOAT_STREAM, COMPRESSED_STREAM = 0, 1
# One list of hidden states for each stream.
Streams = list[list[torch.Tensor]]


@dataclasses.dataclass
class Seconds:
    """Time that the walk spent, by stage."""

    forward_and_statistics: float = 0.0
    solve: float = 0.0
    refine: float = 0.0
    write: float = 0.0

    @property
    def beside_forward(self) -> float:
        """Return what was not spent in forward passes and statistics."""
        return self.solve + self.refine + self.write


class BlockWalk:
    """One walk through all blocks, storing each layer in the run directory as soon as it is finished.

    In the independent mode (CLoQ section 3: H from the full-precision activations) one float forward pass serves all
    layers. In the error-aware mode a second stream of activations runs behind the compressed prefix, layer by layer:
    what a layer is calibrated on is what the finished layers before it, in the same block too, put out. With a
    refinement both streams run, and the layers of a block are stored when the block is refined.

    Layers that the run directory already holds are not solved again; their blocks are only run through, with the same
    arithmetic, so that a resumed run ends with the same bytes.

    Args:
        job: what is compressed.
        console: where progress goes.
        workers: where layers that do not wait for each other are solved; None is the job's device.
        windows_per_batch: calibration windows of one forward pass; None takes the strategy's, or what fits the device.
    """

    def __init__(
        self,
        job: CompressJob,
        console: Console,
        *,
        workers: Workers | None = None,
        windows_per_batch: int | None = None,
    ) -> None:
        recipe, strategy = job.recipe, job.strategy
        self._job = job
        self._console = console
        self._initialisation = strategy.initialisation(recipe)
        # A refinement needs inputs that come from the compressed blocks, whether or not targets are error-aware.
        self._error_aware = recipe.error_aware > 0.0 or strategy.refines
        self._here = LocalWorkers([job.device])
        self._workers = workers or self._here
        usual = windows_per_batch or min(len(job.windows.solving), strategy.windows_per_batch(recipe))
        placement = _placement(job, usual)
        self.windows_per_batch = windows_per_batch or (placement.windows_per_batch or 1 if placement else usual)
        batches = Batches.of(job.windows.solving, strategy.judging_blocks(job), self.windows_per_batch)
        self._stream = job.stream(batches)
        self._stream.parks_waiting = placement is not None and placement.parks
        # Layers are solved on the batches before these.
        self._judging = batches.judging
        self._done = job.directory.completed_modules()
        of_model = next(job.plan.blocks.modules[0].parameters()).dtype
        self._refiner = strategy.refiner(job, torch.bfloat16 if self._stream.rounds_inputs else of_model)
        self._groups_of_build: dict[tuple[object, ...], list[list[str]]] = {}
        self.seconds = Seconds()

    def run(self) -> None:
        """Finish every layer that is not finished yet."""
        plan = self._job.plan
        last = max((i for i in range(len(plan.blocks)) if set(plan.of_block(i)) - self._done), default=-1)
        ends = [plan.modules[name] for name in plan.ends if name not in self._done]
        if ends:
            # What the head meets stands behind all blocks.
            last = len(plan.blocks) - 1
        if last < 0:
            return
        streams = [list(self._stream.hidden)]
        if self._error_aware:
            # The float stream only measures how far targets move, for which a share of the windows is enough: it costs
            # as much as the other stream.
            share = 1.0 if self._refiner else self._job.recipe.float_share
            paired = max(1, math.ceil(share * len(self._stream.hidden)))
            streams = [self._stream.hidden[:paired], list(self._stream.hidden)]
        self._stream.hidden.clear()
        shown = show_progress("calibrate, quantize, adapt", self._console, unit="blocks")
        # Experts without a token are visited too, so that every block has all its groups, in one order.
        calls = calling_experts(self._job.model, "all" if self._job.recipe.experts == "all" else "visited")
        with shown as progress, torch.no_grad(), calls:
            progress(0, last + 1)
            for index in range(last + 1):
                started, before = time.perf_counter(), self.seconds.beside_forward
                streams = self._walk_block(index, streams)
                spent = time.perf_counter() - started
                self.seconds.forward_and_statistics += spent - (self.seconds.beside_forward - before)
                progress(index + 1, last + 1)
            for end in ends:
                self._finish_end(end, streams[-1])

    def _walk_block(self, index: int, streams: Streams) -> Streams:
        """Finish the layers of one block; return the streams behind it."""
        blocks = self._job.plan.blocks
        linears = find_linears(blocks.modules[index], blocks.prefix(index))
        plans = self._job.plan.of_block(index)
        if self._refiner and not self._done.issuperset(plans):
            self._done.difference_update(plans)  # its layers are refined together, so all are made again
        with self._stream.block_on_device(index):
            original = {name: linear.weight.data for name, linear in linears.items()}
            tokens = ExpertTokens(blocks.modules[index], blocks.prefix(index), self._judging.start)
            block = WalkedBlock(index, linears, plans, original, tokens)
            if not self._done.issuperset(plans):
                sharing = self._groups(block, streams[FLOAT_STREAM][0])
                planned = (tuple(name for name in group if name in plans) for group in sharing)
                # A group that was left half done is solved again as a whole: its layers share matrix products, and
                # those give the same bits only for the same shapes.
                groups = tuple(group for group in planned if not self._done.issuperset(group))
                block = dataclasses.replace(block, groups=groups)
            try:
                walk = self._walk_error_aware if self._error_aware else self._walk_independent
                return walk(block, streams)
            finally:
                for name, linear in linears.items():
                    linear.weight.data = original[name]

    def _finish_end(self, end: ModulePlan, hidden: Sequence[torch.Tensor]) -> None:
        """Finish the head, on what it meets behind the last block, or the embeddings, which meet nothing."""
        solving = [states for batch, states in enumerate(hidden) if batch not in self._judging]
        module: Any = self._job.model.get_submodule(end.name)
        accumulator = self._accumulator(module.weight.shape[1], drift=False)
        for batch, states in enumerate(solving if isinstance(module, nn.Linear) else ()):
            accumulator.add(head_inputs(self._stream, module, batch, states))
        stats = _stats_of(end.name, accumulator)
        request = SolveRequest((end,), {end.name: module.weight.data}, stats, self._job.recipe, self._initialisation)
        started = time.perf_counter()
        for solved in self._here.solve([request]):
            self.seconds.solve += time.perf_counter() - started
            self._write({name: as_it_should_be(layer) for name, layer in solved.items()})

    def _groups(self, block: WalkedBlock, states: torch.Tensor) -> list[list[str]]:
        """Return the groups of linears that share an input; blocks built alike share them alike."""
        index, linears = block.index, block.linears
        prefix, module = self._job.plan.blocks.prefix(index), self._job.plan.blocks.modules[index]
        build = (type(module), *((name.removeprefix(prefix), linear.weight.shape) for name, linear in linears.items()))
        known = self._groups_of_build.get(build)
        if known is not None:
            return [[prefix + name for name in group] for group in known]
        reached: set[str] = set()
        handles = [
            linear.register_forward_pre_hook(lambda _, __, name=name: reached.add(name))
            for name, linear in linears.items()
        ]
        try:
            groups = shared_inputs(module, lambda: self._stream.forward_batch(index, 0, states), prefix)
        finally:
            for handle in handles:
                handle.remove()
        if reached.issuperset(linears):
            # Where experts of a class that calls them itself were missed, another block may miss others.
            self._groups_of_build[build] = [[name.removeprefix(prefix) for name in group] for group in groups]
        return groups

    def _walk_independent(self, block: WalkedBlock, streams: Streams) -> Streams:
        accumulators = [self._accumulator(block.width(group), drift=False) for group in block.groups]
        handles = [
            block.linears[group[0]].register_forward_pre_hook(
                lambda _, args, accumulator=accumulator: accumulator.add(args[0])
            )
            for group, accumulator in zip(block.groups, accumulators, strict=True)
        ]
        try:
            with block.tokens.watching():
                after = self._stream.forward_block(block.index, streams[FLOAT_STREAM])
        finally:
            for handle in handles:
                handle.remove()
        # Sums are given up as they are taken: those of a wide input are much of what a solve finds on the device.
        requests = (self._request(block, group, _stats_of(group[0], accumulators.pop(0))) for group in block.groups)
        for _ in self._solve(requests, self._workers):
            pass
        return [after]

    def _walk_error_aware(self, block: WalkedBlock, streams: Streams) -> Streams:
        linears, refiner = block.linears, self._refiner
        reached: set[str] = set()
        solved: dict[str, SolvedLayer] = {}
        floating = {name: self._multiplied(weight) for name, weight in block.original.items()}
        compressed = dict(floating)
        for name in self._done.intersection(block.plans):
            layer = self._job.directory.read_layer(name)
            compressed[name] = self._installed(
                block, name, served_weight(layer.quantized.to(self._job.device), layer.lora)
            )

        for name in linears:
            first = self._job.plan.copies.get(name, name)
            if first != name and first in self._job.plan.modules:
                # Finished in an earlier block.
                layer = self._job.directory.read_layer(first)
                compressed[name] = self._installed(
                    block, name, served_weight(layer.quantized.to(self._job.device), layer.lora)
                )

        def install(stream: int) -> None:
            weights = floating if stream == FLOAT_STREAM else compressed
            for name, linear in linears.items():
                linear.weight.data = weights[name]

        stops = block.stops()

        def visit(stop: int, inputs: GroupInputs) -> None:
            group = stops[stop].group
            solving = [given.outside(self._judging) for given in inputs]
            if stops[stop].mixture:
                for batch in sorted(solving[COMPRESSED_STREAM]):
                    block.tokens.keep(stops[stop].mixture, solving[COMPRESSED_STREAM][batch])
                return
            hidden = streams[FLOAT_STREAM][: self._judging.start]
            stats = self._paired_stats(group[0], block.width(group), solving, hidden)
            for layers in self._solve([self._request(block, group, stats)], self._here):
                if refiner:
                    started = time.perf_counter()
                    paired = stats.drift is not None
                    layers = refiner.refine_group(layers, inputs, self._judging, paired=paired)
                    self.seconds.refine += time.perf_counter() - started
                    solved.update(layers)
                for name, layer in layers.items():
                    compressed[name] = self._installed(block, name, layer.weight)
            reached.update(group)

        watched = [stop.modules for stop in stops]
        after = run_in_lockstep(self._stream, block.index, streams, watched, install, visit)
        for group in block.groups:
            if not reached.issuperset(group):
                # Experts that no token was routed to.
                empty = self._accumulator(block.width(group), drift=False).stats()
                for layers in self._solve([self._request(block, group, empty)], self._here):
                    if refiner:
                        solved.update(layers)
        if refiner is None or not solved:
            return after
        install(FLOAT_STREAM)
        started = time.perf_counter()
        refined = refiner.refine(
            SolvedBlock(
                block.index,
                linears,
                solved,
                self._stream,
                streams[COMPRESSED_STREAM],
                after[FLOAT_STREAM],
                self._judging,
            )
        )
        self.seconds.refine += time.perf_counter() - started
        self._write(refined)
        for name, finished in refined.items():
            compressed[name] = self._installed(block, name, finished.weight)
        install(COMPRESSED_STREAM)
        return [after[FLOAT_STREAM], self._stream.forward_block(block.index, streams[COMPRESSED_STREAM])]

    def _installed(self, block: WalkedBlock, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight that a layer serves as the block multiplies it."""
        return self._multiplied(weight.to(self._job.device, block.original[name].dtype))

    def _paired_stats(
        self, name: str, in_features: int, inputs: GroupInputs, hidden: Sequence[torch.Tensor]
    ) -> LayerStats:
        """Return H of the compressed stream's inputs, with D where both streams brought every token.

        An expert's tokens depend on the routing, which differs between the streams: they cannot be paired.
        """
        float_inputs, met = inputs[FLOAT_STREAM], inputs[COMPRESSED_STREAM]
        paired = [
            batch
            for batch, states in enumerate(hidden)
            if batch in met
            and batch in float_inputs
            and float_inputs[batch].shape == met[batch].shape
            and met[batch].numel() // in_features == states.shape[0] * states.shape[1]
        ]
        if len(paired) < len(hidden):
            paired = []
        both = self._accumulator(in_features, drift=bool(paired))
        rest = both if not paired else self._accumulator(in_features, drift=False)
        for batch in paired:
            both.add(met[batch], float_inputs[batch])
        for batch in sorted(set(met).difference(paired)):
            rest.add(met[batch])
        stats = _stats_of(name, both)
        if rest is both or not rest.tokens:
            return stats
        return dataclasses.replace(
            stats, gram=stats.gram + _stats_of(name, rest).gram, tokens=both.tokens + rest.tokens
        )

    def _multiplied(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight as products take it: rounding it once here spares autocast from doing so for every batch."""
        return weight.to(torch.bfloat16) if self._stream.rounds_inputs else weight

    def _accumulator(self, in_features: int, *, drift: bool) -> GramAccumulator:
        return GramAccumulator(
            in_features,
            weighting=self._job.recipe.token_weighting,
            drift=drift,
            rounded=self._stream.rounds_inputs,
            device=self._job.device,
        )

    def _request(self, block: WalkedBlock, group: Sequence[str], stats: LayerStats) -> SolveRequest:
        keep = self._job.kept_codes
        with self._stream.arithmetic():
            stats = block.tokens.completed(group[0], stats, lambda: self._accumulator(block.width(group), drift=False))
        return SolveRequest(
            tuple(block.plans[name] for name in group),
            {name: block.original[name] for name in group},
            stats,
            self._job.recipe,
            self._initialisation,
            None if keep is None else {name: keep.read(name) for name in group},
            keep is not None and keep.need_adapter,
        )

    def _solve(self, requests: Iterable[SolveRequest], workers: Workers) -> Iterator[dict[str, SolvedLayer]]:
        """Solve groups and yield their layers, stored unless their block is still to be refined."""
        if self._job.device.type == "cuda":
            # Work that is still queued on the device must not be counted as solving.
            cuda().synchronize(self._job.device)
        started = time.perf_counter()
        for solved in workers.solve(requests):
            self.seconds.solve += time.perf_counter() - started
            if self._refiner is None:
                self._write(solved)
            yield solved
            started = time.perf_counter()

    def _write(self, solved: Mapping[str, SolvedLayer]) -> None:
        started = time.perf_counter()
        for name, layer in solved.items():
            self._job.directory.write_layer(name, layer.quantized, layer.lora, layer.certificate)
        self.seconds.write += time.perf_counter() - started


def _placement(job: CompressJob, most: int) -> Placement | None:
    """Return how the walk fits the free memory of its GPU; None where it is not counted."""
    if job.device.type != "cuda" or job.strategy.refines:
        return None
    shapes = block_shapes(job.model, job.plan, job.recipe)
    return Placement.of(largest_shape(shapes), job.recipe, most, cuda().free_bytes(job.device)) if shapes else None


def _stats_of(name: str, accumulator: GramAccumulator) -> LayerStats:
    try:
        return accumulator.stats()
    except NonFiniteError as error:
        raise NonFiniteError(f"the input of {name}: {error}") from None
