"""The gate: limits on what was measured, from a file or by default, judged without rounding anything."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from cloq_export.errors import UsageError
from cloq_export.parity.tasks import PERPLEXITY, gate_key, task_names
from cloq_export.run.spelled_paths import expand_user

Bound = Literal["at most", "at least"]
_MAX_FILE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Gate:
    """One figure that a limit can be set on.

    Args:
        bound: whether the limit is the largest or the smallest value allowed.
        meaning: of the figure, for people.
    """

    bound: Bound
    meaning: str


GATES: Mapping[str, Gate] = {
    "certificate": Gate("at least", "1 if every file, layer and the base are those that the certificate names"),
    "noise_floor_max": Gate("at most", "largest log-probability difference of the float model measured twice"),
    "logprob_difference_max": Gate("at most", "largest log-probability difference, served against reference"),
    "logprob_difference_mean": Gate("at most", "mean log-probability difference, served against reference"),
    "packed_logprob_difference_max": Gate("at most", "largest difference, packed transformers runtime to reference"),
    "logprob_difference_over_float": Gate(
        "at most", "mean difference, served against reference, over the float model's own in the served precision"
    ),
    "perplexity_ratio": Gate("at most", "perplexity served over float"),
    "perplexity_ratio_upper": Gate("at most", "upper end of the interval of that ratio"),
    "greedy_agreement": Gate("at least", "share of prompts whose greedy text equals the reference's"),
    "greedy_flips": Gate("at most", "prompts whose greedy text parts from the reference's, near-ties left out"),
    "live_modules": Gate("at least", "share of the adapters' modules that are shown to reach the served logits"),
    "mixed_batch_difference_max": Gate("at most", "largest log-probability difference, mixed batch to single request"),
    "mixed_batch_difference_over_float": Gate(
        "at most", "mean difference, mixed batch to single, over the float model's own in the served precision"
    ),
}
# What is measured of each task; the gate's name is the task's `gate_key`, "_" and the figure's.
TASK_GATES: Mapping[str, Gate] = {
    "accuracy": Gate("at least", "share of the questions answered right as served"),
    "accuracy_drop": Gate("at most", "accuracy of the float model minus that as served"),
    "p_value": Gate("at least", "McNemar's exact test, served against reference"),
    "agreement": Gate("at least", "share of questions with equal answers, served and reference"),
}
_ALL_GATES: Mapping[str, Gate] = {
    **GATES,
    **{f"{gate_key(task)}_{figure}": gate for task in task_names() for figure, gate in TASK_GATES.items()},
}

# The reference rounds differently from an engine, and a poor base amplifies it.
_FLOAT32_LIMIT = 1e-3
_FLOAT32_LIMIT_2_BITS = 1e-2
_MIXED_LIMIT = 1e-4
# Twice what a 2-bit model with activations in int8 measures (docs/onnx.md).
_ROUNDED_MEAN_LIMIT = 0.25
# A kernel may err as much as the precision itself does, twice over: once for the base, once for the adapter.
_HALF_FACTOR = 2.0
_SIGNIFICANCE = 0.01


def float32_limit(bits: int) -> float:
    """Return the difference of log-probabilities that is allowed in float32, the smallest width being `bits`."""
    return _FLOAT32_LIMIT_2_BITS if bits == 2 else _FLOAT32_LIMIT


def default_limits(
    dtype: str, bits: int, tasks: tuple[str, ...], *, adapters: int, packed: bool, rounded: bool = False
) -> dict[str, float]:
    """Return the limits that hold unless a file says otherwise.

    Args:
        dtype: of the served activations: "float32", "bfloat16" or "float16".
        bits: the smallest width among the layers.
        tasks: what is measured beside numerics: "ppl", and tasks by name.
        adapters: how many are served.
        packed: whether the packed transformers runtime is measured beside another one.
        rounded: whether kernels round activations to int8: no limit on a single log-probability survives that, and the
            effect of a single module drowns in it.

    Returns:
        dict: name of a gate -> limit.
    """
    limit = float32_limit(bits)
    limits: dict[str, float] = {"certificate": 1.0}
    if rounded:
        limits |= {"logprob_difference_mean": _ROUNDED_MEAN_LIMIT}
        limits |= {"mixed_batch_difference_max": _MIXED_LIMIT} if adapters else {}
    elif dtype == "float32":
        limits |= {"logprob_difference_max": limit, "greedy_flips": 0.0}
        limits |= {"mixed_batch_difference_max": _MIXED_LIMIT} if adapters else {}
    else:
        limits |= {"logprob_difference_over_float": _HALF_FACTOR}
        limits |= {"mixed_batch_difference_over_float": _HALF_FACTOR} if adapters else {}
    if packed:
        limits["packed_logprob_difference_max"] = limit
    if adapters and not rounded:
        limits["live_modules"] = 1.0
    return limits | {f"{gate_key(task)}_p_value": _SIGNIFICANCE for task in tasks if task != PERPLEXITY}


def read_gate_file(path: str | Path) -> dict[str, float | None]:
    """Return what a gate file says: name of a gate -> limit, None where a default is to be dropped.

    Args:
        path: a YAML file with one mapping.

    Raises:
        UsageError: the file cannot be read, or names an unknown gate, or gives a limit that is no number.
    """
    path = expand_user(path)
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        if len(data) > _MAX_FILE_BYTES:
            raise UsageError(f"{path} is larger than {_MAX_FILE_BYTES >> 20} MiB; that is no gate file.")
        content = yaml.load(data.decode("utf-8"), Loader=_DistinctLoader)
    except OSError as error:
        raise UsageError(f"the gate file {path} cannot be read ({error.strerror}); check the path.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"the gate file {path} is not YAML ({reason}); it holds lines such as perplexity_ratio: 1.2."
        ) from None
    if not isinstance(content, dict) or not content:
        raise UsageError(f"the gate file {path} holds no mapping; it holds lines such as perplexity_ratio: 1.2.")
    return parse_limits(content, str(path))


def parse_limits(content: Mapping[Any, Any], source: str) -> dict[str, float | None]:
    """Return limits after checking names and values.

    Args:
        content: name of a gate -> limit; null drops a default.
        source: what they stand in, for messages.

    Raises:
        UsageError: an unknown gate, or a limit that is no number.
    """
    limits: dict[str, float | None] = {}
    for name, value in content.items():
        if name not in _ALL_GATES:
            near = difflib.get_close_matches(str(name), _ALL_GATES, n=3, cutoff=0.5)
            known = ", ".join([*GATES, *(f"TASK_{figure}" for figure in TASK_GATES)])
            hint = f"did you mean {' or '.join(near)}?" if near else f"known are {known}."
            raise UsageError(f"{source} sets a limit on {str(name)[:80]!r}, which is not measured; {hint}")
        if value is None:
            limits[name] = None
            continue
        if isinstance(value, bool):
            value = float(value) if name == "certificate" else None
        try:
            # YAML takes 1e-3 for a text: it wants 1.0e-3 for a number.
            limit = float(value)
        except (TypeError, ValueError, OverflowError):
            limit = math.nan
        if not math.isfinite(limit):
            raise UsageError(
                f"{source} sets {name} to {content[name]!r:.40}; a number is needed, or null to drop the default limit."
            )
        limits[name] = limit
    return limits


def merged_limits(defaults: Mapping[str, float], chosen: Mapping[str, float | None]) -> dict[str, float]:
    """Return the limits that hold: the defaults, with what was chosen in their place, in the order of the gates."""
    joined = {**defaults, **chosen}
    return {name: limit for name in _ALL_GATES if (limit := joined.get(name)) is not None}


def judge(limits: Mapping[str, float], metrics: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """Return the verdict on each gate; what was not measured, or is NaN, has missed.

    Args:
        limits: name of a gate -> limit.
        metrics: name of a figure -> value, None if it could not be measured.

    Returns:
        list of dict: "gate", "meaning", "bound", "limit", "value" (None if missing) and "passed".
    """
    verdicts = []
    for name, limit in limits.items():
        gate, value = _ALL_GATES[name], metrics.get(name)
        if value is not None and math.isnan(value):
            value = None
        passed = value is not None and (value <= limit if gate.bound == "at most" else value >= limit)
        verdicts.append(
            {
                "gate": name,
                "meaning": gate.meaning,
                "bound": gate.bound,
                "limit": limit,
                "value": value,
                "passed": passed,
            }
        )
    return verdicts


def explain_miss(verdict: Mapping[str, Any]) -> str:
    """Return one clause on a gate that was missed."""
    if verdict["value"] is None:
        return f"{verdict['gate']} was not measured ({verdict['bound']} {verdict['limit']} is asked for)"
    return f"{verdict['gate']} is {verdict['value']}, {verdict['bound']} {verdict['limit']} is allowed"


class _DistinctLoader(yaml.SafeLoader):
    """A loader that refuses a key that stands twice: of two limits it is not known which one is meant."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return a mapping, refusing a key that stands there twice."""
        names = [key.value for key, _ in node.value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"{str(twice)[:80]!r} stands there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)
