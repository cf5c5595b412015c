"""A layer whose codes, scales and adapter are trained, with the derivatives written out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import nn

from cloq_export.types import LoraPair, QuantizedLayer

_MOMENTUM, _SQUARES = 0.9, 0.99
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-14, 65504.0
# A position starts no farther than this from its code, so that it rounds to it however far OPTQ has moved the code.
_FARTHEST_START = 0.49
_LARGEST_2_BIT_CODE = 3


class _Adam:
    """The direction of Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1) for one tensor, without its rate."""

    def __init__(self, like: torch.Tensor) -> None:
        self._mean = torch.zeros_like(like)
        self._squares = torch.zeros_like(like)
        self._steps = 0

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        self._steps += 1
        self._mean.lerp_(gradient, 1.0 - _MOMENTUM)
        self._squares.lerp_(gradient.square(), 1.0 - _SQUARES)
        root = (self._squares / (1.0 - _SQUARES**self._steps)).sqrt_()
        # No constant added to the root: gradients of a block have no natural size. Without any gradient nothing moves.
        mean = self._mean / (1.0 - _MOMENTUM**self._steps)
        return torch.where(root > 0, mean / root, mean)

    def state(self) -> dict[str, torch.Tensor]:
        return {"mean": self._mean, "squares": self._squares, "steps": torch.tensor(self._steps)}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        self._mean.copy_(state["mean"])
        self._squares.copy_(state["squares"])
        self._steps = int(state["steps"])


@dataclasses.dataclass(frozen=True)
class Rates:
    """Rates of Adam, relative to what is trained.

    Of scales and codes for 2 bits: the more codes a grid has, the farther a step of its scale moves the outermost one,
    and the less there is to win by moving any. Wider layers take `3 / (2^bits - 1)` of both.

    Args:
        scales: the share of itself by which a scale moves at most in a step.
        adapter: the share of their root mean square by which A and B do.
        codes: the share of the distance of two codes by which a position does.
    """

    scales: float
    adapter: float
    codes: float = 0.0


BLOCK_RATES, MODEL_RATES = Rates(5e-3, 1e-2, 1e-3), Rates(2e-3, 5e-3)


class TrainedLayer:
    """One layer whose codes, s, A and B are trained through the gradient G of a loss by the served weight W'.

    ```
    W' = s (codes - z) + B A          dL/ds = sum over the group of G (codes - z)     dL/dA = Bᵀ G     dL/dB = G Aᵀ
    codes = round(p)                  dL/dp = s G, straight through the rounding
    ```

    p is the position of each weight on the grid, between 0 and the largest code. It starts where W - B A lies, or, if
    that is nearer to another code than the start's, at the end of the start's own cell on that side. s is trained by
    its logarithm, so that it stays positive, and enters W' as float16 holds it; A and B enter as their dtype holds
    them. So what is judged is what is stored, and the first W' is the start's to the last bit.

    Args:
        parameter: where `install` puts the weight; G is by this parameter.
        start: the layer and its pair, if it has one, on the device of the training.
        dtype: of the installed weight.
        scales: whether scales are trained; without them only the pair is.
        weight: W, (out, in) float32 on the same device, whose codes are trained; None keeps the codes.
        rates: how fast.
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        start: tuple[QuantizedLayer, LoraPair | None],
        *,
        dtype: torch.dtype,
        scales: bool,
        weight: torch.Tensor | None = None,
        rates: Rates = BLOCK_RATES,
    ) -> None:
        quantized, lora = start
        self.parameter = parameter
        self._rates = rates
        self._of_grid = _LARGEST_2_BIT_CODE / quantized.spec.max_code
        self._dtype = dtype
        self._quantized = quantized
        out_features, groups = quantized.scales.shape
        # Kept narrow: all layers of a model may be trained at once.
        self._narrow = torch.int8 if quantized.spec.bits < 8 else torch.int16
        codes = quantized.codes.view(out_features, groups, -1).to(self._narrow)
        self._centred = codes - self._zeros()
        self._start = quantized.scales.to(torch.float32).unsqueeze(-1)
        self._log = torch.zeros_like(self._start)
        self._scale_steps = _Adam(self._log) if scales else None
        self._lora = lora
        self._positions = None if weight is None else self._first_positions(weight)
        if self._positions is not None:
            self._position_steps = _Adam(self._positions)
        if lora is not None:
            self._lora_a = lora.lora_A.to(torch.float32, copy=True)
            self._lora_b = lora.lora_B.to(torch.float32, copy=True)
            self._a_steps, self._b_steps = _Adam(self._lora_a), _Adam(self._lora_b)
            self._a_size, self._b_size = _root_mean_square(self._lora_a), _root_mean_square(self._lora_b)

    def install(self) -> None:
        """Put the weight that would be served now into `parameter`."""
        weight = self._wide().mul_(self._scales()).view(self.parameter.shape)
        if self._lora is not None:
            lora_a, lora_b = self._stored_pair()
            weight = weight + (lora_b.to(torch.float32) @ lora_a.to(torch.float32)) * self._lora.scaling
        self.parameter.data = weight.to(self._dtype)

    def derivatives(self, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the derivatives of the loss by what is trained.

        Args:
            gradient: G, (out, in) float.

        Returns:
            "log_scales" (out, groups, 1), "positions" (out, groups, span), "lora_A" (rank, in) and "lora_B" (out,
            rank), float32, if they are trained.
        """
        derivatives: dict[str, torch.Tensor] = {}
        if self._positions is not None:
            derivatives["positions"] = gradient.to(torch.float32).view(self._centred.shape) * self._scales()
        if self._scale_steps is not None:
            by_code = self._wide().mul_(gradient.to(torch.float32).view(self._centred.shape))
            derivatives["log_scales"] = by_code.sum(-1, keepdim=True) * self._scales()
        if self._lora is not None:
            # In the dtype of G: a wider one would add no digit to it.
            lora_a, lora_b = self._lora_a.to(gradient.dtype), self._lora_b.to(gradient.dtype)
            derivatives["lora_A"] = (lora_b.t() @ gradient).to(torch.float32) * self._lora.scaling
            derivatives["lora_B"] = (gradient @ lora_a.t()).to(torch.float32) * self._lora.scaling
        return derivatives

    def _wide(self) -> torch.Tensor:
        """Return codes less zeros in float32: products of mixed dtypes take several times as long."""
        return self._centred.to(torch.float32)

    def step(self, gradient: torch.Tensor, rate: float) -> None:
        """Move codes, scales, A and B by one step of Adam.

        Args:
            gradient: G, (out, in) float.
            rate: share of the full rate, 1 to 0.
        """
        derivatives = self.derivatives(gradient)
        if self._scale_steps is not None:
            size = self._rates.scales * self._of_grid * rate
            self._log.sub_(self._scale_steps.direction(derivatives["log_scales"]), alpha=size)
        if self._positions is not None:
            size = self._rates.codes * self._of_grid * rate
            self._positions.sub_(self._position_steps.direction(derivatives["positions"]), alpha=size)
            self._positions.clamp_(0.0, float(self._quantized.spec.max_code))
            self._round_positions()
        if self._lora is not None:
            size = self._rates.adapter * rate
            self._lora_a.sub_(self._a_steps.direction(derivatives["lora_A"]), alpha=size * self._a_size)
            self._lora_b.sub_(self._b_steps.direction(derivatives["lora_B"]), alpha=size * self._b_size)

    def state(self) -> dict[str, torch.Tensor]:
        """Return all that training moves, e.g. "log_scales" (out, groups, 1) and "log_scales.mean"; not copied."""
        state: dict[str, torch.Tensor] = {}
        for name, (values, adam) in self._trained().items():
            state[name] = values
            state |= {f"{name}.{part}": tensor for part, tensor in adam.state().items()}
        return state

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state` returned.

        Args:
            state: on any device, with the names and shapes of this layer.
        """
        for name, (values, adam) in self._trained().items():
            values.copy_(state[name])
            adam.restore({part: state[f"{name}.{part}"] for part in adam.state()})
        if self._positions is not None:
            self._round_positions()

    def _trained(self) -> dict[str, tuple[torch.Tensor, _Adam]]:
        parts: dict[str, tuple[torch.Tensor, _Adam]] = {}
        if self._scale_steps is not None:
            parts["log_scales"] = self._log, self._scale_steps
        if self._positions is not None:
            parts["positions"] = self._positions, self._position_steps
        if self._lora is not None:
            parts["lora_A"] = self._lora_a, self._a_steps
            parts["lora_B"] = self._lora_b, self._b_steps
        return parts

    def result(self) -> tuple[QuantizedLayer, LoraPair | None]:
        """Return the layer as it would be stored now."""
        start = self._quantized
        codes = (self._centred + self._zeros()).to(torch.uint8).view(start.codes.shape)
        layer = QuantizedLayer(codes, self._scales().squeeze(-1).to(torch.float16), start.zeros, start.spec)
        if self._lora is None:
            return layer, None
        lora_a, lora_b = self._stored_pair()
        return layer, LoraPair(lora_a.clone(), lora_b.clone(), self._lora.alpha)

    def _first_positions(self, weight: torch.Tensor) -> torch.Tensor:
        """Return p, (out, groups, span) float32; its rounding is the start's codes."""
        beside = weight
        if self._lora is not None:
            beside = weight - self._lora.product().to(weight.device)
        codes = self._quantized.codes.view(self._centred.shape).to(torch.float32)
        away = beside.view(codes.shape) / self._start + self._zeros().to(torch.float32) - codes
        # With a scale of zero a weight has no place on the grid.
        away = torch.where(self._start > 0, away, torch.zeros_like(away))
        positions = codes + away.clamp_(-_FARTHEST_START, _FARTHEST_START)
        return positions.clamp_(0.0, float(self._quantized.spec.max_code))

    def _round_positions(self) -> None:
        assert self._positions is not None
        self._centred = self._positions.round().to(self._narrow) - self._zeros()

    def _zeros(self) -> torch.Tensor:
        """Return the zeros, (out, groups, 1)."""
        return self._quantized.zeros.to(self._narrow).unsqueeze(-1)

    def _scales(self) -> torch.Tensor:
        """Return the scales as they are stored, (out, groups, 1), in float32."""
        moved = (self._start * self._log.exp()).clamp(_SMALLEST_SCALE, _LARGEST_SCALE)
        # A scale that was not moved is stored unchanged, even below the smallest normal number.
        return torch.where(self._log == 0, self._start, moved.to(torch.float16).to(torch.float32))

    def _stored_pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._lora is not None
        return self._lora_a.to(self._lora.lora_A.dtype), self._lora_b.to(self._lora.lora_B.dtype)


def _root_mean_square(tensor: torch.Tensor) -> float:
    return float(tensor.square().mean().sqrt())
