"""What a layer should reproduce when its inputs have already been changed by the compressed layers before it."""

from __future__ import annotations

import torch

from cloq_export.quantize.damping import DampedGram
from cloq_export.types import LayerStats


def error_aware_target(weight: torch.Tensor, stats: LayerStats, damped: DampedGram, share: float) -> torch.Tensor:
    """Return the weight that a layer should approximate on the inputs it will really meet.

    The layer meets x behind the compressed prefix while the float layer met f. The weight that best maps x to `W f`
    is `W + W D^T (H + lambda I)^-1` with `H = sum x x^T`, `D = sum x (f - x)^T`. Moving all the way makes every layer
    repair the errors of all layers before it on the calibration text and overfits; a share of the way helps.

    Args:
        weight: W, (out, in) float32.
        stats: the statistics of the layer's input; without D the weight itself is the target.
        damped: the damped H over the tokens of D.
        share: 0 keeps W, 1 moves all the way.

    Returns:
        The target, (out, in) float32.
    """
    if stats.drift is None or share == 0.0:
        return weight
    pull = stats.drift.to(torch.float32) @ weight.t()
    # float32 is enough for a correction, and halves the time of the two triangular solves.
    move = torch.cholesky_solve(pull, damped.lower_float32)
    return weight + share * move.t()
