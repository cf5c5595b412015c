"""From the statistics of one input to the finished layers that read it: problem, codes, pair, certificate."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch

from cloq_export.adapt import GramRoot, cholesky_root, eigen_root
from cloq_export.compress.initialisations import Initialisation
from cloq_export.compress.plan import ModulePlan
from cloq_export.compress.problem import Dequantized, InputFigures, LayerProblem, Solution, SolvedLayer
from cloq_export.quantize import (
    LOST_SHARE,
    DampedGram,
    damp_gram,
    error_aware_target,
    lost_energy,
    lost_groups,
    spectral_norm,
)
from cloq_export.recipe import Recipe, is_expert
from cloq_export.types import LayerCertificate, LayerStats, LoraPair, QuantizedLayer


@dataclasses.dataclass(frozen=True)
class SolveRequest:
    """The layers that read one input, and all that their solve needs.

    Args:
        plans: the layers.
        weights: full module name -> original W, (out, in), any float dtype.
        stats: H (and D) of their input.
        recipe: every option of the run.
        initialisation: makes codes and pairs.
        kept: full module name -> codes that it keeps; None makes codes.
        kept_need_adapter: codes that are kept were made for what another adapter leaves of the weights.
    """

    plans: tuple[ModulePlan, ...]
    weights: Mapping[str, torch.Tensor]
    stats: LayerStats
    recipe: Recipe
    initialisation: Initialisation
    kept: Mapping[str, QuantizedLayer] | None = None
    kept_need_adapter: bool = False

    def on(self, device: torch.device) -> SolveRequest:
        """Return the request with weights and statistics on a device."""
        weights = {plan.name: self.weights[plan.name].to(device) for plan in self.plans}
        return dataclasses.replace(self, weights=weights, stats=self.stats.to(device))

    def of(self, plan: ModulePlan) -> SolveRequest:
        """Return the request for one of its layers alone."""
        return dataclasses.replace(self, plans=(plan,))


def served_weight(quantized: QuantizedLayer, lora: LoraPair | None) -> torch.Tensor:
    """Return `W' = Q + (alpha / rank) B A`, (out, in) float32, on the device of the codes."""
    return Dequantized.of(quantized, quantized.codes.device).served(lora)


def solve_group(request: SolveRequest) -> dict[str, SolvedLayer]:
    """Quantize and adapt the layers that read one input; H is factorised once for all of them.

    Args:
        request: its weights and statistics on the device that computes.

    Returns:
        Full module name -> finished layer.

    Raises:
        SingularStatsError: H does not factorise with any damping.
        NonFiniteError: a weight is NaN or Inf, or an adapter does not fit its dtype.
    """
    problems = _problems(request)
    solutions: Iterable[Solution]
    recipe, initialisation, kept = request.recipe, request.initialisation, request.kept
    # One after the other, so that Q of one layer at a time is held.
    if kept is None:
        solutions = map(_with_lost_notes, initialisation.solve(problems, recipe))
    else:
        codes = (Dequantized.of(kept[problem.plan.name], request.stats.gram.device) for problem in problems)
        solutions = (initialisation.solve_for(*each, recipe) for each in zip(problems, codes, strict=True))
    if recipe.expert_shared_a and any(is_expert(plan.name) for plan in request.plans):
        solutions = initialisation.sharing_a(list(solutions), recipe)
    return {each.problem.plan.name: finish_layer(each, recipe, initialisation) for each in solutions}


def _problems(request: SolveRequest) -> list[LayerProblem]:
    """Return what each layer of a request should reproduce."""
    stats, recipe = request.stats, request.recipe
    notes: list[str] = []
    damped: DampedGram | None = None
    if stats.tokens + stats.lent_tokens == 0 or float(stats.gram.diagonal().sum()) == 0.0:
        notes.append("no calibration token reached this layer: rounded to nearest, no adapter correction")
    else:
        damped = damp_gram(stats.gram, recipe.damping)
        if stats.lent_tokens:
            share = stats.lent_tokens / (stats.tokens + stats.lent_tokens)
            notes.append(
                f"{stats.tokens} calibration tokens reached this expert, too few for {stats.in_features} inputs: "
                f"{share:.0%} of H is of other tokens of its block"
            )
        elif stats.tokens < stats.in_features:
            notes.append(
                f"{stats.tokens} calibration tokens for {stats.in_features} inputs: H has at most rank {stats.tokens}, "
                "damping decides the rest"
            )
        if damped.increases:
            notes.append(f"damping was raised {damped.increases} times before H factorised")
    of_drift: DampedGram | None = None
    if damped is not None and stats.drift_gram is not None and not request.initialisation.makes_codes:
        whole = stats.drift_gram is stats.gram
        # float32 is enough for a correction.
        of_drift = damped if whole else damp_gram(stats.drift_gram, recipe.damping, torch.float32)
    figures = InputFigures.of(stats, damped)
    root = root_of(stats, damped) if damped is not None else None
    problems: list[LayerProblem] = []
    for plan in request.plans:
        weight = target = request.weights[plan.name].to(torch.float32)
        if of_drift is not None:
            target = error_aware_target(weight, stats, of_drift, recipe.target_share(plan.spec.bits))
        problem = LayerProblem(plan, weight, target, damped, root, figures, tuple(notes))
        problems.append(dataclasses.replace(problem, needs_adapter=request.kept_need_adapter))
    return problems


def _with_lost_notes(solution: Solution) -> Solution:
    problem = solution.problem
    lost = _lost_notes(problem.plan, problem.weight, problem.damped)
    return dataclasses.replace(solution, problem=dataclasses.replace(problem, notes=(*problem.notes, *lost)))


def _lost_notes(plan: ModulePlan, weight: torch.Tensor, damped: DampedGram | None) -> tuple[str, ...]:
    """Return the notes of a layer that loses outputs, or a part of all of them, to the smallest scale."""
    lost = lost_groups(weight, plan.spec)
    if not bool(lost.any()):
        return ()
    notes: list[str] = []
    energy = lost_energy(weight, lost)
    rows, of_rows = energy.sum(1), weight.to(torch.float64).square().sum(1)
    outputs = int((rows > 0.5 * of_rows).sum())
    if outputs > LOST_SHARE * weight.shape[0]:
        notes.append(
            f"{outputs} of {weight.shape[0]} outputs have weights too small for float16 scales and are rounded to next "
            "to nothing; if they matter, leave the layer in float with `overrides='MODULE:skip=true'`"
        )
    if damped is not None:
        whole = _frobenius(damped.weighted(weight))
        share = _frobenius(damped.weighted(weight * (energy > 0))) / whole if whole else 0.0
        if share**2 > LOST_SHARE:
            notes.append(
                f"{share:.0%} of what this layer puts out on the calibration text comes from weights too small for "
                f"float16 scales; leave it in float with `overrides='{plan.name}:skip=true'`"
            )
    return tuple(notes)


def root_of(stats: LayerStats, damped: DampedGram) -> GramRoot:
    """Return the root of H for the closed form."""
    # Damping that was raised for the quantizer would blur the closed form; a singular H has a pseudo-inverse instead.
    return eigen_root(stats.gram.to(torch.float64)) if damped.increases else cholesky_root(damped.lower)


def _frobenius(matrix: torch.Tensor) -> float:
    return float(matrix.norm(dtype=torch.float64))


def finish_layer(
    solution: Solution,
    recipe: Recipe,
    initialisation: Initialisation,
    notes: Sequence[str] = (),
) -> SolvedLayer:
    """Return a layer with its certificate.

    Args:
        solution: codes and pair.
        recipe: every option of the run.
        initialisation: what made the first codes and pair.
        notes: more for the certificate.
    """
    problem, codes = solution.problem, solution.codes
    plan, damped, target, figures = problem.plan, problem.damped, problem.target, problem.figures
    served = codes.served(solution.pair)
    weighted = (lambda error: error) if damped is None else damped.weighted
    whole, left = weighted(target), weighted(target - served)
    norm = _frobenius(whole) or 1.0
    error_adapted = _frobenius(left) / norm
    error_quantized = _frobenius(weighted(target - codes.weight)) / norm if plan.rank else error_adapted
    bound = solution.best.bound
    certificate = LayerCertificate(
        module=plan.name,
        bits=plan.spec.bits,
        group_size=plan.spec.group_size,
        rank=plan.rank,
        method=initialisation.method(problem, recipe),
        target="float weight"
        if target is problem.weight
        else f"error-aware target, share {recipe.target_share(plan.spec.bits):g}",
        tokens=figures.tokens,
        damping=damped.damping if damped is not None else 0.0,
        damping_increases=damped.increases if damped is not None else 0,
        error_quantized=error_quantized,
        error_adapted=error_adapted,
        error_bound=bound / norm if bound == bound else error_quantized,
        condition=figures.condition,
        effective_rank=figures.effective_rank,
        dead_columns=figures.dead_columns,
        spectral_error_adapted=spectral_norm(left) / (spectral_norm(whole) or 1.0),
        low_rank_round=problem.low_rank_round,
        needs_adapter=problem.needs_adapter,
        notes=(*problem.notes, *solution.best.notes, *notes),
    )
    cpu, pair = torch.device("cpu"), solution.pair
    return SolvedLayer(codes.layer.to(cpu), pair and pair.to(cpu), certificate, served, problem)
