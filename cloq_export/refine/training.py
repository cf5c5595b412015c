"""Train layers together on their output, and keep the best step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from cloq_export.types import LoraPair, QuantizedLayer

# Batches that judge are never trained on: one for eight that are, eight at most.
_TRAINED_FOR_EACH, JUDGING_BATCHES = 8, 8
# A step costs three times as much as judging a batch; ten judgements are enough to find the best step.
JUDGEMENTS = 10
_PATIENCE = 4


class TrainableLayer(Protocol):
    """A layer whose parts can be trained through the gradient of its weight.

    `install` gives `parameter` new memory each time, so that what stood there before can be kept.
    """

    parameter: nn.Parameter

    def install(self) -> None:
        """Put the weight that would be served now into `parameter`."""

    def step(self, gradient: torch.Tensor, rate: float) -> None:
        """Move every trained part by one step; `rate` falls from 1 to 0."""

    def result(self) -> tuple[QuantizedLayer, LoraPair | None]:
        """Return the layer as it would be stored now, on its device."""


StoredLayers = dict[str, tuple[QuantizedLayer, LoraPair | None]]


class Objective(Protocol):
    """What training lowers, with the weights that its layers would serve now."""

    @property
    def trained(self) -> Sequence[int]:
        """Return the batches that are trained on, at least one."""

    @property
    def judging(self) -> Sequence[int]:
        """Return the batches that judge, at least one."""

    def error(self, batches: Sequence[int]) -> float:
        """Return the mean error of some batches, NaN or Inf where it overflows."""

    def gradients(self, batch: int) -> Iterable[tuple[str, torch.Tensor]]:
        """Yield each layer's name and the derivative of one batch's error by its weight.

        A layer may be stepped as soon as its own derivative is there.
        """


@dataclasses.dataclass(frozen=True)
class Standing:
    """Where training stands after a judgement.

    Args:
        step: steps that were made.
        error_before: held-out error of the start.
        best: the lowest held-out error so far.
        best_step: its step, 0 for the start.
        since: judgements since then.
    """

    step: int
    error_before: float
    best: float
    best_step: int
    since: int


class Record(Protocol):
    """Keeps what layers hold after every judgement on disk, so that training can continue after a kill."""

    def save(self, standing: Standing) -> None:
        """Keep all that the layers hold now; it is the best if `standing.best_step` is `standing.step`."""

    def load(self) -> Standing | None:
        """Return where training stood at the last `save`, None if there was none."""

    def restore(self, *, best: bool) -> None:
        """Put back into the layers what they held at the best judgement, or else at the last one."""


@dataclasses.dataclass(frozen=True)
class Refinement:
    """What training brought.

    Errors are in the measure of the training, on windows that were not trained on.

    Args:
        layers: the layers after the best step, as they are stored; None if no step was better than the start.
        error_before: at the start.
        error_after: after the best step.
        best_step: the step that was kept; 0 is the start.
        steps: steps that were made.
        diverged: the error turned NaN or Inf on the way.
    """

    layers: StoredLayers | None
    error_before: float
    error_after: float
    best_step: int
    steps: int
    diverged: bool


def relative_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean over tokens of `||y - t||^2 / ||t||^2`, a float32 scalar.

    Relative to each token, because the norm at the start of the next block divides every token by its own length: a
    few tokens are hundreds of times as long as the rest, and otherwise only they would be fitted.

    Args:
        output: y, (..., hidden) float.
        target: t, same shape.
    """
    wanted = target.to(output.device, torch.float32)
    squares = wanted.square().sum(-1)
    # A token of length zero has no relative error; it counts as one of the mean length.
    lengths = torch.where(squares > 0, squares, squares.mean().clamp_min(torch.finfo(torch.float32).tiny))
    return ((output.to(torch.float32) - wanted).square().sum(-1) / lengths).mean()


def squared_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean of `(y - t)^2` over all entries, a float32 scalar.

    Args:
        output: y, any shape, float.
        target: t, same shape.
    """
    return (output.to(torch.float32) - target.to(output.device, torch.float32)).square().mean()


def divergence(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the sum over tokens of `KL(p || q) = sum_v p_v (log p_v - log q_v)`, in nats, a float32 scalar.

    Args:
        logits: of q, (..., vocabulary) float.
        wanted: of p, same shape.
    """
    log_p = wanted.to(torch.float32).log_softmax(-1)
    log_q = logits.to(torch.float32).log_softmax(-1)
    return nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")


def judging_batches(trained: int) -> int:
    """Return how many batches judge, given how many are trained on."""
    return min(max(1, trained // _TRAINED_FOR_EACH), JUDGING_BATCHES)


Measure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def mean_error(
    forward: Callable[[int], torch.Tensor],
    targets: Sequence[torch.Tensor],
    batches: Sequence[int],
    measure: Measure = relative_error,
) -> float:
    """Return the mean error of some batches with the weights that the block now has.

    Args:
        forward: runs a batch, by number, through the weights as they stand.
        targets: per batch, what its output should be.
        batches: which of them.
        measure: error of an output relative to its target.
    """
    with torch.no_grad():
        return sum(float(measure(forward(batch), targets[batch])) for batch in batches) / len(batches)


class OutputObjective:
    """The error of an output that one call gives: of a block, or of a single layer.

    Args:
        layers: module name -> layer; their parameters are the weights that `forward` uses.
        forward: runs a batch, by number, through the weights as they stand, with gradients if those are on.
        targets: per batch, what its output should be, of the shape of the output.
        judging: the batches that judge, and are not trained on.
        measure: error of an output relative to its target.
    """

    def __init__(
        self,
        layers: Mapping[str, TrainableLayer],
        forward: Callable[[int], torch.Tensor],
        targets: Sequence[torch.Tensor],
        judging: Sequence[int],
        measure: Measure = relative_error,
    ) -> None:
        self._layers = layers
        self._forward = forward
        self._targets = targets
        self._judging = tuple(judging)
        self._measure = measure

    @property
    def trained(self) -> Sequence[int]:
        """Return the batches that are trained on."""
        return [batch for batch in range(len(self._targets)) if batch not in self._judging]

    @property
    def judging(self) -> Sequence[int]:
        """Return the batches that judge."""
        return self._judging

    def error(self, batches: Sequence[int]) -> float:
        """Return the mean error of some batches."""
        self._install()
        return mean_error(self._forward, self._targets, batches, self._measure)

    def gradients(self, batch: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Return each layer's name and the derivative of one batch's error by its weight."""
        self._install()
        parameters = [layer.parameter for layer in self._layers.values()]
        with gradients_by(parameters):
            loss = self._measure(self._forward(batch), self._targets[batch])
            derivatives = torch.autograd.grad(loss, parameters, allow_unused=True)
        return zip(self._layers, zeros_for_none(derivatives, parameters), strict=True)

    def _install(self) -> None:
        for layer in self._layers.values():
            layer.install()


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long layers are trained.

    Args:
        steps: how many steps at most.
        seed: draws the order of batches.
        warmup: 0 to 1; Adam's first steps depend on the sign of a single gradient.
        patience: after so many judgements without a better one training ends; more where a rising rate first undoes
            what was solved.
    """

    steps: int
    seed: int
    warmup: float = 0.0
    patience: int = _PATIENCE


def train_layers(
    layers: Mapping[str, TrainableLayer],
    objective: Objective,
    schedule: Schedule,
    *,
    record: Record | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Refinement:
    """Train layers together to lower an objective, and keep the best step.

    A step takes one batch, drawn without repetition until all were seen. The rate falls linearly to zero, after it has
    risen from it over the share `warmup` of the steps. Ten times on the way, and before the first step, the layers are
    judged on batches that are never trained on; training ends early when `patience` judgements in a row are no better
    than the best one. The same seed gives the same bits, wherever training was stopped in between.

    Args:
        layers: module name -> layer.
        objective: what is lowered; its names are those of `layers`.
        schedule: how many steps, and when to end earlier.
        record: where training may have stood before; None begins at the start.
        progress: called with (steps made, steps in all).

    Returns:
        Refinement: the layers as the best judgement found them.
    """
    held_out, trained_on = objective.judging, objective.trained
    steps, warmup = schedule.steps, schedule.warmup
    generator = torch.Generator().manual_seed(schedule.seed)
    order: list[int] = []
    kept: StoredLayers | None = None
    standing = record.load() if record is not None else None
    if record is None or standing is None:
        before = objective.error(held_out)
        standing = Standing(0, before, before, 0, 0)
    else:
        if standing.best_step:
            record.restore(best=True)
            kept = _results(layers)
        record.restore(best=False)
    error_before, best, best_step, since = standing.error_before, standing.best, standing.best_step, standing.since
    step, diverged = 0, not math.isfinite(error_before)
    while step < steps and not diverged and since < schedule.patience:
        if not order:
            order = [trained_on[i] for i in torch.randperm(len(trained_on), generator=generator).tolist()]
        batch = order.pop()
        step += 1
        if step <= standing.step:
            continue
        rate = (1.0 - (step - 1) / steps) * min(1.0, step / max(1.0, warmup * steps))
        for name, gradient in objective.gradients(batch):
            layers[name].step(gradient, rate)
        if progress is not None:
            progress(step, steps)
        if step % max(1, steps // JUDGEMENTS) and step < steps:
            continue
        error = objective.error(held_out)
        since += 1
        diverged = not math.isfinite(error)
        if error < best:
            best, best_step, since = error, step, 0
            kept = _results(layers)
        if record is not None and not diverged:
            record.save(Standing(step, error_before, best, best_step, since))
    return Refinement(kept, error_before, best, best_step, step, diverged)


def _results(layers: Mapping[str, TrainableLayer]) -> StoredLayers:
    return {name: layer.result() for name, layer in layers.items()}


@contextlib.contextmanager
def gradients_by(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Record what is computed from some parameters; their `requires_grad` is then as it was."""
    wanted = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, before in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(before)


def zeros_for_none(
    gradients: Sequence[torch.Tensor | None], parameters: Sequence[nn.Parameter]
) -> Iterator[torch.Tensor]:
    """Yield derivatives; a parameter that had no part in the error gets zeros."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        yield torch.zeros_like(parameter) if gradient is None else gradient
