"""Low rank first: A and B are taken out of the weight before its codes are made, in rounds; the best one is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch

from cloq_export.compress.problem import BestPair, Dequantized, LayerProblem, Solution
from cloq_export.types import LoraPair, QuantizedLayer


def taken_out(rank: int, share: float) -> int:
    """Return how much of a rank a round takes out of the weight before its codes are made: at least 1."""
    return max(1, round(share * rank))


def leading_product(pair: LoraPair, rank: int) -> torch.Tensor:
    """Return the best approximation of a lower rank, (out, in) float32, in a pair of the closed form.

    Args:
        pair: its rows of A and columns of B come by descending singular value, with scaling 1.
        rank: at most the pair's.
    """
    return LoraPair(pair.lora_A[:rank], pair.lora_B[:, :rank], float(rank)).product()


@dataclasses.dataclass(frozen=True)
class LowRankFirst:
    """Alternates between codes for what a part of the rank leaves of the target, and a pair for what they leave.

    With `LR_k(E)` the closed form of rank k for an error E under H (CLoQ, Theorem 3.1) and q the quantizer of the run,
    T the target:

        Q_t = q(T - LR_k(T - Q_{t-1}))        B_t A_t = LR_r(T - Q_t)        Q_0 = 0

    Only the order differs from the alternation of CLoQ section 3.1, which begins with `Q_1 = q(T)`: the directions
    that carry most of a layer's output never pass through the grid, whose ranges can follow the rest.

    Args:
        rounds: how many.
        share: k over r, above 0, to 1.
        codes_of: makes the codes of problems that read one input, for their targets.
        pair_of: makes the pair of full rank r for a problem and a Q.
    """

    rounds: int
    share: float
    codes_of: Callable[[Sequence[LayerProblem]], Sequence[tuple[LayerProblem, QuantizedLayer]]]
    pair_of: Callable[[LayerProblem, torch.Tensor], BestPair]

    def improve(self, problems: Sequence[LayerProblem], ordinary: Sequence[Solution]) -> Iterator[Solution]:
        """Yield, for each layer, the best of its ordinary solution and those of all rounds, by its calibrated error.

        Args:
            problems: layers that read one input.
            ordinary: their solutions, codes first.
        """
        best = [self._begun(solution) for solution in ordinary]
        turns = [number for number, solution in enumerate(best) if solution.problem.low_rank_round is not None]
        errors = {number: _error(best[number]) for number in turns}
        out = {number: self._leading(self._of_all(problems[number])) for number in turns}
        for low_rank_round in range(1, self.rounds + 1):
            rest = [
                dataclasses.replace(problems[number], target=problems[number].target - out[number]) for number in turns
            ]
            for number, (made_for, layer) in zip(turns, self.codes_of(rest), strict=True):
                problem = dataclasses.replace(
                    problems[number], notes=made_for.notes, low_rank_round=low_rank_round, needs_adapter=True
                )
                codes = Dequantized(layer, layer.dequantize())
                pair = self.pair_of(problem, codes.weight)
                solution = Solution(problem, codes, pair.pair, pair)
                out[number] = self._leading(pair)
                error = _error(solution)
                if error < errors[number]:
                    best[number], errors[number] = solution, error
        yield from best

    def _begun(self, solution: Solution) -> Solution:
        """Return a solution that says whether rounds follow, and if not, why."""
        problem = solution.problem
        if not problem.plan.rank or problem.root is None:
            return solution
        smaller = min(problem.target.shape)
        if taken_out(problem.plan.rank, self.share) < smaller:
            return dataclasses.replace(solution, problem=dataclasses.replace(problem, low_rank_round=0))
        note = (
            f"a rank of {problem.plan.rank} would take all of this layer, whose smaller side is {smaller}, out before "
            "its codes are made, so they were made first"
        )
        return dataclasses.replace(solution, problem=dataclasses.replace(problem, notes=(*problem.notes, note)))

    def _of_all(self, problem: LayerProblem) -> BestPair:
        """Return the pair for Q = 0: the best approximation of the target itself."""
        return self.pair_of(problem, torch.zeros_like(problem.target))

    def _leading(self, pair: BestPair) -> torch.Tensor:
        """Return the product of the first k triplets of a pair, (out, in) float32: they come by singular value."""
        assert pair.pair is not None  # layers without a rank have no rounds
        return leading_product(pair.pair, taken_out(pair.pair.rank, self.share))


def _error(solution: Solution) -> float:
    return solution.problem.left(solution.codes.served(solution.pair))
