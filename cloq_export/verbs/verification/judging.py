"""The verdict: the report of what was measured, the gates, and whether anything was judged at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from cloq_export.artifact.adapters import AdapterShelf, carried_note, forced_note, is_bound
from cloq_export.artifact.certificate import verify_certificate, verify_run
from cloq_export.artifact.needed_adapter import WHY
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.errors import FormatError
from cloq_export.files.versions import environment
from cloq_export.parity.answers import Answers
from cloq_export.parity.gate import JUDGED, SIGNIFICANCE, binding_limits, judge
from cloq_export.parity.metrics import collect_metrics
from cloq_export.parity.power import LEVEL, RATIO_UNSEEN, UNSEEN, SmallestLoss, false_alarm
from cloq_export.parity.provenance import NOT_RECORDED, Finding
from cloq_export.parity.quality import mcnemar
from cloq_export.parity.questions import POWER, blindness, question_facts, smallest_drop
from cloq_export.parity.report import (
    CertificateCheck,
    Conditions,
    Judged,
    LayerErrors,
    ParityReport,
    ServedAdapter,
)
from cloq_export.parity.task_report import RecordedAnswers, VerifiedTask, task_entry
from cloq_export.parity.tasks import gate_key
from cloq_export.texts.corpora import CalibrationText
from cloq_export.verbs.verification.float_side import FloatSide
from cloq_export.verbs.verification.plan import Plan, chance_of, typed_questions
from cloq_export.verbs.verification.reference_side import ReferenceSide
from cloq_export.verbs.verification.served_side import ServedSide

# The first token of a text is read off its prompt.
_FEWEST_STEPS = 2


def check_certificate(plan: Plan) -> tuple[CertificateCheck, Mapping[str, str] | None]:
    """Repeat the equality certificate of an export, or compare a run's checkpoint with its layers.

    Returns:
        (what comes of it, full module name -> digest of the layer; None where the certificate does not hold).
    """
    try:
        run = _run_of(plan)
        repeated = verify_certificate(plan.export) if run is None else verify_run(run)
    except FormatError as error:
        return CertificateCheck(False, reason=str(error)), None
    check = CertificateCheck(True, repeated.files, repeated.modules, tuple(repeated.not_covered))
    return check, repeated.digests


def conditions(plan: Plan, known: FloatSide, text: CalibrationText) -> Conditions:
    """Return under which conditions the figures were measured."""
    options, texts = plan.options, known.texts
    return Conditions(
        text=text.origin,
        text_sha256=text.sha256,
        window=options.window,
        windows=len(texts.windows),
        bos=options.bos,
        begin_tokens=tuple(texts.begin),
        tasks=tuple(options.tasks),
        prompts=len(texts.prompts),
        new_tokens=options.new_tokens,
        longest=len(texts.longest),
        liveness_tokens=len(texts.probes[0]),
        seed=options.seed,
        device=options.device,
        threads=torch.get_num_threads(),
    )


def describe_adapters(plan: Plan) -> tuple[ServedAdapter, ...]:
    """Return which adapters are served, and whether each was made for these codes."""
    return tuple(
        ServedAdapter(name, str(plan.folders[name]), len(read.pairs), is_bound(read.base_fingerprint, plan.checkpoint))
        for name, read in plan.adapters.items()
    )


def notes_of(plan: Plan, findings: tuple[Finding, ...]) -> list[str]:
    """Return what a reader of the report must know besides its figures."""
    forced = (forced_note(name, read.base_fingerprint, plan.checkpoint) for name, read in plan.adapters.items())
    notes = [note for note in forced if note is not None]
    shelf = AdapterShelf.of(plan.export)
    notes += shelf.notes if not plan.options.adapters else ()
    outside = {name: folder for name, folder in plan.folders.items() if folder not in shelf.folders.values()}
    notes += filter(None, (carried_note(name, folder) for name, folder in outside.items()))
    notes += [f"not proven: {each.what}: {each.reason}" for each in findings if each.verdict == NOT_RECORDED]
    if plan.checkpoint.needs_adapter:
        notes.append(f"the base alone was not scored, and no limit is set on it: {WHY}")
    if not plan.adapters:
        notes.append("there is no adapter: liveness and isolation were not measured")
    elif plan.rounds_activations:
        notes.append(
            "liveness was not measured: the graph rounds activations to int8, in which the effect of a single "
            "module drowns; an exact export of the same base shows it"
        )
    return notes


def verified_tasks(
    plan: Plan, known: FloatSide, side: ReferenceSide, served: ServedSide
) -> dict[str, tuple[VerifiedTask, ...]]:
    """Return task -> what was answered with each adapter, in which the float model stands too."""
    trained = plan.made.trained_on()
    verified = {}
    for name, (task, questions) in plan.tasks.items():
        rows = []
        recorded = plan.made.recorded_answers(task, questions)
        for adapter in plan.subjects:
            answers = {"float": known.answers[name], "reference": side.answers[adapter][name]}
            if adapter in served.answers:
                answers["served"] = served.answers[adapter][name]
            facts = question_facts(
                questions.keys,
                questions.hashes,
                trained.get(adapter or ""),
                asked=typed_questions(plan.options),
                limit=_p_value_limit(plan, name),
            )
            then = _recorded(recorded.get(adapter), answers.get("served"))
            rows.append(VerifiedTask(task_entry(task, questions, answers, adapter), facts, then))
        verified[name] = tuple(rows)
    return verified


def judged(plan: Plan, report: ParityReport) -> ParityReport:
    """Return the report with the figures of the gates, and the verdict on each."""
    blind = {
        f"{gate_key(name)}_p_value": reason
        for name, (_, questions) in plan.tasks.items()
        if (reason := blindness(questions.deciding, _p_value_limit(plan, name)))
    }
    reasons = tuple(_not_judged(plan, report, blind))
    metrics = collect_metrics(report) | {JUDGED: float(not reasons)}
    losses = _smallest_losses(plan, report)
    gates = [
        dataclasses.replace(verdict, finds=losses.get(verdict.gate))
        for verdict in judge(plan.limits, metrics, blind | ({JUDGED: "; ".join(reasons)} if reasons else {}))
    ]
    return dataclasses.replace(
        report, judged=Judged(not reasons, reasons), metrics=metrics, gates=tuple(gates), versions=environment()
    )


def layer_errors(plan: Plan) -> tuple[LayerErrors, ...] | None:
    """Return what the run measured of each layer, if the export still lies in its run."""
    for folder in (plan.export, *plan.export.resolve().parents[:2]):
        if RunDirectory.is_run(folder):
            rows = [_layer_errors(certificate) for certificate in RunDirectory.open(folder).certificates()]
            return tuple(rows) or None
    return None


def _layer_errors(certificate: Any) -> LayerErrors:
    return LayerErrors(**{field.name: getattr(certificate, field.name) for field in dataclasses.fields(LayerErrors)})


def _not_judged(plan: Plan, report: ParityReport, blind: Mapping[str, str]) -> list[str]:
    """Return why nothing was judged of the export, or of a part that verify is there for."""
    reasons = []
    largest = {"greedy_flips": float(sum(row.prompts for row in report.greedy))}
    if not set(binding_limits(plan.limits, largest)) - set(blind):
        reasons.append("every limit is dropped, or so wide that nothing can miss it")
    if plan.adapters and not report.conditions.prompts:
        reasons.append("no prompt was continued (`prompts=0`), so nothing that the adapters write was looked at")
    elif plan.adapters and report.conditions.new_tokens < _FEWEST_STEPS:
        reasons.append(
            f"texts of {report.conditions.new_tokens} token (`new_tokens`) come from the prompt alone, so no step with "
            f"the cache was looked at; let {_FEWEST_STEPS} or more be written"
        )
    if not report.conditions.windows:
        reasons.append("the text has no window")
    return reasons


def _smallest_losses(plan: Plan, report: ParityReport) -> dict[str, SmallestLoss]:
    """Return gate -> the smallest loss of accuracy, or rise of perplexity, that it could have seen here."""
    losses: dict[str, SmallestLoss] = {}
    for name, (_, questions) in plan.tasks.items():
        count, key, limits = len(questions.items), gate_key(name), plan.limits
        p_value = _p_value_limit(plan, name)
        losses[f"{key}_p_value"] = SmallestLoss(smallest_drop(questions.deciding, p_value), p_value, 1 - POWER)
        if (limit := limits.get(f"{key}_drop_upper")) is not None:
            losses[f"{key}_drop_upper"] = SmallestLoss(
                limit, false_alarm(count, limit, chance_of(plan.options)), UNSEEN
            )
        if (limit := limits.get(f"{key}_accuracy_drop_upper")) is not None:
            losses[f"{key}_accuracy_drop_upper"] = SmallestLoss(limit, None, UNSEEN)
    ratios = [row.ratio for row in report.quality.perplexity if row.model == "served" and row.ratio is not None]
    rises = [ratio.ratio_smallest_rise for ratio in ratios if ratio.ratio_smallest_rise is not None]
    if rises and len(rises) == len(ratios):
        rise = SmallestLoss(max(rises), (1 - LEVEL) / 2, RATIO_UNSEEN)
        losses |= {"perplexity_ratio_upper": rise, "perplexity_over_recorded": rise}
    return losses


def _p_value_limit(plan: Plan, task: str) -> float:
    return plan.limits.get(f"{gate_key(task)}_p_value", SIGNIFICANCE)


def _recorded(then: Mapping[int, bool] | None, served: Answers | None) -> RecordedAnswers | None:
    """Compare what is answered now with what the run recorded of the same questions."""
    if then is None:
        return None
    if served is None:
        return RecordedAnswers(len(then), sum(then.values()), None, None)
    now = [served.correct[number] for number in then]
    test = mcnemar(list(then.values()), now, "greater")
    return RecordedAnswers(len(then), sum(then.values()), sum(now), test.p_value)


def _run_of(plan: Plan) -> RunDirectory | None:
    """Return the run that a folder is, or whose own checkpoint it is."""
    export = plan.export
    for folder in (export, export.resolve().parent):
        if RunDirectory.is_run(folder):
            run = RunDirectory.open(folder)
            return run if folder == export or run.checkpoint_path.resolve() == export.resolve() else None
    return None
