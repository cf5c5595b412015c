"""Start points that CLoQ is compared with: codes and a pair made in alternation, without any calibration."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from cloq_export.adapt import init_svd
from cloq_export.compress.initialisations import WeightError, wider_notes
from cloq_export.compress.problem import ADAPTER_DTYPES, BestPair, Dequantized, LayerProblem, Solution
from cloq_export.formats.registry import LAYOUTS
from cloq_export.quantize import QuantizeOptions, quantize_group
from cloq_export.recipe import Recipe
from cloq_export.types import LoraPair, QuantizedLayer, QuantSpec

# What LoftQ runs by default, as the CLoQ paper (section 3.2) notes.
LOFTQ_ITERATIONS = 5
# LQ-LoRA stops by its own criterion, mostly after five to ten.
LQ_LORA_ITERATIONS = 50


def init_loftq(
    weight: torch.Tensor,
    quantize: Callable[[torch.Tensor], QuantizedLayer],
    rank: int,
    *,
    iterations: int = LOFTQ_ITERATIONS,
    dtype: torch.dtype = torch.float16,
) -> tuple[QuantizedLayer, LoraPair]:
    """Return codes and pair by alternating minimisation of `||W - Q - B A||_F` (LoftQ, arXiv 2310.08659, Algorithm 1).

    `Q_t = q(W - B_{t-1} A_{t-1})` and `B_t A_t = SVD_r(W - Q_t)`, from `B_0 A_0 = 0`.

    Args:
        weight: W, (out, in) float32.
        quantize: q, from a weight to its codes on the grid.
        rank: 1 <= rank <= min(out, in).
        iterations: T, at least 1.
        dtype: of the stored pair; the iteration itself does not round the pair.

    Raises:
        ShapeError: rank is out of range.
        NonFiniteError: the pair does not fit float32.
    """
    product = torch.zeros_like(weight)
    for iteration in range(iterations):
        layer = quantize(weight - product)
        last = iteration + 1 == iterations
        pair = init_svd(weight, layer.dequantize(), rank, dtype=dtype if last else torch.float32)
        product = pair.product()
    return layer, pair


def init_lq_lora(
    weight: torch.Tensor,
    quantize: Callable[[torch.Tensor], QuantizedLayer],
    rank: int,
    *,
    iterations: int = LQ_LORA_ITERATIONS,
    dtype: torch.dtype = torch.float16,
) -> tuple[QuantizedLayer, LoraPair]:
    """Return codes and pair by the alternation of LQ-LoRA (arXiv 2311.12023, Algorithm 1), without its Fisher weights.

    `B_t A_t = SVD_r(W - Q_{t-1})` and `Q_t = q(W - B_t A_t)`, from `Q_0 = 0`, until `||W - Q_t - B_t A_t||_F` rises.

    Args:
        weight: W, (out, in) float32.
        quantize: q, from a weight to its codes on the grid.
        rank: 1 <= rank <= min(out, in).
        iterations: at most so many.
        dtype: of the stored pair; the iteration itself does not round the pair.

    Returns:
        The last codes and pair before the error rose.

    Raises:
        ShapeError: rank is out of range.
        NonFiniteError: the pair does not fit float32.
    """
    dequantized, smallest = torch.zeros_like(weight), float("inf")
    for _ in range(iterations):
        before = dequantized
        product = init_svd(weight, before, rank, dtype=torch.float32).product()
        codes = quantize(weight - product)
        dequantized = codes.dequantize()
        error = float((weight - dequantized - product).norm())
        if error >= smallest:
            break
        smallest, layer, origin = error, codes, before
    return layer, init_svd(weight, origin, rank, dtype=dtype)


class _Alternate(Protocol):
    def __call__(
        self,
        weight: torch.Tensor,
        quantize: Callable[[torch.Tensor], QuantizedLayer],
        rank: int,
        *,
        dtype: torch.dtype,
    ) -> tuple[QuantizedLayer, LoraPair]: ...


@dataclasses.dataclass(frozen=True)
class Alternation(WeightError):
    """Makes codes and pair in alternation. Where codes are kept, the pair is the last step, that of the weight error.

    Args:
        name: as recipes name it.
        alternate: makes codes and pair of a weight.
    """

    name: str
    alternate: _Alternate
    makes_codes = True

    def solve(self, problems: Sequence[LayerProblem], recipe: Recipe) -> Iterator[Solution]:
        """Yield codes and pairs of layers that read one input; without an adapter codes are rounded to nearest."""
        options = QuantizeOptions(method="rtn", grid=recipe.grid, least_zero=LAYOUTS[recipe.format].least_zero)
        dtype = ADAPTER_DTYPES[recipe.adapter_dtype]
        for problem in problems:
            rounded = functools.partial(_rounded, spec=problem.plan.spec, options=options)
            if problem.plan.rank:
                layer, pair = self.alternate(problem.weight, rounded, problem.plan.rank, dtype=dtype)
                best = BestPair(pair, notes=wider_notes(pair, dtype))
            else:
                layer, best = rounded(problem.weight), BestPair(None)
            yield Solution(problem, Dequantized(layer, layer.dequantize()), best.pair, best)

    def method(self, problem: LayerProblem, recipe: Recipe) -> str:
        """Return what a certificate says of how the codes were made."""
        return self.name


def _rounded(weight: torch.Tensor, *, spec: QuantSpec, options: QuantizeOptions) -> QuantizedLayer:
    return quantize_group([weight], spec, None, options).layers[0]


LOFTQ = Alternation("loftq", init_loftq)
LQ_LORA = Alternation("lq-lora", init_lq_lora)
