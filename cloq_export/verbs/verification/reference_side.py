"""The reference, Q and B A apart in float32, and our packed runtime next to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from cloq_export.engines.protocol import ServedModel, TokenDistributions
from cloq_export.engines.transformers.reference import ReferenceModel, reference_model
from cloq_export.engines.transformers.served import packed_model
from cloq_export.parity import liveness
from cloq_export.parity.answers import Respondent
from cloq_export.parity.divergence import PlaceDivergences, divergences, next_logprobs, summarize_divergences
from cloq_export.parity.numerics import compare_logprobs, measure_logprobs
from cloq_export.parity.quality import PerplexityRow, perplexity_row
from cloq_export.parity.report import DivergenceRow, NumericsRow
from cloq_export.parity.tasks import PERPLEXITY
from cloq_export.process.host_memory import free_bytes
from cloq_export.verbs.verification.float_side import Answered, FloatSide, ask_tasks, whole_distribution
from cloq_export.verbs.verification.plan import Plan
from cloq_export.verbs.verification.progress import Progress

Logprobs = Sequence[torch.Tensor]
# An eighth of the memory that is free may hold the reference's distributions with one adapter, until an engine gives
# its own.
_SHARE_KEPT = 8


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """What the reference says of the probes, with an adapter and with each of its modules left out."""

    probed: Logprobs
    without: Mapping[str, Logprobs]


@dataclasses.dataclass(frozen=True)
class ReferenceSide:
    """What the reference says; keys are adapters, None is the base alone.

    Args:
        model: the reference.
        logprobs: of each window.
        longest: of the longest text.
        expected: greedy texts behind the prompts.
        answers: to the questions of each task.
        left_out: with each module left out, where modules are shown to be live one by one.
        numerics: how it differs from the float model.
        divergence: of its distributions from the float model's.
        distributions: of the windows on which they are compared, where memory has room for them.
        perplexity: of it.
    """

    model: ReferenceModel
    logprobs: Mapping[str | None, Logprobs]
    longest: Mapping[str | None, Logprobs]
    expected: Mapping[str | None, Sequence[Sequence[int]]]
    answers: Mapping[str | None, Answered]
    left_out: Mapping[str, LeftOut]
    numerics: tuple[NumericsRow, ...]
    divergence: tuple[DivergenceRow, ...]
    distributions: Mapping[str | None, Sequence[torch.Tensor]]
    perplexity: tuple[PerplexityRow, ...]


def measure_reference(plan: Plan, known: FloatSide, progress: Progress) -> ReferenceSide:
    """Measure the reference with every adapter, and its scores with none.

    Args:
        plan: what was asked.
        known: of the float model.
        progress: of the call.
    """
    options, texts = plan.options, known.texts
    reference = reference_model(known.base, known.folders, device=options.device, force=options.force)
    progress.session.say(f"measure the reference with {', '.join(plan.adapters) or 'no adapter'}")
    logprobs, longest, distributions = {}, {}, {}
    divergence: list[DivergenceRow] = []
    for adapter in plan.scored:
        longest[adapter] = measure_logprobs(reference, [texts.longest], [adapter])
        compared: Logprobs = ()
        if adapter in plan.subjects:
            row, compared, kept = _float_divergence(known, reference, adapter)
            divergence.append(row)
            distributions[adapter] = kept
        logprobs[adapter] = texts.scored_windows(reference, adapter, longest[adapter][0], known=compared)
    expected, answers, numerics, perplexity = {}, {}, [], []
    for number, adapter in enumerate(plan.subjects):
        numerics.append(NumericsRow("reference", "float", adapter, compare_logprobs(logprobs[adapter], known.logprobs)))
        perplexity += perplexity_rows(plan, known, "reference", adapter, logprobs[adapter])
        prompts = texts.prompts_of(number)
        expected[adapter] = reference.generate(prompts, [adapter] * len(prompts), options.new_tokens)
        answers[adapter] = ask_tasks(plan, "reference", Respondent(reference, known.tokenizer, adapter), progress)
    left = {}
    for name, read in {} if plan.rounds_activations else plan.adapters.items():
        progress.session.say(f"leave out each of {len(read.pairs)} modules of {name} in turn")
        with progress.phase("liveness"):
            left[name] = leave_out(reference, texts.probes, name, list(read.pairs))
    rows = tuple(numerics), tuple(divergence), distributions, tuple(perplexity)
    return ReferenceSide(reference, logprobs, longest, expected, answers, left, *rows)


def leave_out(
    reference: ReferenceModel, probes: Sequence[Sequence[int]], adapter: str, modules: Sequence[str]
) -> LeftOut:
    """Return what the reference says of the probes with an adapter, and with each module left out."""
    probed = measure_logprobs(reference, probes, [adapter] * len(probes))
    return LeftOut(probed, liveness.left_out(reference, probes, adapter, modules))


def _float_divergence(
    known: FloatSide, reference: ReferenceModel, adapter: str | None
) -> tuple[DivergenceRow, list[torch.Tensor], list[torch.Tensor]]:
    """Return how far the reference's distributions are from the float model's, its scores there, and what is kept."""
    places, scores, kept = [], [], []
    room = free_bytes() // _SHARE_KEPT
    # Window by window: distributions of a whole text may not fit into memory.
    for ids, of_float in zip(known.texts.compared, known.distributions, strict=True):
        distribution = whole_distribution(reference, ids, adapter)
        places.append(divergences(of_float, TokenDistributions(distribution)))
        scores.append(next_logprobs(distribution, ids))
        room -= distribution.nbytes
        if room >= 0:
            kept.append(distribution)
    return DivergenceRow("reference", "float", adapter, summarize_divergences(places)), scores, kept


def divergence_rows(
    known: FloatSide, side: ReferenceSide, measured: tuple[str, ServedModel], adapter: str | None
) -> list[DivergenceRow]:
    """Return the distance of a model's distributions from the float model's, and from the reference's.

    Args:
        known: of the float model.
        side: of the reference.
        measured: what the model is called, and the model.
        adapter: with which adapter.
    """
    name, model = measured
    places: dict[str, list[PlaceDivergences]] = {"float": [], "reference": []}
    kept = side.distributions[adapter]
    for number, (ids, of_float) in enumerate(zip(known.texts.compared, known.distributions, strict=True)):
        distributions = model.token_distributions([ids], [adapter])[0]
        expected = kept[number] if number < len(kept) else whole_distribution(side.model, ids, adapter)
        places["float"].append(divergences(of_float, distributions))
        places["reference"].append(divergences(expected, distributions))
    return [DivergenceRow(name, against, adapter, summarize_divergences(each)) for against, each in places.items()]


def perplexity_rows(
    plan: Plan, known: FloatSide, model: str, adapter: str | None, logprobs: Logprobs
) -> list[PerplexityRow]:
    """Return the perplexity of a model next to the float model's, none where it was not asked for."""
    if PERPLEXITY not in plan.options.tasks:
        return []
    against = None if model == "float" else known.logprobs
    return [perplexity_row(model, adapter, logprobs, against)]


def measure_packed(
    plan: Plan, known: FloatSide, side: ReferenceSide, progress: Progress
) -> tuple[list[NumericsRow], list[DivergenceRow], list[PerplexityRow]]:
    """Measure our packed runtime with every adapter, where it is not the one that serves."""
    numerics: list[NumericsRow] = []
    divergence: list[DivergenceRow] = []
    perplexity: list[PerplexityRow] = []
    if not plan.options.measures_packed:
        return numerics, divergence, perplexity
    with progress.phase("packed"):
        model = packed_model(known.base, known.folders, device=plan.options.device, force=plan.options.force)
        for adapter in plan.subjects:
            with progress.attempt(f"packed runtime, {adapter or 'base'}"):
                logprobs = measure_logprobs(model, known.texts.windows, [adapter] * len(known.texts.windows))
                differences = compare_logprobs(logprobs, side.logprobs[adapter])
                numerics.append(NumericsRow("packed", "reference", adapter, differences))
                divergence += divergence_rows(known, side, ("packed", model), adapter)
                perplexity += perplexity_rows(plan, known, "packed", adapter, logprobs)
    return numerics, divergence, perplexity
