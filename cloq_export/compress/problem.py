"""What the solve of one layer starts from, what it passes on, and what it ends with."""

from __future__ import annotations

import dataclasses

import torch

from cloq_export.adapt import GramRoot
from cloq_export.compress.plan import ModulePlan
from cloq_export.quantize import DampedGram, effective_rank
from cloq_export.types import LayerCertificate, LayerStats, LoraPair, QuantizedLayer

ADAPTER_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclasses.dataclass(frozen=True)
class InputFigures:
    """The figures of a certificate that depend on the input alone."""

    tokens: int
    condition: float
    effective_rank: float
    dead_columns: int

    @classmethod
    def of(cls, stats: LayerStats, damped: DampedGram | None) -> InputFigures:
        """Return the figures of an input's statistics; `damped` is None where no token reached it."""
        return cls(
            tokens=stats.tokens,
            condition=damped.condition() if damped is not None else 1.0,
            effective_rank=effective_rank(stats.gram),
            dead_columns=int((stats.gram.diagonal() == 0).sum()),
        )


@dataclasses.dataclass(frozen=True)
class LayerProblem:
    """What one layer should reproduce, and in which metric its errors count.

    Args:
        plan: the layer.
        weight: W, (out, in) float32.
        target: W or the error-aware target, same shape.
        damped: the damped H of its input, or None where no token reached the layer.
        root: its root for the closed form, or None.
        figures: the figures of a certificate that depend on the input alone.
        notes: what did not go the ordinary way.
        low_rank_round: as in LayerCertificate.
        needs_adapter: the codes that it has were made for what a pair leaves of the target.
    """

    plan: ModulePlan
    weight: torch.Tensor
    target: torch.Tensor
    damped: DampedGram | None
    root: GramRoot | None
    figures: InputFigures
    notes: tuple[str, ...]
    low_rank_round: int | None = None
    needs_adapter: bool = False

    def left(self, served: torch.Tensor) -> float:
        """Return `||(T - W') L||_F`, `L L^T` the damped H, for a served weight W' (out, in); unweighted without H."""
        error = self.target - served
        return float((error if self.damped is None else self.damped.weighted(error)).norm(dtype=torch.float64))


@dataclasses.dataclass(frozen=True)
class Dequantized:
    """Codes of a layer with the weight Q that they stand for, which is computed once.

    Args:
        layer: codes, scales and zeros, on the device of the solve.
        weight: Q, (out, in) float32, on the same device.
    """

    layer: QuantizedLayer
    weight: torch.Tensor

    @classmethod
    def of(cls, layer: QuantizedLayer, device: torch.device) -> Dequantized:
        """Return a layer on a device with its Q."""
        there = layer.to(device)
        return cls(there, there.dequantize())

    def served(self, pair: LoraPair | None) -> torch.Tensor:
        """Return `W' = Q + (alpha / rank) B A`, (out, in) float32, on the device of the codes."""
        return self.weight if pair is None else self.weight + pair.to(self.weight.device).product()


@dataclasses.dataclass(frozen=True)
class BestPair:
    """What an initialisation gives for codes that are fixed.

    Args:
        pair: the pair on the device of the solve, or None at rank 0.
        bound: the error that no pair of this rank can beat for these codes, absolute; NaN where it is not known.
        notes: what did not go the ordinary way.
    """

    pair: LoraPair | None
    bound: float = float("nan")
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Solution:
    """Codes and a pair for a layer, not judged yet.

    Args:
        problem: what it was solved for.
        codes: its codes, on the device of the problem.
        pair: its pair, or None.
        best: what the initialisation gives for the same codes; its bound goes into the certificate.
    """

    problem: LayerProblem
    codes: Dequantized
    pair: LoraPair | None
    best: BestPair


@dataclasses.dataclass(frozen=True)
class SolvedLayer:
    """One finished layer.

    Args:
        quantized: codes, scales, zeros, on the CPU.
        lora: the adapter pair, or None at rank 0.
        certificate: how good the two are.
        weight: `Q + B A`, (out, in) float32 on the device of the solve: what the next layers meet.
        problem: what it was solved for, by which another solution of the same layer can be judged; None where a worker
            elsewhere has solved it.
    """

    quantized: QuantizedLayer
    lora: LoraPair | None
    certificate: LayerCertificate
    weight: torch.Tensor
    problem: LayerProblem | None
