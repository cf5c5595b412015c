"""What a training begins from, written down so that only the same training continues it; and what a failure keeps."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cloq_export.artifact.adapters import read_bound_adapter
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.needed_adapter import refuse_alone
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.errors import BindingError, DivergedError, RunDirectoryError, UsageError
from cloq_export.files.atomic import write_json
from cloq_export.files.safe_json import read_json
from cloq_export.formats.peft import write_adapter
from cloq_export.formats.peft.codec import WEIGHTS_NAME
from cloq_export.recipe import FineTuneRecipe, Recipe, is_expert
from cloq_export.train.data import TrainingData
from cloq_export.train.pairs import trained_pairs, zero_pairs
from cloq_export.train.trainer import load_parameters, newest_checkpoint, step_of

# The start that is no adapter of a run: A as PEFT draws it, B zero (GPTQ-LoRA).
ZERO_START = "zero"
# Its rank where the run has none.
ZERO_RANK = Recipe().rank

_RECORD = "finetune.json"
_ZERO_ADAPTER = "start"
_LAST_GOOD = "last-good"


@dataclasses.dataclass(frozen=True)
class TrainingStart:
    """What a training begins from; an interrupted call and the one that continues it must agree on all of it.

    Args:
        work: the folder of the training.
        adapter: the folder of the adapter to start from.
        base_model: the float model of the run.
        base_fingerprint: of the codes.
        adapter_sha256: of the tensors of the adapter to start from.
        options: of the training.
        data: "data" and perhaps "eval_data": where from, and the hash.
    """

    work: Path
    adapter: Path
    base_model: str
    base_fingerprint: str
    adapter_sha256: str
    options: Mapping[str, Any]
    data: Mapping[str, Mapping[str, str]]

    @classmethod
    def begin_or_continue(
        cls, directory: RunDirectory, base: Checkpoint, recipe: FineTuneRecipe, data: TrainingData, checkpoints: Path
    ) -> TrainingStart:
        """Return the start of a training, written down, or compared with what an interrupted call wrote down.

        Args:
            directory: the run.
            base: its checkpoint.
            recipe: every option.
            data: what is learned.
            checkpoints: folder for them, in the folder of the training.

        Raises:
            RunDirectoryError: there is no adapter to start from.
            BindingError: the base has changed since the interrupted call.
            UsageError: the interrupted call had other options, data or another adapter to start from; or an adapter
                that changes nothing yet is to be trained over codes that need theirs.
        """
        work = checkpoints.parent
        adapter = _adapter_to_start_from(directory, base, recipe, work)
        origins = {"data": data.data} | ({} if data.eval_data is None else {"eval_data": data.eval_data})
        start = cls(
            work=work,
            adapter=adapter,
            base_model=directory.recipe.model,
            base_fingerprint=base.fingerprint,
            adapter_sha256=hashlib.sha256((adapter / WEIGHTS_NAME).read_bytes()).hexdigest(),
            options=recipe.to_mapping(),
            data={name: dataclasses.asdict(origin) for name, origin in origins.items()},
        )
        path = work / _RECORD
        if path.exists():
            start._refuse_other(read_json(path), checkpoints)
        else:
            work.mkdir(parents=True, exist_ok=True)
            write_json(path, start.to_json())
        return start

    def to_json(self) -> dict[str, Any]:
        """Return what is written down."""
        return {
            "options": dict(self.options),
            "base_fingerprint": self.base_fingerprint,
            "start_sha256": self.adapter_sha256,
            **self.data,
        }

    def _refuse_other(self, begun: Mapping[str, Any], checkpoints: Path) -> None:
        name = self.options["name"]
        newest = newest_checkpoint(checkpoints)
        after = f"step {step_of(newest)}" if newest else "its start"
        if begun.get("base_fingerprint") != self.base_fingerprint:
            raise BindingError(
                f"the base has changed since {after} of {name!r} (now {self.base_fingerprint}, then "
                f"{begun.get('base_fingerprint')}); restore the run's checkpoint, or delete {self.work} to begin anew."
            )
        faults = differing_options(begun.get("options"), self.options)
        faults += [
            f"{key} has other content than then"
            for key in ("data", "eval_data")
            if begun.get(key) != self.data.get(key)
        ]
        if begun.get("start_sha256") != self.adapter_sha256:
            faults.append("the adapter to start from has changed")
        if faults:
            raise UsageError(
                f"the adapter {name!r} was begun with other options and not finished ({'; '.join(faults)}); give the "
                f"same ones to finish it, choose another `name`, or delete {self.work}."
            )


def differing_options(then: Any, now: Mapping[str, Any]) -> list[str]:
    """Return one line for each option of a training that was something else then.

    Args:
        then: as a file holds them.
        now: as they are asked.
    """
    held = then if isinstance(then, Mapping) else {}
    return [f"{key}: {held.get(key)!r} then, {value!r} now" for key, value in now.items() if held.get(key) != value]


@contextlib.contextmanager
def keep_last_good(
    model: nn.Module, checkpoints: Path, alphas: Mapping[str, float], recipe: FineTuneRecipe, start: TrainingStart
) -> Iterator[None]:
    """If a training diverges, write the adapter of its newest checkpoint into its folder, and say where.

    Args:
        model: that trains.
        checkpoints: of the training.
        alphas: full module name -> alpha.
        recipe: every option.
        start: what the training begins from.

    Raises:
        DivergedError: with what is kept and what to do next.
    """
    try:
        yield
    except DivergedError as error:
        newest = newest_checkpoint(checkpoints)
        if newest is None:
            kept = "there is no good checkpoint yet"
        else:
            load_parameters(model, newest)
            folder = start.work / _LAST_GOOD
            pairs = trained_pairs(model, alphas, torch.float32)
            write_adapter(folder, pairs, base_model=start.base_model, base_fingerprint=start.base_fingerprint)
            kept = f"the adapter of step {step_of(newest)} is kept in {folder}"
        raise DivergedError(
            f"{error} (learning rate {recipe.learning_rate:g}): the training diverged; {kept}. Begin anew under "
            "another `name` with a lower `learning_rate`."
        ) from None


def _adapter_to_start_from(directory: RunDirectory, base: Checkpoint, recipe: FineTuneRecipe, work: Path) -> Path:
    """Return the folder of the adapter to start from."""
    if recipe.start != ZERO_START:
        name = recipe.start or directory.recipe.adapter_name
        if not recipe.start and name not in directory.adapters.folders:
            raise RunDirectoryError(
                f"{directory.path} has no adapter {name!r} to start from; make one with `cloq adapt {directory.path}`, "
                f"or start from nothing with `start={ZERO_START}`."
            )
        folder = directory.adapters.find(name)
        read_bound_adapter(folder, base, force=False)
        return folder
    remedy = (
        f"start from its own adapter, {directory.recipe.adapter_name!r}, by leaving `start` out, or train over a run"
    )
    refuse_alone(base, f"{remedy} without `low_rank_rounds`")
    folder = work / _ZERO_ADAPTER
    if not folder.exists():
        run_recipe = directory.recipe
        # Experts have an adapter only where the run gave them one.
        adapted = [name for name in base.specs if run_recipe.rank_for(name) or not is_expert(name)]
        shapes = {name: directory.layer_file(name).shape for name in adapted}
        ranks = {name: run_recipe.rank_for(name) or ZERO_RANK for name in shapes}
        write_adapter(
            folder,
            zero_pairs(shapes, ranks, recipe.seed),
            base_model=run_recipe.model,
            base_fingerprint=base.fingerprint,
        )
    return folder
