"""Gates: upper limits on measured figures, which turn a miss into exit code 3."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from cloq_export.errors import GateMissedError, UsageError

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_MODELS = ("float", "quantized", "adapter")
METRICS = (*(f"{model}_perplexity" for model in _MODELS), "ratio", "kl")


@dataclasses.dataclass(frozen=True)
class GateVerdict:
    """A gate and what was measured: `limit` is the largest value allowed, `value` is None if there is none."""

    metric: str
    limit: float
    value: float | None

    @property
    def passed(self) -> bool:
        """Return whether the value keeps the limit."""
        return self.value is not None and self.value <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` prints of it."""
        return {**dataclasses.asdict(self), "passed": self.passed}


def gate_option() -> Callable[[Decorated], Decorated]:
    """Return the option `--gate KEY=VALUE`."""
    return click.option(
        "--gate",
        "gate_texts",
        multiple=True,
        metavar="KEY=VALUE",
        help=f"Largest value allowed, else exit code 3; can be repeated. Keys: {', '.join(METRICS)} "
        "(served over float perplexity; mean KL divergence per token from the float model).",
    )


def parse_gates(texts: Sequence[str]) -> dict[str, float]:
    """Return metric -> limit.

    Raises:
        UsageError: a gate has another form, an unknown metric, or a limit that is not a positive number.
    """
    gates: dict[str, float] = {}
    for text in texts:
        metric, _, limit_text = text.partition("=")
        metric = metric.strip().replace("-", "_")
        if metric in _MODELS:
            metric = f"{metric}_perplexity"
        if metric not in METRICS:
            raise UsageError(f"--gate {text}: {metric!r} is not measured; allowed are {', '.join(METRICS)}.")
        try:
            limit = float(limit_text)
        except ValueError:
            limit = math.nan
        if not (math.isfinite(limit) and limit > 0):
            raise UsageError(f"--gate {text}: the limit must be a positive number, for example --gate {metric}=40.")
        gates[metric] = min(limit, gates.get(metric, math.inf))
    return gates


def measured_value(metric: str, perplexities: Mapping[str, Any]) -> float | None:
    """Return the value of a metric in a `{"float": {"perplexity": ...}, ...}` mapping, or None if it is missing.

    `ratio` is the perplexity of what is served, with the adapter where there is one, over that of the float model, and
    `kl` its mean KL divergence per token from that model.
    """
    if metric == "kl":
        served_entry = perplexities.get("adapter") or perplexities.get("quantized") or {}
        divergence = (served_entry.get("to_float") or {}).get("kl_mean")
        return None if divergence is None else float(divergence)

    def perplexity_of(model: str) -> float | None:
        entry = perplexities.get(model)
        value = entry.get("perplexity") if isinstance(entry, Mapping) else None
        return float(value) if isinstance(value, (int, float)) else None

    if metric != "ratio":
        return perplexity_of(metric.removesuffix("_perplexity"))
    served = perplexity_of("adapter")
    if served is None:
        served = perplexity_of("quantized")
    reference = perplexity_of("float")
    return None if served is None or not reference else served / reference


def judge_gates(gates: Mapping[str, float], perplexities: Mapping[str, Any]) -> list[GateVerdict]:
    """Return the verdict of each gate; a missing value and NaN miss it, and nothing is rounded."""
    return [GateVerdict(metric, limit, measured_value(metric, perplexities)) for metric, limit in gates.items()]


def raise_if_missed(verdicts: Sequence[GateVerdict]) -> None:
    """Raise if a gate was missed.

    Raises:
        GateMissedError: names every missed gate with its value and its limit.
    """
    missed = [
        f"{verdict.metric} was not measured (limit {verdict.limit})"
        if verdict.value is None
        else f"{verdict.metric} is {verdict.value}, at most {verdict.limit} is allowed"
        for verdict in verdicts
        if not verdict.passed
    ]
    if missed:
        raise GateMissedError(f"gate missed: {'; '.join(missed)}. The results stand; change the recipe or the gate.")
