"""From the statistics of one input to the finished layers that read it: here quantize and adapt meet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cloq_export.adapt import GramRoot, cholesky_root, eigen_root, init_cloq, init_loftq, init_lq_lora, init_svd
from cloq_export.compress.plan import ModulePlan
from cloq_export.errors import NonFiniteError
from cloq_export.formats.registry import LAYOUTS
from cloq_export.quantize import (
    LOST_SHARE,
    DampedGram,
    QuantizeOptions,
    damp_gram,
    effective_rank,
    error_aware_target,
    lost_energy,
    lost_groups,
    quantize_group,
    spectral_norm,
)
from cloq_export.recipe import Recipe
from cloq_export.types import LayerCertificate, LayerStats, LoraPair, QuantizedLayer, QuantSpec

ADAPTER_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


# Choices of the recipe's `init`.
CLOQ = "cloq"
# Those that make codes and pair in alternation, and know no inputs.
ALTERNATIONS = {"loftq": init_loftq, "lq-lora": init_lq_lora}


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


@dataclasses.dataclass(frozen=True)
class LayerProblem:
    """What one layer should reproduce, and in which metric its errors count.

    Args:
        plan: the layer.
        weight: W, (out, in) float32.
        target: W or the error-aware target, same shape.
        damped: the damped H of its input, or None where no token reached the layer.
        root: its root for the closed form, or None.
        shared: the figures of a certificate that depend on the input alone.
        notes: what did not go the ordinary way.
    """

    plan: ModulePlan
    weight: torch.Tensor
    target: torch.Tensor
    damped: DampedGram | None
    root: GramRoot | None
    shared: _SharedNumbers
    notes: tuple[str, ...]


def served_weight(quantized: QuantizedLayer, lora: LoraPair | None) -> torch.Tensor:
    """Return `W' = Q + (alpha / rank) B A`, (out, in) float32, on the device of the codes."""
    weight = quantized.dequantize()
    return weight if lora is None else weight + lora.to(weight.device).product()


def solve_group(
    plans: Sequence[ModulePlan],
    weights: Mapping[str, torch.Tensor],
    stats: LayerStats,
    recipe: Recipe,
    kept_codes: Callable[[str], QuantizedLayer] | None = None,
) -> dict[str, SolvedLayer]:
    """Quantize and adapt the layers that read one input; H is factorised once for all of them.

    Args:
        plans: the layers.
        weights: full module name -> original W, (out, in) float32, on the device that computes.
        stats: H (and D) of their input, on the same device.
        recipe: every option of the run.
        kept_codes: gives the codes that a module keeps; None quantizes.

    Returns:
        Full module name -> finished layer.

    Raises:
        SingularStatsError: H does not factorise with any damping.
        NonFiniteError: a weight is NaN or Inf, or an adapter does not fit its dtype.
    """
    notes: list[str] = []
    damped: DampedGram | None = None
    if stats.tokens == 0 or float(stats.gram.diagonal().sum()) == 0.0:
        notes.append("no calibration token reached this layer: rounded to nearest, no adapter correction")
    else:
        damped = damp_gram(stats.gram, recipe.damping)
        if stats.tokens < stats.in_features:
            notes.append(
                f"{stats.tokens} calibration tokens for {stats.in_features} inputs: H has at most rank {stats.tokens}, "
                "damping decides the rest"
            )
        if damped.increases:
            notes.append(f"damping was raised {damped.increases} times before H factorised")
    targets = {plan.name: weights[plan.name] for plan in plans}
    # An alternation has no target but the weight.
    if damped is not None and stats.drift_gram is not None and recipe.init not in ALTERNATIONS:
        whole = stats.drift_gram is stats.gram
        # float32 is enough for a correction.
        of_drift = damped if whole else damp_gram(stats.drift_gram, recipe.damping, torch.float32)
        targets = {
            plan.name: error_aware_target(weights[plan.name], stats, of_drift, recipe.target_share(plan.spec.bits))
            for plan in plans
        }
    alternated: dict[str, LoraPair] = {}
    quantize_notes: dict[str, tuple[str, ...]] = {}
    if kept_codes is None and recipe.init in ALTERNATIONS:
        quantized, alternated = _alternate(plans, targets, recipe)
    elif kept_codes is None:
        quantized, quantize_notes = _quantize(plans, targets, damped, recipe)
    else:
        device = stats.gram.device
        quantized = {plan.name: kept_codes(plan.name).to(device) for plan in plans}
    shared = _SharedNumbers.of(stats, damped)
    root = _root(stats, damped) if damped is not None else None
    solved: dict[str, SolvedLayer] = {}
    for plan in plans:
        name = plan.name
        more = (*notes, *quantize_notes.get(name, ()))
        if kept_codes is None:
            more += _lost_notes(plan, weights[name], damped)
        problem = LayerProblem(plan, weights[name], targets[name], damped, root, shared, more)
        if name in alternated:
            pair = alternated[name]
            best = BestPair(pair, float("nan"), _wider(pair, ADAPTER_DTYPES[recipe.adapter_dtype]))
        else:
            best = best_pair(problem, quantized[name], recipe)
        solved[name] = finish_layer(problem, quantized[name], best.pair, best, recipe)
    return solved


@dataclasses.dataclass(frozen=True)
class _SharedNumbers:
    """The figures of a certificate that depend on the input alone."""

    tokens: int
    condition: float
    effective_rank: float
    dead_columns: int

    @classmethod
    def of(cls, stats: LayerStats, damped: DampedGram | None) -> _SharedNumbers:
        return cls(
            tokens=stats.tokens,
            condition=damped.condition() if damped is not None else 1.0,
            effective_rank=effective_rank(stats.gram),
            dead_columns=int((stats.gram.diagonal() == 0).sum()),
        )


def _alternate(
    plans: Sequence[ModulePlan], weights: Mapping[str, torch.Tensor], recipe: Recipe
) -> tuple[dict[str, QuantizedLayer], dict[str, LoraPair]]:
    """Return codes and pairs of an alternation; without an adapter there are only codes, rounded to nearest."""
    alternate = ALTERNATIONS[recipe.init]
    options = QuantizeOptions(method="rtn", grid=recipe.grid, least_zero=LAYOUTS[recipe.format].least_zero)
    layers: dict[str, QuantizedLayer] = {}
    pairs: dict[str, LoraPair] = {}
    for plan in plans:

        def rounded(weight: torch.Tensor, spec: QuantSpec = plan.spec) -> QuantizedLayer:
            return quantize_group([weight], spec, None, options).layers[0]

        if plan.rank:
            dtype = ADAPTER_DTYPES[recipe.adapter_dtype]
            layers[plan.name], pairs[plan.name] = alternate(weights[plan.name], rounded, plan.rank, dtype=dtype)
        else:
            layers[plan.name] = rounded(weights[plan.name])
    return layers, pairs


def _quantize(
    plans: Sequence[ModulePlan],
    targets: Mapping[str, torch.Tensor],
    damped: DampedGram | None,
    recipe: Recipe,
) -> tuple[dict[str, QuantizedLayer], dict[str, tuple[str, ...]]]:
    options = QuantizeOptions(
        method=recipe.method,
        grid=recipe.grid,
        magr_alpha=recipe.magr_alpha,
        sweeps=recipe.sweeps,
        refit=recipe.refit,
        least_zero=LAYOUTS[recipe.format].least_zero,
    )
    layers: dict[str, QuantizedLayer] = {}
    notes: dict[str, tuple[str, ...]] = {}
    for spec in dict.fromkeys(plan.spec for plan in plans):
        same = [plan.name for plan in plans if plan.spec == spec]
        try:
            group = quantize_group([targets[name] for name in same], spec, damped, options)
        except NonFiniteError as error:
            raise NonFiniteError(f"{' or '.join(same)}: {error}") from None
        for name, layer in zip(same, group.layers, strict=True):
            layers[name], notes[name] = layer, group.notes
    return layers, notes


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
            "to nothing; if they matter, leave the layer in float with --override 'MODULE:skip=true'"
        )
    if damped is not None:
        whole = _frobenius(damped.weighted(weight))
        share = _frobenius(damped.weighted(weight * (energy > 0))) / whole if whole else 0.0
        if share**2 > LOST_SHARE:
            notes.append(
                f"{share:.0%} of what this layer puts out on the calibration text comes from weights too small for "
                f"float16 scales; leave it in float with --override '{plan.name}:skip=true'"
            )
    return tuple(notes)


def _root(stats: LayerStats, damped: DampedGram) -> GramRoot:
    # Damping that only the quantizer needed must not blur the closed form: a singular H has its pseudo-inverse.
    return eigen_root(stats.gram.to(torch.float64)) if damped.increases else cholesky_root(damped.lower)


@dataclasses.dataclass(frozen=True)
class BestPair:
    """What the recipe's `init` gives for codes that stand.

    Args:
        pair: the pair on the device of the solve, or None at rank 0.
        bound: what no pair of this rank can beat for these codes, absolute; NaN where nothing is known of it.
        notes: what did not go the ordinary way.
    """

    pair: LoraPair | None
    bound: float
    notes: tuple[str, ...] = ()


def best_pair(problem: LayerProblem, quantized: QuantizedLayer, recipe: Recipe) -> BestPair:
    """Return the pair of the recipe's `init` for given codes of a layer, which are on the device of the solve."""
    rank = problem.plan.rank
    if not rank:
        return BestPair(None, float("nan"))
    dtype = ADAPTER_DTYPES[recipe.adapter_dtype]
    if recipe.init != CLOQ:
        # LoftQ's alternation ends with the same step.
        pair = init_svd(problem.weight, quantized.dequantize(), rank, dtype=dtype)
        return BestPair(pair, float("nan"), _wider(pair, dtype))
    if problem.root is None:
        # Nothing is known about the inputs: a zero B leaves Q as it is and can still be trained.
        out_features, in_features = problem.weight.shape
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        pair = LoraPair(start.to(dtype), torch.zeros(out_features, rank, dtype=dtype), float(rank))
        return BestPair(pair, float("nan"))
    result = init_cloq(
        problem.target, quantized.dequantize(), problem.root, rank, split=recipe.split, svd=recipe.svd, dtype=dtype
    )
    fell_back = result.svd_method == "full" and recipe.svd == "truncated"
    notes = ("the truncated SVD did not settle: the full one was taken",) if fell_back else ()
    return BestPair(result.pair, result.bound, (*notes, *_wider(result.pair, dtype)))


def _wider(pair: LoraPair, dtype: torch.dtype) -> tuple[str, ...]:
    """Return the note of a pair that its dtype could not hold."""
    if pair.lora_A.dtype == dtype:
        return ()
    asked = str(dtype).removeprefix("torch.")
    return (f"A and B are beyond the range of {asked}, so they are stored in float32",)


def _frobenius(matrix: torch.Tensor) -> float:
    return float(matrix.norm(dtype=torch.float64))


def finish_layer(
    problem: LayerProblem,
    quantized: QuantizedLayer,
    lora: LoraPair | None,
    best: BestPair,
    recipe: Recipe,
    refinement: Mapping[str, Any] | None = None,
    notes: tuple[str, ...] = (),
) -> SolvedLayer:
    """Return a layer with its certificate.

    Args:
        problem: what the layer should reproduce.
        quantized: its codes, on the device of the solve.
        lora: its pair, or None.
        best: what `init` gives for the same codes; its bound goes into the certificate.
        recipe: every option of the run.
        refinement: fields of the certificate that tell of a refinement, if there was one.
        notes: more for the certificate.
    """
    plan, damped, target, shared = problem.plan, problem.damped, problem.target, problem.shared
    served = served_weight(quantized, lora)
    weighted = (lambda error: error) if damped is None else damped.weighted
    whole, left = weighted(target), weighted(target - served)
    norm = _frobenius(whole) or 1.0
    error_adapted = _frobenius(left) / norm
    error_quantized = _frobenius(weighted(target - quantized.dequantize())) / norm if plan.rank else error_adapted
    fields: dict[str, Any] = {
        "method": recipe.init if recipe.init in ALTERNATIONS else "rtn" if damped is None else recipe.method,
        "target": "float weight"
        if target is problem.weight
        else f"error-aware target, share {recipe.target_share(plan.spec.bits):g}",
        **(refinement or {}),
    }
    certificate = LayerCertificate(
        module=plan.name,
        bits=plan.spec.bits,
        group_size=plan.spec.group_size,
        rank=plan.rank,
        tokens=shared.tokens,
        damping=damped.damping if damped is not None else 0.0,
        damping_increases=damped.increases if damped is not None else 0,
        error_quantized=error_quantized,
        error_adapted=error_adapted,
        error_bound=best.bound / norm if best.bound == best.bound else error_quantized,
        condition=shared.condition,
        effective_rank=shared.effective_rank,
        dead_columns=shared.dead_columns,
        spectral_error_adapted=spectral_norm(left) / (spectral_norm(whole) or 1.0),
        notes=(*problem.notes, *best.notes, *notes),
        **fields,
    )
    cpu = torch.device("cpu")
    return SolvedLayer(quantized.to(cpu), lora and lora.to(cpu), certificate, served, problem)
