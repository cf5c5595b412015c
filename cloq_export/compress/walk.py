"""Walk through the blocks of a model: collect statistics, solve, store, and carry the activations on."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from rich.console import Console
from torch import nn

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.calibrate.gram import GramAccumulator
from cloq_export.compress.block_refined import APIQ, BlockRefiner
from cloq_export.compress.plan import ModulePlan, Plan
from cloq_export.compress.solve import SolvedLayer, served_weight
from cloq_export.compress.solvers import LocalSolvers, SolveJob, Solvers
from cloq_export.errors import NonFiniteError
from cloq_export.models.blocks import find_linears
from cloq_export.models.lockstep import GroupInputs, run_in_lockstep
from cloq_export.models.shared_inputs import shared_inputs
from cloq_export.models.stream import BlockStream
from cloq_export.process.progress import show_progress
from cloq_export.recipe import Recipe
from cloq_export.types import LayerStats, QuantizedLayer

FLOAT_STREAM, COMPRESSED_STREAM = 0, 1

# Tokens of one forward pass: enough to amortise casting the weights, few enough that temporaries stay small.
TOKENS_PER_BATCH = 4096
# With a refinement a batch is also what one step trains on, and many small steps go further than few large ones.
TOKENS_PER_STEP = 1024


def usual_windows_per_batch(recipe: Recipe) -> int:
    """Return how many calibration windows go into one forward pass."""
    tokens = TOKENS_PER_BATCH if recipe.refine == "none" else TOKENS_PER_STEP
    return max(1, tokens // recipe.seqlen)


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
        model: the float model.
        plan: what happens to each layer.
        recipe: every option of the run.
        directory: where finished layers go.
        windows: calibration token ids, (samples, seqlen).
        device: where to compute.
        compute: precision of the forward passes, see `BlockStream`.
        kept_codes: gives the codes that a module keeps (only adapters are made); None quantizes.
        console: where progress goes.
        solvers: where layers that do not wait for each other are solved; None is `device`.
        windows_per_batch: calibration windows of one forward pass; None takes `usual_windows_per_batch`.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        recipe: Recipe,
        directory: RunDirectory,
        windows: torch.Tensor,
        *,
        device: torch.device,
        compute: torch.dtype | None,
        kept_codes: Callable[[str], QuantizedLayer] | None,
        console: Console,
        solvers: Solvers | None = None,
        windows_per_batch: int | None = None,
    ) -> None:
        self._plan = plan
        self._recipe = recipe
        self._directory = directory
        self._device = device
        self._kept_codes = kept_codes
        self._console = console
        # A refinement of blocks takes its inputs from behind the compressed prefix, whatever the layers' targets are.
        self._error_aware = recipe.error_aware > 0.0 or recipe.refine != "none"
        self._here = LocalSolvers([device])
        self._solvers = solvers or self._here
        batch = windows_per_batch or usual_windows_per_batch(recipe)
        self._stream = BlockStream(model, plan.blocks, windows, device=device, compute=compute, batch=batch)
        self._done = directory.completed_modules()
        self._refiner: BlockRefiner | None = None
        if recipe.refine != "none":
            of_model = next(plan.blocks.modules[0].parameters()).dtype
            dtype = torch.bfloat16 if self._stream.rounds_inputs else of_model
            self._refiner = BlockRefiner(recipe, device=device, dtype=dtype, keeps_codes=kept_codes is not None)
        self._groups_of_build: dict[tuple[object, ...], list[list[str]]] = {}
        self.seconds = Seconds()

    def run(self) -> None:
        """Finish every layer that is not finished yet."""
        last = max((i for i in range(len(self._plan.blocks)) if set(self._plan.of_block(i)) - self._done), default=-1)
        if last < 0:
            return
        streams = [list(self._stream.hidden)]
        if self._error_aware:
            # What the float model says is a correction that enters with a share itself: a part of the tokens tells
            # most of it, and the float stream costs as much as the other one.
            share = 1.0 if self._refiner else self._recipe.float_share
            paired = max(1, math.ceil(share * len(self._stream.hidden)))
            streams = [self._stream.hidden[:paired], list(self._stream.hidden)]
        self._stream.hidden.clear()
        shown = show_progress("calibrate, quantize, adapt", self._console, unit="blocks")
        with shown as progress, torch.no_grad():
            progress(0, last + 1)
            for index in range(last + 1):
                started, before = time.perf_counter(), self.seconds.beside_forward
                streams = self._walk_block(index, streams)
                spent = time.perf_counter() - started
                self.seconds.forward_and_statistics += spent - (self.seconds.beside_forward - before)
                progress(index + 1, last + 1)

    def _walk_block(self, index: int, streams: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """Finish the layers of one block; return the streams behind it."""
        block = self._plan.blocks.modules[index]
        linears = find_linears(block, self._plan.blocks.prefix(index))
        plans = self._plan.of_block(index)
        if self._refiner and not self._done.issuperset(plans):
            self._done.difference_update(plans)  # its layers are refined together, so all are made again
        with self._stream.block_on_device(index):
            original = {name: linear.weight.data for name, linear in linears.items()}
            groups: list[list[str]] = []
            if not self._done.issuperset(plans):
                found = self._groups(index, block, linears, streams[FLOAT_STREAM][0])
                planned = ([name for name in group if name in plans] for group in found)
                # A group that a kill cut in two is solved again as a whole: its layers share matrix products, and
                # those give the same bits only for the same shapes.
                groups = [group for group in planned if not self._done.issuperset(group)]
            try:
                if self._error_aware:
                    return self._walk_error_aware(index, streams, linears, plans, original, groups)
                return self._walk_independent(index, streams, linears, plans, original, groups)
            finally:
                for name, linear in linears.items():
                    linear.weight.data = original[name]

    def _groups(
        self, index: int, block: nn.Module, linears: Mapping[str, nn.Linear], states: torch.Tensor
    ) -> list[list[str]]:
        """Return the groups of linears that share an input; blocks built alike share them alike."""
        prefix = self._plan.blocks.prefix(index)
        build = (type(block), *((name.removeprefix(prefix), linear.weight.shape) for name, linear in linears.items()))
        known = self._groups_of_build.get(build)
        if known is not None:
            return [[prefix + name for name in group] for group in known]
        reached: set[str] = set()
        handles = [
            linear.register_forward_pre_hook(lambda _, __, name=name: reached.add(name))
            for name, linear in linears.items()
        ]
        try:
            found = shared_inputs(block, lambda: self._stream.forward_batch(index, 0, states), prefix)
        finally:
            for handle in handles:
                handle.remove()
        if reached.issuperset(linears):
            # Where experts were missed, another block may miss others.
            self._groups_of_build[build] = [[name.removeprefix(prefix) for name in group] for group in found]
        return found

    def _walk_independent(
        self,
        index: int,
        streams: list[list[torch.Tensor]],
        linears: Mapping[str, nn.Linear],
        plans: Mapping[str, ModulePlan],
        original: Mapping[str, torch.Tensor],
        groups: Sequence[Sequence[str]],
    ) -> list[list[torch.Tensor]]:
        accumulators = [self._accumulator(linears[group[0]].in_features, drift=False) for group in groups]
        handles = [
            linears[group[0]].register_forward_pre_hook(
                lambda _, args, accumulator=accumulator: accumulator.add(args[0])
            )
            for group, accumulator in zip(groups, accumulators, strict=True)
        ]
        try:
            after = self._stream.forward_block(index, streams[FLOAT_STREAM])
        finally:
            for handle in handles:
                handle.remove()
        jobs = (
            self._job(group, plans, original, _stats_of(group[0], accumulator))
            for group, accumulator in zip(groups, accumulators, strict=True)
        )
        for _ in self._solve(jobs, self._solvers):
            pass
        return [after]

    def _walk_error_aware(
        self,
        index: int,
        streams: list[list[torch.Tensor]],
        linears: Mapping[str, nn.Linear],
        plans: Mapping[str, ModulePlan],
        original: Mapping[str, torch.Tensor],
        groups: Sequence[Sequence[str]],
    ) -> list[list[torch.Tensor]]:
        reached: set[str] = set()
        solved: dict[str, SolvedLayer] = {}
        floating = {name: self._multiplied(weight) for name, weight in original.items()}
        compressed = dict(floating)
        for name in self._done.intersection(plans):
            layer = self._directory.read_layer(name)
            weight = served_weight(layer.quantized.to(self._device), layer.lora)
            compressed[name] = self._multiplied(weight.to(original[name].dtype))

        def install(stream: int) -> None:
            weights = floating if stream == FLOAT_STREAM else compressed
            for name, linear in linears.items():
                linear.weight.data = weights[name]

        def visit(group_index: int, inputs: GroupInputs) -> None:
            group = groups[group_index]
            stats = self._paired_stats(group[0], linears[group[0]].in_features, inputs, streams[FLOAT_STREAM])
            for layers in self._solve([self._job(group, plans, original, stats)], self._here):
                if self._refiner:
                    layers = self._start_refinement(self._refiner, layers, inputs, paired=stats.drift is not None)
                    solved.update(layers)
                for name, layer in layers.items():
                    compressed[name] = self._multiplied(layer.weight.to(original[name].dtype))
            reached.update(group)

        after = run_in_lockstep(
            self._stream,
            index,
            streams,
            [[linears[name] for name in group] for group in groups],
            install,
            visit,
        )
        for group in groups:
            if not reached.issuperset(group):
                # Experts that no token was routed to.
                width = linears[group[0]].in_features
                empty = self._accumulator(width, drift=False).stats()
                for layers in self._solve([self._job(group, plans, original, empty)], self._here):
                    if self._refiner:
                        solved.update(self._start_refinement(self._refiner, layers, None, paired=False))
        if self._refiner is None or not solved:
            return after
        install(FLOAT_STREAM)
        refined = self._refine(self._refiner, index, linears, plans, solved, streams, after)
        self._write(refined)
        for name, finished in refined.items():
            compressed[name] = self._multiplied(finished.weight.to(self._device, original[name].dtype))
        install(COMPRESSED_STREAM)
        return [after[FLOAT_STREAM], self._stream.forward_block(index, streams[COMPRESSED_STREAM])]

    def _refine(
        self,
        refiner: BlockRefiner,
        index: int,
        linears: Mapping[str, nn.Linear],
        plans: Mapping[str, ModulePlan],
        solved: Mapping[str, SolvedLayer],
        streams: Sequence[Sequence[torch.Tensor]],
        after: Sequence[Sequence[torch.Tensor]],
    ) -> dict[str, SolvedLayer]:
        """Return the refined layers of a block whose float weights are installed."""
        if self._recipe.refine == "apiq-lw":
            return dict(solved)  # each layer was trained when its group met its inputs
        started = time.perf_counter()
        met, share = streams[COMPRESSED_STREAM], refiner.target_share(plans)
        targets = list(after[FLOAT_STREAM])
        if share < 1.0:
            own = self._stream.forward_block(index, met)
            targets = [torch.lerp(mine, floats, share) for mine, floats in zip(own, targets, strict=True)]
        refined = refiner.refine_block(
            index,
            linears,
            solved,
            lambda batch: self._stream.differentiable_batch(index, batch, met[batch]),
            targets,
        )
        self.seconds.refine += time.perf_counter() - started
        return refined

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
            weighting=self._recipe.token_weighting,
            drift=drift,
            rounded=self._stream.rounds_inputs,
            device=self._device,
        )

    def _job(
        self,
        group: Sequence[str],
        plans: Mapping[str, ModulePlan],
        original: Mapping[str, torch.Tensor],
        stats: LayerStats,
    ) -> SolveJob:
        keep, recipe = self._kept_codes, self._recipe
        if recipe.refine in APIQ:
            # ApiQ makes its own codes against the float weight: nothing is solved but the statistics are judged by.
            recipe = recipe.changed({"method": "rtn", "error_aware": 0.0})
        return SolveJob(
            tuple(plans[name] for name in group),
            {name: original[name] for name in group},
            stats,
            recipe,
            None if keep is None else {name: keep(name) for name in group},
        )

    def _solve(self, jobs: Iterable[SolveJob], solvers: Solvers) -> Iterator[dict[str, SolvedLayer]]:
        """Solve groups and yield their layers, stored unless their block is still to be refined."""
        if self._device.type == "cuda":
            # What was asked of the device before must not count as solving.
            torch.cuda.synchronize(self._device)
        started = time.perf_counter()
        for solved in solvers.solve(jobs):
            self.seconds.solve += time.perf_counter() - started
            if self._refiner is None:
                self._write(solved)
            yield solved
            started = time.perf_counter()

    def _start_refinement(
        self,
        refiner: BlockRefiner,
        solved: dict[str, SolvedLayer],
        inputs: GroupInputs | None,
        *,
        paired: bool,
    ) -> dict[str, SolvedLayer]:
        """Return what the next groups of the block meet: ApiQ has its own start, and a scheme that ends here."""
        if self._recipe.refine not in APIQ:
            return solved
        started = time.perf_counter()
        solved = refiner.start_group(solved)
        if self._recipe.refine == "apiq-lw" and inputs is not None:
            solved = refiner.refine_group(solved, inputs, paired=paired)
        self.seconds.refine += time.perf_counter() - started
        return solved

    def _write(self, solved: Mapping[str, SolvedLayer]) -> None:
        started = time.perf_counter()
        for name, layer in solved.items():
            self._directory.write_layer(name, layer.quantized, layer.lora, layer.certificate)
        self.seconds.write += time.perf_counter() - started


def _stats_of(name: str, accumulator: GramAccumulator) -> LayerStats:
    try:
        return accumulator.stats()
    except NonFiniteError as error:
        raise NonFiniteError(f"the input of {name}: {error}") from None
