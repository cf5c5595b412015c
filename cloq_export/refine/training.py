"""Train the layers of a block together on what the block puts out, and keep the best step."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from cloq_export.types import LoraPair, QuantizedLayer

# Windows that judge are never trained on: one batch in eight.
_HELD_OUT_EVERY = 8
# A step costs three times a judgement's batch; ten judgements tell the best step well enough.
_JUDGEMENTS = 10
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


Solution = dict[str, tuple[QuantizedLayer, LoraPair | None]]


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

    layers: Solution | None
    error_before: float
    error_after: float
    best_step: int
    steps: int
    diverged: bool


def relative_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean over tokens of `||y - t||^2 / ||t||^2`, a float32 scalar.

    Relative to each token, because the norm at the start of the next block divides every token by its own length: a
    few tokens are hundreds of times as long as the rest, and otherwise nothing but them would be fitted.

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


def held_out_batches(batches: int) -> list[int]:
    """Return the batches that only judge: the last eighth, at least one; all of them where there is only one."""
    return list(range(batches - max(1, batches // _HELD_OUT_EVERY), batches))


Measure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def held_out_error(
    forward: Callable[[int], torch.Tensor], targets: Sequence[torch.Tensor], measure: Measure = relative_error
) -> float:
    """Return the error on the held-out batches with the weights that the block now has.

    Args:
        forward: runs a batch, by number, through the weights as they stand.
        targets: per batch, what its output should be.
        measure: error of an output beside its target.
    """
    with torch.no_grad():
        errors = [float(measure(forward(batch), targets[batch])) for batch in held_out_batches(len(targets))]
    return sum(errors) / len(errors)


def train_layers(
    layers: Mapping[str, TrainableLayer],
    forward: Callable[[int], torch.Tensor],
    targets: Sequence[torch.Tensor],
    *,
    steps: int,
    seed: int,
    measure: Measure = relative_error,
) -> Refinement:
    """Train layers together until `forward` puts out nearly the targets, and leave the best step installed.

    A step takes one batch, drawn without repetition until all were seen. The rate falls linearly to zero. Ten times on
    the way, and before the first step, the layers are judged on batches that are never trained on; training ends early
    when four judgements in a row are no better than the best one. The same seed gives the same bits.

    Args:
        layers: module name -> layer; their parameters are the weights that `forward` uses.
        forward: runs a batch, by number, through the weights as they stand, with gradients if those are on.
        targets: per batch, what its output should be, of the shape of the output.
        steps: how many steps at most.
        seed: draws the order of batches.
        measure: the error that is trained on and judged by.

    Returns:
        Refinement. Without a better step the start stays installed.
    """
    held_out = held_out_batches(len(targets))
    trained_on = [batch for batch in range(len(targets)) if batch not in held_out] or held_out
    parameters = [layer.parameter for layer in layers.values()]
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []

    def loss_of(batch: int) -> torch.Tensor:
        return measure(forward(batch), targets[batch])

    def judged() -> float:
        for layer in layers.values():
            layer.install()
        return held_out_error(forward, targets, measure)

    error_before = best = judged()
    start = [parameter.data for parameter in parameters]
    kept, kept_weights, best_step, since, step, diverged = None, start, 0, 0, 0, not math.isfinite(error_before)
    while step < steps and not diverged and since < _PATIENCE:
        if not order:
            order = [trained_on[i] for i in torch.randperm(len(trained_on), generator=generator).tolist()]
        batch = order.pop()
        gradients = _gradients(parameters, functools.partial(loss_of, batch))
        for layer, gradient in zip(layers.values(), gradients, strict=True):
            layer.step(gradient, 1.0 - step / steps)
        step += 1
        if step % max(1, steps // _JUDGEMENTS) and step < steps:
            for layer in layers.values():
                layer.install()
            continue
        error = judged()
        since += 1
        diverged = not math.isfinite(error)
        if error < best:
            best, best_step, since = error, step, 0
            kept = {name: layer.result() for name, layer in layers.items()}
            kept_weights = [parameter.data for parameter in parameters]
    for parameter, weight in zip(parameters, kept_weights, strict=True):
        parameter.data = weight
    return Refinement(kept, error_before, best, best_step, step, diverged)


def _gradients(parameters: Sequence[nn.Parameter], loss: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """Return the derivatives of a loss by some parameters; a parameter that had no part in it gets zeros."""
    wanted = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            found = torch.autograd.grad(loss(), parameters, allow_unused=True)
    finally:
        for parameter, before in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(before)
    return [
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(parameters, found, strict=True)
    ]
