"""How the layers of a run are made: the choices of the recipe's `refine`, each an object that is chosen once."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from typing import TYPE_CHECKING, cast

import torch

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.compress.batches import Batches
from cloq_export.compress.block_refined import BlockRefiner
from cloq_export.compress.initialisations import CLOQ, Initialisation, initialisation_of
from cloq_export.compress.model_refined import RefinementPlace, refine_model, refined_layers
from cloq_export.compress.opening import started_run
from cloq_export.compress.session import Session
from cloq_export.compress.walk import BlockWalk
from cloq_export.compress.workers import workers_of
from cloq_export.errors import UsageError
from cloq_export.recipe import REFINE_STEPS, Recipe, registered_choice
from cloq_export.refine import JUDGING_BATCHES, judging_batches
from cloq_export.texts.windows import WindowCounts

if TYPE_CHECKING:
    from cloq_export.compress.job import CompressJob

# Tokens of one forward pass: enough to amortise casting the weights, few enough that temporaries stay small.
TOKENS_PER_BATCH = 4096
# With a refinement one step trains on one batch, and many small steps reach further than a few large ones.
TOKENS_PER_STEP = 1024


class Strategy:
    """Makes the layers of a run; this one solves each of them and leaves it so."""

    # True if layers are trained after the solve; the inputs of a block then come from the compressed blocks before it.
    refines = False

    def check(self, recipe: Recipe, *, keeps_codes: bool) -> None:
        """Refuse a recipe that this strategy cannot follow.

        Raises:
            RecipeError: it cannot.
        """

    def initialisation(self, recipe: Recipe) -> Initialisation:
        """Return what makes the first codes and pairs."""
        return initialisation_of(recipe)

    def windows_per_batch(self, recipe: Recipe) -> int:
        """Return how many calibration windows go into one forward pass."""
        return max(1, (TOKENS_PER_STEP if self.refines else TOKENS_PER_BATCH) // recipe.seqlen)

    def window_counts(self, recipe: Recipe) -> WindowCounts:
        """Return how many windows the run draws, and for what."""
        return WindowCounts(recipe.samples)

    def judging_blocks(self, job: CompressJob) -> torch.Tensor:
        """Return the windows that judge the refinement of a block, (windows, seqlen); none if nothing is refined."""
        return job.windows.solving[:0]

    def refiner(self, job: CompressJob, dtype: torch.dtype) -> BlockRefiner | None:
        """Return what trains the layers of a block, whose weights are multiplied in `dtype`; None trains nothing."""
        return None

    def make_layers(self, job: CompressJob, session: Session) -> None:
        """Make the layers that are not yet in the directory, with fewer windows at once where memory runs out."""
        windows = job.windows.solving
        workers = workers_of(job.recipe, job.device)
        usual = min(len(windows), self.windows_per_batch(job.recipe))
        at_once, chosen = usual, None
        while True:
            walk = None
            try:
                walk = BlockWalk(job, session.console, workers=workers, windows_per_batch=chosen)
                at_once = walk.windows_per_batch
                if chosen is None and at_once < usual:
                    session.notes.append(
                        f"the device has room for {at_once} calibration windows in a forward pass instead of {usual}, "
                        "so sums come in another order than with more memory"
                    )
                walk.run()
                break
            except torch.OutOfMemoryError:
                if at_once == 1:
                    raise UsageError(
                        "memory ran out with one calibration window in a forward pass; what is finished is kept. "
                        f"Choose fewer `samples` than {job.recipe.samples}, a smaller `seqlen` than "
                        f"{job.recipe.seqlen}, `device=cpu`, or a larger device; `plan` says what takes most."
                    ) from None
            # Finished layers are kept, so the walk only catches up.
            chosen = at_once = at_once // 2
            session.notes.append(
                f"memory ran out: from there on {at_once} calibration windows went into a forward pass, so sums "
                "came in another order than with more memory"
            )
            session.say(session.notes[-1])
        for stage, seconds in dataclasses.asdict(walk.seconds).items():
            if self.refines or stage != "refine":
                session.seconds[stage.replace("_", " ")] = seconds


class BlockRefined(Strategy):
    """Solves the layers of a block, then trains them together on the block's output."""

    refines = True

    def window_counts(self, recipe: Recipe) -> WindowCounts:
        """Return how many windows the run draws, and for what.

        As many judge a block as the model, so that what is solved does not depend on what follows.
        """
        return WindowCounts(recipe.samples, judging=JUDGING_BATCHES * self.windows_per_batch(recipe))

    def judging_blocks(self, job: CompressJob) -> torch.Tensor:
        """Return the windows that judge the refinement of a block, (windows, seqlen): one for eight, eight batches."""
        at_once = self.windows_per_batch(job.recipe)
        count = judging_batches(-(-job.recipe.samples // at_once)) * at_once
        return job.windows.drawn.judging.ids[:count]

    def refiner(self, job: CompressJob, dtype: torch.dtype) -> BlockRefiner | None:
        """Return what trains the layers of a block, whose weights are multiplied in `dtype`."""
        return BlockRefiner(job, dtype)


class ModelRefined(BlockRefined):
    """Solves all layers and refines their blocks in a work folder, then all together, and only then stores them."""

    def window_counts(self, recipe: Recipe) -> WindowCounts:
        """Return how many windows the run draws, and for what: a step on the model takes windows of its own."""
        steps = (recipe.refine_steps or REFINE_STEPS) * self.windows_per_batch(recipe)
        return dataclasses.replace(super().window_counts(recipe), refining=steps)

    def make_layers(self, job: CompressJob, session: Session) -> None:
        """Make the layers that are not yet in the directory."""
        work = job.directory.path / "work"
        # The folder holds the result of a block refinement, and its recipe says so.
        of_blocks = job.recipe.changed({"refine": "block"})
        with started_run(work / "solved", of_blocks, job.directory.source_fingerprint) as solved:
            self._solve(job, solved, session)
            self._refine(job, solved, session)
        for done in (work / "solved", work / "refinement"):
            shutil.rmtree(done, ignore_errors=True)
        with contextlib.suppress(OSError):  # another adapter may be under construction there
            work.rmdir()

    def _solve(self, job: CompressJob, solved: RunDirectory, session: Session) -> None:
        already = solved.completed_modules()
        if already:
            session.notes.append(
                f"continued a refinement that had {len(already)} of {len(job.plan.modules)} layers solved"
            )
        if not already.issuperset(job.plan.modules):
            super().make_layers(dataclasses.replace(job, directory=solved), session)

    def _refine(self, job: CompressJob, solved: RunDirectory, session: Session) -> None:
        recipe, batch, drawn = job.recipe, self.windows_per_batch(job.recipe), job.windows.drawn
        # Not the windows of the solve, whose errors are already corrected: they would favour the start.
        batches = Batches.of(drawn.refining.ids, drawn.judging.ids, batch)
        started = time.perf_counter()
        try:
            stream = job.stream(batches)
            with session.progress("refine the model") as progress:
                folder = job.directory.path / "work" / "refinement"
                refinement = refine_model(stream, job, solved, batches.judging, RefinementPlace(folder, progress))
        except torch.OutOfMemoryError:
            raise UsageError(
                f"memory ran out in the refinement of the model, {batch} windows of {recipe.seqlen} tokens at a time; "
                "the solved layers are kept. Choose `device=cpu`, a larger device, or another run with a "
                "smaller `seqlen` or with `refine=block`."
            ) from None
        session.seconds["refine the model"] = time.perf_counter() - started
        for name, stored in refined_layers(refinement, job.plan, solved).items():
            job.directory.write_layer(name, stored.quantized, stored.lora, stored.certificate)


_OWN: dict[str, Strategy] = {"none": Strategy(), "block": BlockRefined(), "model": ModelRefined()}


def check_low_rank_first(recipe: Recipe) -> None:
    """Refuse rounds of low rank first where no layer could have them.

    Raises:
        UsageError: codes are kept, A and B are not CLoQ's closed form, or no layer has a rank.
    """
    if not recipe.low_rank_rounds:
        return
    leave = "leave `low_rank_rounds` at 0"
    if recipe.codes_from:
        raise UsageError(
            f"low_rank_rounds makes codes for what A and B leave of the weight, and codes_from keeps them; {leave}."
        )
    if recipe.init != CLOQ:
        raise UsageError(
            f"low_rank_rounds repeats CLoQ's closed form, and init is {recipe.init}; take `init={CLOQ}`, or {leave}."
        )
    if strategy_of(recipe).initialisation(recipe).makes_codes:
        raise UsageError(
            f"low_rank_rounds solves codes and adapter in turns, and refine is {recipe.refine}, which solves nothing; "
            f"take `refine=block`, or {leave}."
        )
    ranks = [recipe.rank, recipe.expert_rank, *(settings.get("rank", 0) for settings in recipe.overrides.values())]
    if not any(ranks):
        raise UsageError(
            "low_rank_rounds takes A and B out of the weight before its codes are made, and no layer has any: the rank "
            f"is 0. Make codes and adapter together, with a `rank`, or {leave}."
        )


def check_shared_a(recipe: Recipe) -> None:
    """Refuse one A for gate and up of experts where their pairs are made, or changed, one by one.

    Raises:
        UsageError: they are, or experts get no pair.
    """
    if not recipe.expert_shared_a:
        return
    leave = "or leave `expert_shared_a` out"
    if recipe.init != CLOQ or recipe.low_rank_rounds or recipe.refine != "none":
        other = "init" if recipe.init != CLOQ else "low_rank_rounds" if recipe.low_rank_rounds else "refine"
        raise UsageError(
            f"expert_shared_a is CLoQ's closed form of gate and up as one weight, and {other}={getattr(recipe, other)} "
            f"gives each of them an A of its own; take `init={CLOQ}` with neither rounds nor a refinement, {leave}."
        )
    if not recipe.expert_rank:
        raise UsageError(f"expert_shared_a is about pairs of experts, and expert_rank is 0; give it a rank, {leave}.")


def strategy_of(recipe: Recipe) -> Strategy:
    """Return the strategy that a recipe names: one of this package, or one that was registered."""
    return _OWN.get(recipe.refine) or cast(Strategy, registered_choice("refine", recipe.refine))
