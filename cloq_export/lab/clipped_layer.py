"""ApiQ's quantizer: a weight rounded on a range whose ends are trained, beside an adapter that starts at zero."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn

from cloq_export.types import LoraPair, QuantizedLayer, QuantSpec

# ApiQ's own settings: the range starts at sigmoid(4) = 0.982 of the extremes; AdamW at constant rates.
_START = 4.0
_RANGE_RATE, _ADAPTER_RATE, _DECAY = 5e-3, 5e-4, 0.1
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-14, 65504.0


@dataclasses.dataclass(frozen=True)
class StoredForm:
    """How a layer is stored.

    Args:
        spec: the grid.
        rank: of the adapter; 0 trains the ranges alone.
        adapter_dtype: in which A and B are stored.
        least_zero: smallest zero that the layout can hold, 0 or 1.
    """

    spec: QuantSpec
    rank: int
    adapter_dtype: torch.dtype
    least_zero: int = 0


class ClippedLayer:
    """One layer as ApiQ trains it (Liao et al., arXiv 2402.05147, section 4): the ends of each group's range, A and B.

    ```
    high = sigmoid(gamma) max(w)    low = sigmoid(beta) min(w)    s = (high - low) / (2^bits - 1)    z = round(-low / s)
    Q = s (clip(round(w / s) + z, 0, 2^bits - 1) - z)             W' = Q + B A
    ```

    with w a group of the float weight, gamma = beta = 4 at first, A drawn as PEFT draws it and B = 0. Rounding passes
    gradients straight through. The layouts ask for two changes to ApiQ: the range includes 0, so that zeros stay within
    the codes, and scales are rounded to float16.

    Args:
        parameter: where `install` puts the weight.
        weight: W, (out, in) float32.
        form: in which it is stored.
        dtype: of the installed weight.
        seed: draws A.
    """

    def __init__(
        self, parameter: nn.Parameter, weight: torch.Tensor, form: StoredForm, *, dtype: torch.dtype, seed: int
    ) -> None:
        self.parameter = parameter
        spec, rank = form.spec, form.rank
        self._spec = spec
        self._least_zero = form.least_zero
        self._dtype = dtype
        self._adapter_dtype = form.adapter_dtype
        out_features, in_features = weight.shape
        self._weight = weight.view(out_features, spec.group_count(in_features), -1)
        self._low = self._weight.amin(-1, keepdim=True).clamp_max(0.0)
        self._high = self._weight.amax(-1, keepdim=True).clamp_min(0.0)
        self._beta = torch.full_like(self._low, _START).requires_grad_()
        self._gamma = torch.full_like(self._high, _START).requires_grad_()
        self._pair: tuple[torch.Tensor, torch.Tensor] | None = None
        groups = [{"params": [self._beta, self._gamma], "lr": _RANGE_RATE}]
        if rank:
            bound = math.sqrt(1.0 / in_features)  # kaiming_uniform_ with a = sqrt(5)
            drawn = torch.rand(rank, in_features, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1.0
            lora_a = (drawn * bound).to(weight.device).requires_grad_()
            lora_b = torch.zeros(out_features, rank, device=weight.device).requires_grad_()
            self._pair = (lora_a, lora_b)
            groups.append({"params": [lora_a, lora_b], "lr": _ADAPTER_RATE})
        self._optimizer = torch.optim.AdamW(groups, weight_decay=_DECAY)
        self._served: torch.Tensor | None = None

    def install(self) -> None:
        """Put the weight that would be served now into `parameter`."""
        with torch.enable_grad():
            codes, scales, zeros = self._quantized()
            served = ((codes - zeros) * scales).view(self.parameter.shape)
            if self._pair is not None:
                lora_a, lora_b = (_through(part, part.to(self._adapter_dtype).to(part.dtype)) for part in self._pair)
                served = served + lora_b @ lora_a
        self._served = served
        self.parameter.data = served.detach().to(self._dtype)

    def step(self, gradient: torch.Tensor, rate: float) -> None:
        """Move every trained part by one step of AdamW; its rates are constant, as ApiQ's are."""
        assert self._served is not None
        self._optimizer.zero_grad()
        self._served.backward(gradient.to(torch.float32))
        self._optimizer.step()

    @torch.no_grad()
    def result(self) -> tuple[QuantizedLayer, LoraPair | None]:
        """Return the layer as it would be stored now."""
        codes, scales, zeros = self._quantized()
        layer = QuantizedLayer(
            codes=codes.to(torch.uint8).view(self.parameter.shape),
            scales=scales.squeeze(-1).to(torch.float16),
            zeros=zeros.squeeze(-1).to(torch.uint8),
            spec=self._spec,
        )
        if self._pair is None:
            return layer, None
        lora_a, lora_b = (part.detach().to(self._adapter_dtype) for part in self._pair)
        return layer, LoraPair(lora_a, lora_b, float(lora_a.shape[0]))

    def _quantized(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return codes (out, groups, span), scales and zeros (out, groups, 1), all float32, with gradients."""
        largest = self._spec.max_code
        low, high = torch.sigmoid(self._beta) * self._low, torch.sigmoid(self._gamma) * self._high
        if self._spec.symmetric:
            exact = 2.0 * torch.maximum(-low, high) / largest
        else:
            exact = (high - low) / largest
        scales = exact.clamp(_SMALLEST_SCALE, _LARGEST_SCALE)
        scales = _through(scales, scales.to(torch.float16).to(torch.float32))
        if self._spec.symmetric:
            zeros = torch.full_like(scales, float(2 ** (self._spec.bits - 1)))
        else:
            wanted = -low / scales
            zeros = _through(wanted, wanted.round().clamp(self._least_zero, largest))
        steps = self._weight / scales
        codes = (_through(steps, steps.round()) + zeros).clamp(0, largest)
        return codes, scales, zeros


def _through(exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """Return the rounded values, to the last bit, with the gradient of the exact ones."""
    return rounded.detach() + (exact - exact.detach())
