"""Train the adapter of a model whose base is frozen, with transformers' trainer: the best one is kept.

Added to that trainer: only A and B are saved, a checkpoint that was not written to its end is never continued from, and
a loss that is NaN or Inf ends the training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from cloq_export.errors import DivergedError, FormatError, UsageError
from cloq_export.files.atomic import write_json
from cloq_export.files.safe_json import read_json
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.files.tensor_writer import write_safetensors
from cloq_export.models.rotary_switch import RotarySwitch, forget_lengths
from cloq_export.recipe import FineTuneRecipe
from cloq_export.train.data import TrainingData
from cloq_export.train.launched import Placement
from cloq_export.train.loss import next_token_loss
from cloq_export.train.sequences import NOT_LEARNED, pad_batch

WEIGHTS_NAME = "trained.safetensors"
# Written last; a checkpoint without it, or whose files differ from it, was cut off.
COMPLETE_NAME = "complete.json"
# The newest checkpoint and the one before it, which must outlive the writing of the newest.
_KEPT_CHECKPOINTS = 2


@dataclasses.dataclass(frozen=True)
class TrainingStep:
    """One optimizer step."""

    step: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float


@dataclasses.dataclass(frozen=True)
class EvaluationPoint:
    """One evaluation; step 0 is before the first step."""

    step: int
    epoch: float
    loss: float


@dataclasses.dataclass(frozen=True)
class TrainingCurve:
    """What a training did, step by step; equal trainings give equal curves, interrupted or not.

    Args:
        losses: of every step.
        evaluations: in order.
        steps: optimizer steps in all.
        kept_step: the step whose adapter was kept.
        kept_loss: its evaluation loss, or None if nothing was evaluated.
    """

    losses: tuple[TrainingStep, ...]
    evaluations: tuple[EvaluationPoint, ...]
    steps: int
    kept_step: int
    kept_loss: float | None


@dataclasses.dataclass(frozen=True)
class Training:
    """A finished training.

    Args:
        curve: what it did.
        resumed_at: the step from which this call continued, 0 if it began at the start.
    """

    curve: TrainingCurve
    resumed_at: int


def train_adapter(
    model: nn.Module,
    data: TrainingData,
    recipe: FineTuneRecipe,
    folder: Path,
    placement: Placement,
    progress: Callable[[int, int], None] | None = None,
) -> Training:
    """Train the parameters of a model that ask for gradients, continuing from the newest whole checkpoint.

    The loss is the mean negative log-likelihood over the labels of a step, whatever the number of sequences or devices
    that they are spread over. The optimizer is AdamW (betas 0.9 and 0.999), gradients are clipped to norm 1. At the
    end the model holds the parameters of the least evaluation loss, or the last ones if nothing is evaluated.

    Args:
        model: a transformers model on any device; A and B ask for gradients, nothing else does.
        data: what is learned, and what it is evaluated on.
        recipe: every option; its data, name and start are ignored.
        folder: for checkpoints.
        placement: device and precision.
        progress: called with (steps done, steps in all).

    Returns:
        Training.

    Raises:
        DivergedError: the loss, or a trained parameter, became NaN or Inf; what was saved before stays in `folder`.
        UsageError: float16 on a CPU.
        FormatError: a checkpoint belongs to another model.
    """
    if placement.dtype is torch.float16 and placement.device.type == "cpu":
        raise UsageError("float16 cannot be trained on a CPU; choose `precision=bfloat16` or float32.")
    learned, evaluated = data.learned, data.evaluated
    cast(Any, model).loss_function = next_token_loss
    forget_lengths(model)
    trainer = AdapterTrainer(
        model=model,
        args=_arguments(recipe, len(learned.rows), evaluated is not None, folder, placement),
        train_dataset=learned.rows,
        eval_dataset=evaluated.rows if evaluated is not None else None,
        data_collator=pad_batch,
        callbacks=[_Milestones(progress, evaluates=evaluated is not None)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    resumed = newest_checkpoint(folder)
    if trainer.is_world_process_zero():
        _remove_unfinished(folder)
    if resumed is None and evaluated is not None:
        trainer.args.eval_on_start = True
    with _quiet():
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    curve = _curve(trainer.state)
    if curve.kept_step != curve.steps:
        load_parameters(model, folder / f"{PREFIX_CHECKPOINT_DIR}-{curve.kept_step}")
    return Training(curve, 0 if resumed is None else step_of(resumed))


class AdapterTrainer(transformers.Trainer):
    """Transformers' trainer, saving the trained parameters alone, and stopping at a loss that is NaN or Inf."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Do one forward and backward pass.

        Raises:
            DivergedError: the loss is NaN or Inf.
        """
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            raise DivergedError(f"the loss became {loss.item()} at step {self.state.global_step + 1}")
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch; sequences on two sides of a switch of rotary frequencies are not mixed.

        Each side takes a forward pass; the loss is the sum over all learned tokens of the batch, divided as it would be
        in one pass.
        """
        switch = RotarySwitch.of(self.model)
        # Without a switch nothing waits for the lengths, which lie on the device.
        lengths = inputs["attention_mask"].sum(1).tolist() if switch else []
        sides = switch.apart(lengths)
        if len(sides) <= 1:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        total = num_items_in_batch
        if total is None:
            total = int((inputs["labels"][:, 1:] != NOT_LEARNED).sum())
        losses, outputs = [], None
        for rows in sides:
            longest = max(lengths[row] for row in rows)
            part = {name: tensor[rows, :longest] for name, tensor in inputs.items()}
            loss, outputs = super().compute_loss(model, part, True, total)
            losses.append(loss)
        summed = torch.stack(losses).sum()
        return (summed, outputs) if return_outputs else summed

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the evaluation loss.

        Raises:
            DivergedError: it is NaN or Inf.
        """
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        loss = metrics["eval_loss"]
        if not math.isfinite(loss):
            raise DivergedError(f"the evaluation loss became {loss} at step {self.state.global_step}")
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None  # only `_save_checkpoint` comes here, and names one
        parameters = trained_parameters(self.model)
        # Asked together: a GPU's host waits once.
        finite = torch.stack([torch.isfinite(parameter).all() for parameter in parameters.values()]).tolist()
        if not all(finite):
            name = list(parameters)[finite.index(False)]
            raise DivergedError(f"{name} became NaN or Inf at step {self.state.global_step}")
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        write_safetensors(Path(output_dir) / WEIGHTS_NAME, parameters)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_parameters(model or self.model, Path(resume_from_checkpoint))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            write_json(folder / COMPLETE_NAME, _hashes(folder))


def trained_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters that ask for gradients, by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_parameters(model: nn.Module, checkpoint: Path) -> None:
    """Put the parameters of a checkpoint into the model that they were trained in.

    Raises:
        FormatError: the checkpoint belongs to another model.
    """
    stored = read_safetensors(checkpoint / WEIGHTS_NAME)[0]
    held = trained_parameters(model)
    if {n: t.shape for n, t in stored.items()} != {n: t.shape for n, t in held.items()}:
        raise FormatError(f"{checkpoint} belongs to another model or another adapter; delete the folder it is in.")
    for name, parameter in held.items():
        parameter.copy_(stored[name])


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that was written to its end and is undamaged."""
    for checkpoint in sorted(_checkpoints(folder), key=step_of, reverse=True):
        if _is_whole(checkpoint):
            return checkpoint
    return None


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint was made after."""
    return int(checkpoint.name.rpartition("-")[2])


class _Milestones(transformers.TrainerCallback):
    """Shows progress, and evaluates after the last step even where the interval does not."""

    def __init__(self, progress: Callable[[int, int], None] | None, *, evaluates: bool) -> None:
        self._progress = progress
        self._evaluates = evaluates

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show(state)
        # With an evaluation after every epoch there is one after the last step anyway.
        if args.save_strategy == "steps" and state.global_step >= state.max_steps:
            control.should_evaluate = self._evaluates
            control.should_save = True

    def _show(self, state: Any) -> None:
        if self._progress is not None and state.is_world_process_zero:
            self._progress(state.global_step, state.max_steps)


def _arguments(
    recipe: FineTuneRecipe, rows: int, evaluates: bool, folder: Path, placement: Placement
) -> transformers.TrainingArguments:
    interval: dict[str, Any] = {"save_strategy": "epoch", "eval_strategy": "epoch" if evaluates else "no"}
    if recipe.eval_every:
        interval = {"save_strategy": "steps", "eval_strategy": "steps" if evaluates else "no"}
        interval |= {"save_steps": recipe.eval_every, "eval_steps": recipe.eval_every}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=recipe.epochs,
        max_steps=recipe.steps or -1,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule if recipe.schedule != "constant" else "constant_with_warmup",
        weight_decay=recipe.weight_decay,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        gradient_checkpointing=recipe.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if recipe.gradient_checkpointing else None,
        optim="adamw_torch",
        max_grad_norm=1.0,
        bf16=placement.dtype is torch.bfloat16,
        fp16=placement.dtype is torch.float16,
        use_cpu=placement.device.type == "cpu",
        seed=recipe.seed,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        metric_for_best_model="eval_loss" if evaluates else None,
        greater_is_better=False if evaluates else None,
        save_total_limit=_KEPT_CHECKPOINTS,
        prediction_loss_only=True,
        remove_unused_columns=False,
        # Batches are copied from page-locked memory while the device computes.
        dataloader_pin_memory=placement.device.type == "cuda",
        accelerator_config={"non_blocking": placement.device.type == "cuda"},
        # Packed codes are the same everywhere and never change.
        ddp_broadcast_buffers=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to="none",
        log_level="error",
        **interval,
    )
    # Several devices are used through a launcher, one process each; DataParallel would copy the codes at every step.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    per_step = recipe.batch_size * recipe.gradient_accumulation * arguments.world_size
    steps = recipe.steps or math.ceil(recipe.epochs * math.ceil(rows / per_step))
    arguments.warmup_steps = math.ceil(recipe.warmup * steps)
    return arguments


def _curve(state: Any) -> TrainingCurve:
    history = state.log_history
    losses = tuple(
        TrainingStep(each["step"], each["epoch"], each["loss"], each["learning_rate"], each["grad_norm"])
        for each in history
        if "loss" in each
    )
    evaluations = tuple(
        EvaluationPoint(each["step"], each.get("epoch", 0.0), each["eval_loss"])
        for each in history
        if "eval_loss" in each
    )
    kept = state.best_global_step or state.global_step
    return TrainingCurve(losses, evaluations, state.global_step, kept, state.best_metric)


def _checkpoints(folder: Path) -> list[Path]:
    paths = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if folder.is_dir() else ()
    return [path for path in paths if path.is_dir() and path.name.rpartition("-")[2].isdigit()]


def _remove_unfinished(folder: Path) -> None:
    for checkpoint in _checkpoints(folder):
        if not _is_whole(checkpoint):
            shutil.rmtree(checkpoint, ignore_errors=True)


def _is_whole(checkpoint: Path) -> bool:
    if not (checkpoint / COMPLETE_NAME).is_file():
        return False
    try:
        return read_json(checkpoint / COMPLETE_NAME) == _hashes(checkpoint)
    except FormatError:
        return False


def _hashes(checkpoint: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(checkpoint.iterdir())
        if path.is_file() and path.name != COMPLETE_NAME
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings of the libraries that a user of this package can do nothing about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield
