"""Accumulate the Gram matrix of a layer's inputs over calibration tokens."""

from __future__ import annotations

import functools
from typing import Literal

import torch

from cloq_export.errors import ShapeError
from cloq_export.kernels.dispatch import triton_takes
from cloq_export.kernels.products import float32_products
from cloq_export.types import LayerStats

Weighting = Literal["none", "inverse_norm"]

# Panels of the upper triangle: eight cost 0.56 of the full product and are still wide enough for full speed; where
# the product first rounds its operands, each panel rounds them again, and three do best.
_PANELS, _ROUNDED_PANELS = 8, 3
_SMALLEST_PANEL = 64


class GramAccumulator:
    """Sums `H = sum_t w_t x_t x_t^T` and, on request, `D = sum_t w_t x_t (f_t - x_t)^T` over the tokens of one layer.

    The sums are float32 and independent of any enclosing autocast or reduced matrix-product precision: a Gram matrix
    whose sums are rounded is not positive definite. Only the panels on and above the diagonal of H are
    computed, then mirrored, so H is symmetric to the last bit. D, a correction that is small compared to H and need not
    be definite, multiplies operands rounded to bfloat16 where the CPU has fast instructions for it (TF32 on GPUs).

    Weighting "inverse_norm" takes `w_t = 1 / ||x_t||`, not normalised: it depends on the token alone, so neither the
    order nor the size of batches matters, and the scale of H cancels in everything built on it because damping is
    relative to its trace. Tokens that are zero count as weight 0.

    Args:
        in_features: width of the inputs.
        weighting: "none" or "inverse_norm".
        drift: also sum D; `add` then needs the float model's inputs.
        rounded: the layers multiply their inputs rounded to bfloat16, so H is summed over the rounded inputs too: it
            is then exactly the Gram matrix of what the products take, in float32 sums. Weighted tokens are not rounded.
        device: where the sums live and are computed.
    """

    def __init__(
        self,
        in_features: int,
        *,
        weighting: Weighting = "none",
        drift: bool = False,
        rounded: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.in_features = in_features
        self.weighting = weighting
        self.rounded = rounded
        self.device = torch.device(device)
        self.tokens = 0
        self._sums_drift = drift

    # Made with the first token: many experts of a large mixture get theirs late, and some get none.
    @functools.cached_property
    def _gram(self) -> torch.Tensor:
        return torch.zeros(self.in_features, self.in_features, dtype=torch.float32, device=self.device)

    @functools.cached_property
    def _drift(self) -> torch.Tensor | None:
        return torch.zeros_like(self._gram) if self._sums_drift else None

    def add(
        self,
        inputs: torch.Tensor,
        float_inputs: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> None:
        """Add the tokens of one batch.

        Args:
            inputs: x, (..., in), any float dtype; all leading dimensions are tokens.
            float_inputs: f, the same tokens' inputs in the float model, same shape; needed with `drift`.
            weights: further token weights >= 0, of the shape of `inputs` without its last dimension; they multiply
                those of the weighting.

        Raises:
            ShapeError: the width is not `in_features`, the shapes disagree, or `float_inputs` is missing or not
                expected.
        """
        self._check(inputs, float_inputs, weights)
        if inputs.numel() == 0:
            return
        rounded = (self.rounded or _survives_rounding(inputs, self.device)) and not self._weighted(weights)
        with torch.no_grad(), torch.autocast(device_type=self.device.type, enabled=False):
            fused = rounded and triton_takes(self._gram)
            if fused:
                self._add_narrow(inputs)
            self.tokens += inputs.numel() // self.in_features
            if fused and self._drift is None:
                return
            plain = tokens = self._rows(inputs)
            if self._weighted(weights):
                root = self._token_weights(tokens, weights).sqrt_().unsqueeze_(1)
                # Both factors carry the root, so that H stays a sum of squares under rounding.
                tokens = plain * root
            elif self.rounded:
                # torch itself rounds operands only on CPUs with AMX, and not those of small products.
                tokens = plain.to(torch.bfloat16).to(torch.float32)
            if not fused:
                with float32_products("medium" if rounded else "highest"):
                    self._add_gram(tokens, _ROUNDED_PANELS if rounded else _PANELS)
            if self._drift is not None and float_inputs is not None:
                away = self._rows(float_inputs) - plain
                if self._weighted(weights):
                    away.mul_(root)
                with float32_products("medium"):
                    self._drift.addmm_(tokens.T, away)

    def stats(self) -> LayerStats:
        """Return the sums so far; more tokens may be added afterwards.

        Returns:
            LayerStats: H (in, in) float32 symmetric, the token count, and D or None.

        Raises:
            NonFiniteError: an input was NaN or Inf.
        """
        gram = self._gram.triu()
        gram += self._gram.triu(1).T
        drift = None if self._drift is None else self._drift.clone()
        return LayerStats(gram=gram, tokens=self.tokens, drift=drift, drift_gram=None if drift is None else gram)

    def _add_gram(self, tokens: torch.Tensor, panels: int) -> None:
        panel = max(_SMALLEST_PANEL, -(-self.in_features // panels))
        for start in range(0, self.in_features, panel):
            rows = slice(start, min(start + panel, self.in_features))
            # In place into a strided view: BLAS writes with H's row stride, nothing is copied.
            self._gram[rows, start:].addmm_(tokens[:, rows].T, tokens[:, start:])

    def _add_narrow(self, inputs: torch.Tensor) -> None:
        """Add tokens to H on a GPU as 16-bit numbers, as the layers multiply them."""
        from cloq_export.kernels.triton.gram import add_gram

        rows = inputs.detach().reshape(-1, self.in_features)
        dtype = rows.dtype if rows.dtype == torch.float16 else torch.bfloat16
        add_gram(self._gram, rows.to(device=self.device, dtype=dtype).contiguous())

    def _rows(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.detach().reshape(-1, self.in_features).to(device=self.device, dtype=torch.float32)

    def _weighted(self, weights: torch.Tensor | None) -> bool:
        return weights is not None or self.weighting != "none"

    def _token_weights(self, tokens: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        if weights is None:
            result = torch.ones(tokens.shape[0], dtype=torch.float32, device=self.device)
        else:
            result = weights.detach().reshape(-1).to(device=self.device, dtype=torch.float32, copy=True)
        if self.weighting == "inverse_norm":
            norms = torch.linalg.vector_norm(tokens, dim=1)
            result = torch.where(norms > 0, result / norms, torch.zeros_like(result))
        return result

    def _check(self, inputs: torch.Tensor, float_inputs: torch.Tensor | None, weights: torch.Tensor | None) -> None:
        if inputs.ndim == 0 or inputs.shape[-1] != self.in_features:
            raise ShapeError(
                f"inputs have shape {tuple(inputs.shape)}; this Gram matrix takes (..., {self.in_features}). "
                "Use one accumulator per distinct input."
            )
        if (float_inputs is None) == self._sums_drift:
            raise ShapeError(
                "the float model's inputs are missing; the drift needs both."
                if float_inputs is None
                else "the float model's inputs were given, but this accumulator sums no drift; "
                "create it with drift=True."
            )
        if float_inputs is not None and float_inputs.shape != inputs.shape:
            raise ShapeError(
                f"inputs have shape {tuple(inputs.shape)}, the float model's {tuple(float_inputs.shape)}; both must "
                "hold the same tokens."
            )
        if weights is not None and weights.shape != inputs.shape[:-1]:
            raise ShapeError(
                f"token weights have shape {tuple(weights.shape)}; inputs {tuple(inputs.shape)} need "
                f"{tuple(inputs.shape[:-1])}."
            )


def _survives_rounding(tensor: torch.Tensor, device: torch.device) -> bool:
    """Return whether the fast matrix product rounds nothing: bfloat16 on CPUs, TF32 (which holds float16) on GPUs."""
    return tensor.dtype == torch.bfloat16 or (tensor.dtype == torch.float16 and device.type == "cuda")
