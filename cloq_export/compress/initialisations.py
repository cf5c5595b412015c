"""How codes and a pair are first made for a layer: the choices of the recipe's `init`."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from typing import cast

import torch

from cloq_export.adapt import CloqOptions, init_cloq, init_svd
from cloq_export.compress.low_rank_first import LowRankFirst
from cloq_export.compress.problem import ADAPTER_DTYPES, BestPair, Dequantized, LayerProblem, Solution
from cloq_export.errors import NonFiniteError, RecipeError
from cloq_export.formats.registry import LAYOUTS
from cloq_export.models.experts import GATE, UP
from cloq_export.quantize import QuantizeOptions, quantize_group
from cloq_export.recipe import Recipe, is_expert, registered_choice
from cloq_export.types import LoraPair, QuantizedLayer


class Initialisation(abc.ABC):
    """Makes the first codes and pair of a layer, and the pair for codes that are fixed."""

    # True if codes and pair are made together, for the float weight: there is no error-aware target then.
    makes_codes = False

    @abc.abstractmethod
    def solve(self, problems: Sequence[LayerProblem], recipe: Recipe) -> Iterator[Solution]:
        """Yield codes and pairs of layers that read one input, in their order."""

    @abc.abstractmethod
    def best_pair(self, problem: LayerProblem, codes: Dequantized, recipe: Recipe) -> BestPair:
        """Return the pair for given codes of a layer, which are on the device of the solve."""

    def solve_for(self, problem: LayerProblem, codes: Dequantized, recipe: Recipe) -> Solution:
        """Return given codes of a layer with their pair."""
        best = self.best_pair(problem, codes, recipe)
        return Solution(problem, codes, best.pair, best)

    def sharing_a(self, solutions: Sequence[Solution], recipe: Recipe) -> list[Solution]:
        """Return solutions of layers that read one input, gate and up of an expert with one A.

        Raises:
            RecipeError: this initialisation has no such pair.
        """
        raise RecipeError(
            f"expert_shared_a is the closed form of two weights, and init={recipe.init} makes its pairs one by one; "
            f"choose init={CLOQ}, or leave expert_shared_a out."
        )

    @abc.abstractmethod
    def method(self, problem: LayerProblem, recipe: Recipe) -> str:
        """Return what a certificate says of how the codes were made."""


class _CodesFirst(Initialisation):
    """Makes codes as the recipe's `method` says, then a pair for them."""

    def solve(self, problems: Sequence[LayerProblem], recipe: Recipe) -> Iterator[Solution]:
        """Yield codes and pairs of layers that read one input, in their order."""
        for problem, layer in _quantized(problems, recipe):
            yield self.solve_for(problem, Dequantized(layer, layer.dequantize()), recipe)

    def method(self, problem: LayerProblem, recipe: Recipe) -> str:
        """Return what a certificate says of how the codes were made."""
        return "rtn" if problem.damped is None else recipe.method


class ClosedForm(_CodesFirst):
    """CLoQ's closed form on the calibration inputs (Theorem 3.1)."""

    def solve(self, problems: Sequence[LayerProblem], recipe: Recipe) -> Iterator[Solution]:
        """Yield codes and pairs of layers that read one input, in their order."""
        solutions = super().solve(problems, recipe)
        if not recipe.low_rank_rounds:
            return solutions
        rounds = LowRankFirst(
            recipe.low_rank_rounds,
            recipe.low_rank_share,
            codes_of=lambda rest: _quantized(rest, recipe),
            pair_of=lambda problem, weight: self.pair_for(problem, weight, recipe),
        )
        return rounds.improve(problems, list(solutions))

    def sharing_a(self, solutions: Sequence[Solution], recipe: Recipe) -> list[Solution]:
        """Return solutions of layers that read one input, gate and up of an expert with one A.

        Both weights below each other are one weight of the same input, whose pair the theorem gives: its A is that of
        both, and the rows of its B are those of each.
        """
        done = {each.problem.plan.name: each for each in solutions}
        for name, gate in list(done.items()):
            up = done.get(f"{name.removesuffix(GATE)}{UP}") if name.endswith(f".{GATE}") and is_expert(name) else None
            if up is None or gate.pair is None or up.pair is None or gate.pair.rank != up.pair.rank:
                continue
            if gate.problem.root is None:
                # Both start with the same A where nothing is known about the inputs.
                continue
            both = dataclasses.replace(gate.problem, target=torch.cat([gate.problem.target, up.problem.target]))
            best = self.pair_for(both, torch.cat([gate.codes.weight, up.codes.weight]), recipe)
            assert best.pair is not None
            rows = best.pair.lora_B.split([len(each.problem.target) for each in (gate, up)])
            for each, lora_b in zip((gate, up), rows, strict=True):
                pair = LoraPair(best.pair.lora_A, lora_b.contiguous(), best.pair.alpha)
                # The bound of both together says nothing of one alone.
                own = BestPair(pair, notes=best.notes)
                done[each.problem.plan.name] = dataclasses.replace(each, pair=pair, best=own)
        return list(done.values())

    def best_pair(self, problem: LayerProblem, codes: Dequantized, recipe: Recipe) -> BestPair:
        """Return the pair for given codes of a layer, which are on the device of the solve."""
        return self.pair_for(problem, codes.weight, recipe)

    def pair_for(self, problem: LayerProblem, quantized: torch.Tensor, recipe: Recipe) -> BestPair:
        """Return the pair for a given Q, (out, in) float32 on the device of the solve."""
        rank, dtype = problem.plan.rank, ADAPTER_DTYPES[recipe.adapter_dtype]
        if not rank:
            return BestPair(None)
        if problem.root is None:
            # Nothing is known about the inputs: a zero B leaves Q as it is and can still be trained.
            out_features, in_features = problem.weight.shape
            generator = torch.Generator().manual_seed(0)
            start = torch.randn(rank, in_features, generator=generator) / in_features**0.5
            return BestPair(LoraPair(start.to(dtype), torch.zeros(out_features, rank, dtype=dtype), float(rank)))
        options = CloqOptions(recipe.split, recipe.svd, dtype)
        result = init_cloq(problem.target, quantized, problem.root, rank, options)
        fell_back = result.svd_method == "full" and recipe.svd == "truncated"
        notes = ("the truncated SVD did not settle: the full one was taken",) if fell_back else ()
        return BestPair(result.pair, result.bound, (*notes, *wider_notes(result.pair, dtype)))


class WeightError(_CodesFirst):
    """The singular vectors of the weight error, without regard to the inputs."""

    def best_pair(self, problem: LayerProblem, codes: Dequantized, recipe: Recipe) -> BestPair:
        """Return the pair for given codes of a layer, which are on the device of the solve."""
        if not problem.plan.rank:
            return BestPair(None)
        dtype = ADAPTER_DTYPES[recipe.adapter_dtype]
        pair = init_svd(problem.weight, codes.weight, problem.plan.rank, dtype=dtype)
        return BestPair(pair, notes=wider_notes(pair, dtype))


CLOQ = "cloq"
_OWN: dict[str, Initialisation] = {CLOQ: ClosedForm(), "svd": WeightError()}


def initialisation_of(recipe: Recipe) -> Initialisation:
    """Return the initialisation that a recipe names: one of this package, or one that was registered."""
    return _OWN.get(recipe.init) or cast(Initialisation, registered_choice("init", recipe.init))


def wider_notes(pair: LoraPair, dtype: torch.dtype) -> tuple[str, ...]:
    """Return the note of a pair that its dtype could not hold."""
    if pair.lora_A.dtype == dtype:
        return ()
    asked = str(dtype).removeprefix("torch.")
    return (f"A and B are beyond the range of {asked}, so they are stored in float32",)


def _quantized(problems: Sequence[LayerProblem], recipe: Recipe) -> list[tuple[LayerProblem, QuantizedLayer]]:
    """Return each problem with its codes; layers of one grid are quantized together."""
    options = QuantizeOptions(
        method=recipe.method,
        grid=recipe.grid,
        magr_alpha=recipe.magr_alpha,
        sweeps=recipe.sweeps,
        refit=recipe.refit,
        least_zero=LAYOUTS[recipe.format].least_zero,
        range_shrink=recipe.range_shrink,
    )
    codes: dict[str, tuple[LayerProblem, QuantizedLayer]] = {}
    for spec in dict.fromkeys(problem.plan.spec for problem in problems):
        same = [problem for problem in problems if problem.plan.spec == spec]
        try:
            group = quantize_group([problem.target for problem in same], spec, same[0].damped, options)
        except NonFiniteError as error:
            raise NonFiniteError(f"{' or '.join(problem.plan.name for problem in same)}: {error}") from None
        for problem, layer in zip(same, group.layers, strict=True):
            noted = dataclasses.replace(problem, notes=(*problem.notes, *group.notes))
            codes[problem.plan.name] = noted, layer
    return [codes[problem.plan.name] for problem in problems]
