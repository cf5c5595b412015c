"""The figures that a gate can be set on, out of all that was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from cloq_export.parity.gate import TASK_GATES
from cloq_export.parity.provenance import NOT_RECORDED, PROVEN, Finding, RecordedRatio
from cloq_export.parity.quality import PerplexityRow
from cloq_export.parity.report import DivergenceRow, NumericsRow, ParityReport
from cloq_export.parity.task_report import VerifiedTask
from cloq_export.parity.tasks import gate_key

# What a finding on the float model is called, rather than one on the export.
_REFERENCE = ("reference", "tokenizer of the reference")
Row = TypeVar("Row")


def collect_metrics(report: ParityReport) -> dict[str, float | None]:
    """Return the figures that a gate can be set on; None for what could not be measured.

    Where there are several adapters, the worst one counts, and one that is missing makes the figure missing.

    Args:
        report: the report as it is measured so far.
    """
    adapters = [each.name for each in report.adapters]
    subjects: list[str | None] = [*adapters] or [None]
    findings = report.provenance.findings
    perplexities = _whole([row for row in report.quality.perplexity if row.model == "served"], subjects)
    ratios = [row.ratio for row in perplexities]
    greedy = _whole(report.greedy, subjects)
    metrics: dict[str, float | None] = {
        "certificate": float(report.certificate.passed),
        "provenance": _verdict(each for each in findings if not each.what.startswith(_REFERENCE)),
        "reference": _verdict(each for each in findings if each.what.startswith(_REFERENCE)),
        "float_part": _verdict(report.float_part),
        "last_step_difference_mean": _worst(row.mean for row in report.provenance.probes),
        "noise_floor_max": report.noise_floor.max,
        **_numeric_metrics(report, adapters),
        **_divergence_metrics(report.divergence, subjects),
        "scale_error_max": None if report.scales is None else report.scales.largest,
        "perplexity_ratio": _worst(None if ratio is None else ratio.ratio_to_float for ratio in ratios),
        "perplexity_over_recorded": _over_recorded(perplexities, report.provenance.recorded_ratios),
        "perplexity_ratio_upper": _worst(None if ratio is None else ratio.ratio_upper for ratio in ratios),
        "greedy_agreement": _share([(row.agreement, row.prompts) for row in greedy]),
        "greedy_flips": float(sum(row.flips for row in greedy)) if greedy else None,
        "live_modules": _worst((row.live_share for row in report.liveness), least=True),
    }
    for task, entries in report.quality.tasks.items():
        metrics |= _task_metrics(task, entries)
    return metrics


def _numeric_metrics(report: ParityReport, adapters: Sequence[str]) -> dict[str, float | None]:
    """Return differences of log-probabilities and gaps of texts, in nats and over the float model's own."""
    subjects: list[str | None] = [*adapters] or [None]
    scored = subjects if report.needs_adapter else list(dict.fromkeys([*subjects, None]))
    served = _rows(report.numerics, "served", scored)
    packed = _rows(report.numerics, "packed", subjects)
    if not packed and report.runtime == "hf" and report.dtype == "float32":
        packed = served
    longest = _rows(report.numerics, "served at length", scored)
    means_of_float = {row.measured: row.differences.mean for row in report.numerics if row.against == "float"}
    own, own_longest = (means_of_float.get(f"float in served precision{at}") for at in ("", ", at length"))
    written = [row for row in report.decoding if row.kind != "mixed"]
    mixed = [row for row in report.decoding if row.kind == "mixed"]
    isolation = report.isolation
    means = {
        "logprob_difference": (_worst(row.differences.mean for row in served), own),
        "longest_difference": (_worst(row.differences.mean for row in longest), own_longest),
        "decode_gap": (_worst(row.gap_mean for row in written), own),
        "mixed_decode_gap": (_worst(row.gap_mean for row in mixed), own),
        "mixed_batch_difference": (_worst(row.mean for row in isolation.by_adapter) if isolation else None, own),
    }
    figures: dict[str, float | None] = {
        "logprob_difference_max": _worst(row.differences.max for row in served),
        "packed_logprob_difference_max": _worst(row.differences.max for row in packed),
        "token_mult_prob_error": _worst(row.differences.token_mult_prob_error for row in served),
        "longest_difference_max": _worst(row.differences.max for row in longest),
        "decode_gap_max": _worst(row.gap_max for row in written),
        "mixed_decode_gap_max": _worst(row.gap_max for row in mixed),
        "mixed_batch_difference_max": isolation.max if isolation else None,
    }
    for name, (mean, of_float) in means.items():
        if name != "mixed_batch_difference":
            figures[f"{name}_mean"] = mean
        figures[f"{name}_over_float"] = _over(mean, of_float)
    return figures


def _divergence_metrics(rows: Sequence[DivergenceRow], subjects: Sequence[str | None]) -> dict[str, float | None]:
    figures: dict[str, float | None] = {}
    for against in ("float", "reference"):
        served = _whole([row for row in rows if (row.measured, row.against) == ("served", against)], subjects)
        divergences = [row.divergence for row in served]
        figures |= {
            f"kl_to_{against}_mean": _worst(each.kl_mean for each in divergences),
            f"kl_to_{against}_99": _worst(each.kl_quantile_99 for each in divergences),
            f"kl_to_{against}_max": _worst(each.kl_max for each in divergences),
            f"top1_agreement_{against}": _worst((each.top1_agreement for each in divergences), least=True),
        }
    return figures


def _rows(rows: Iterable[NumericsRow], measured: str, subjects: Sequence[str | None]) -> list[NumericsRow]:
    return _whole([row for row in rows if (row.measured, row.against) == (measured, "reference")], subjects)


def _whole(rows: Sequence[Row], subjects: Sequence[str | None]) -> list[Row]:
    """Return rows, none if one of the subjects has no row: its figure is then missing as a whole."""
    return list(rows) if {row.adapter for row in rows} >= set(subjects) else []  # type: ignore[attr-defined]


def _verdict(findings: Iterable[Finding]) -> float | None:
    """Return 1 if all that was recorded is proven, 0 if something is not, None if nothing was compared."""
    verdicts = [each.verdict for each in findings if each.verdict != NOT_RECORDED]
    return float(all(verdict == PROVEN for verdict in verdicts)) if verdicts else None


def _over_recorded(rows: Sequence[PerplexityRow], recorded: Sequence[RecordedRatio]) -> float | None:
    lower = {row.adapter: row.ratio.ratio_lower for row in rows if row.ratio is not None}
    return _worst(_over(lower.get(entry.adapter), entry.ratio) for entry in recorded)


def _worst(values: Iterable[float | None], *, least: bool = False) -> float | None:
    known = list(values)
    numbers = [value for value in known if value is not None]
    if not known or len(numbers) < len(known):
        return None
    return min(numbers) if least else max(numbers)


def _over(value: float | None, own: float | None) -> float | None:
    return None if value is None or not own else value / own


def _share(weighted: Sequence[tuple[float | None, int]]) -> float | None:
    total = sum(weight for _, weight in weighted)
    known = [value * weight for value, weight in weighted if value is not None]
    return sum(known) / total if total and len(known) == len(weighted) else None


def _task_metrics(task: str, entries: Sequence[VerifiedTask]) -> dict[str, float | None]:
    figures = [_task_figures(entry) for entry in entries]
    metrics = {
        f"{gate_key(task)}_{name}": _worst((row[name] for row in figures), least=gate.bound == "at least")
        for name, gate in TASK_GATES.items()
    }
    # Adapters without recorded answers are left out.
    recorded = [entry.recorded.p_value for entry in entries if entry.recorded is not None]
    return metrics | {f"{gate_key(task)}_recorded_p_value": _worst(recorded, least=True)}


def _task_figures(task: VerifiedTask) -> dict[str, float | None]:
    models = task.entry.models
    served, reference = models.get("served"), models.get("float")
    pairs = {(each.first, each.second): each for each in task.entry.comparisons}
    pair, beside_float = pairs.get(("reference", "served")), pairs.get(("float", "served"))
    return {
        "accuracy": None if served is None else served.accuracy,
        "accuracy_drop": None if served is None or reference is None else reference.accuracy - served.accuracy,
        "accuracy_drop_upper": None if beside_float is None else beside_float.test.drop_upper,
        "drop_upper": None if pair is None else pair.test.drop_upper,
        "p_value": None if pair is None else pair.test.p_value,
        "recorded_p_value": None if task.recorded is None else task.recorded.p_value,
        "agreement": None if pair is None else pair.agreement,
        "questions_missing": float(task.facts.missing),
        "questions_repeated": float(task.facts.repeated),
        # Where no record tells what an adapter was trained on, nothing can be said against a question.
        "questions_seen": float(task.facts.seen or 0),
    }
