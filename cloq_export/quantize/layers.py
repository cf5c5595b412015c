"""Quantize the layers that share one input: one factorisation of H, one walk over the columns for all of them."""

from __future__ import annotations

import dataclasses

import torch

from cloq_export.quantize.comq import refit_scales, sweep_codes
from cloq_export.quantize.damping import DampedGram
from cloq_export.quantize.grid import fit_grid, raise_zeros, round_to_grid
from cloq_export.quantize.magr import reduce_magnitude
from cloq_export.quantize.optq import optq_codes
from cloq_export.types import QuantizedLayer, QuantSpec


@dataclasses.dataclass(frozen=True)
class QuantizeOptions:
    """How codes are chosen.

    Args:
        method: "rtn" rounds to nearest; "optq" walks the columns; "magr" smooths the weight first, then "optq".
        grid: "searched" or "minmax".
        magr_alpha: weight of MagR's penalty; used by "magr" only.
        sweeps: coordinate descent sweeps after OPTQ.
        refit: fit the scales to the codes by least squares before each sweep, or once without sweeps.
        least_zero: smallest zero that the layout can hold, 0 or 1.
        range_shrink: share of its range that a group's "minmax" grid spans.
    """

    method: str = "optq"
    grid: str = "searched"
    magr_alpha: float = 1e-3
    sweeps: int = 0
    refit: bool = False
    least_zero: int = 0
    range_shrink: float = 1.0


@dataclasses.dataclass(frozen=True)
class QuantizedGroup:
    """The layers of one shared input after quantization.

    Args:
        layers: one QuantizedLayer per weight, in the order given.
        notes: what did not go the ordinary way, in plain words.
    """

    layers: tuple[QuantizedLayer, ...]
    notes: tuple[str, ...]


def _spread(values: torch.Tensor, columns: int) -> torch.Tensor:
    """Return per-group values (out, groups) repeated to (out, columns) float32."""
    return values.to(torch.float32).repeat_interleave(columns // values.shape[1], dim=1)


def quantize_group(
    targets: list[torch.Tensor], spec: QuantSpec, damped: DampedGram | None, options: QuantizeOptions
) -> QuantizedGroup:
    """Quantize weights that are multiplied with the same input, together: rows are independent given H.

    Args:
        targets: W of each layer, (out_i, in) float32, all with the same `in`.
        spec: the grid that they share.
        damped: the damped H of their input; None rounds to nearest.
        options: how codes are chosen.

    Returns:
        QuantizedGroup; the layers equal those of separate calls, under MagR within its stopping tolerance (it stops
        when all rows together have settled).

    Raises:
        ShapeError: in is not divisible by the group size.
        NonFiniteError: a weight is NaN or Inf.
    """
    stacked = torch.cat(targets) if len(targets) > 1 else targets[0]
    notes: list[str] = []
    columns = stacked.shape[1]
    source = stacked
    if options.method == "magr" and damped is not None:
        smoothed = reduce_magnitude(stacked, damped.gram, spec.columns_per_group(columns), options.magr_alpha)
        source = smoothed.weight
        if not smoothed.converged:
            notes.append(f"MagR stopped after {smoothed.iterations} iterations before it converged")
    fitted = fit_grid(source, spec, options.grid, options.range_shrink)
    scales, zeros = raise_zeros(*fitted, spec, options.least_zero)
    column_scales, column_zeros = _spread(scales, columns), _spread(zeros, columns)
    if options.method == "rtn" or damped is None:
        codes = round_to_grid(source, column_scales, column_zeros, spec.max_code).to(torch.uint8)
    else:
        codes = optq_codes(source, column_scales, column_zeros, spec.max_code, damped.gram)
        for sweep in range(max(options.sweeps, int(options.refit))):
            if options.refit:
                scales = refit_scales(stacked, codes, scales, zeros, damped.gram)
                column_scales = _spread(scales, columns)
            if sweep < options.sweeps:
                codes = sweep_codes(stacked, codes, column_scales, column_zeros, spec.max_code, damped.gram)
    sizes = [target.shape[0] for target in targets]
    parts = zip(codes.split(sizes), scales.split(sizes), zeros.split(sizes), strict=True)
    layers = tuple(QuantizedLayer(c.contiguous(), s.contiguous(), z.contiguous(), spec) for c, s, z in parts)
    return QuantizedGroup(layers, tuple(notes))
