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
from cloq_export.files.spelled_paths import expand_user
from cloq_export.parity.plain import Result
from cloq_export.parity.power import SmallestLoss
from cloq_export.parity.scales import SCALE_LIMIT
from cloq_export.parity.tasks import PERPLEXITY, gate_key, task_names

Bound = Literal["at most", "at least"]
_MAX_FILE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Gate:
    """One figure that a limit can be set on.

    Args:
        bound: whether the limit is the largest or the smallest value allowed.
        meaning: of the figure, for people.
        span: least and largest value that the figure can sensibly have; a limit at its end or beyond misses nothing.
        of_export: whether it says something of the export, and not of the float model or the questions alone.
    """

    bound: Bound
    meaning: str
    span: tuple[float, float] = (0.0, 1.0)
    of_export: bool = True


@dataclasses.dataclass(frozen=True)
class Verdict(Result):
    """What a gate says.

    Args:
        gate: its name.
        meaning: of its figure.
        bound: "at most" or "at least".
        limit: that is allowed.
        value: that was measured; None if it is missing.
        passed: whether the limit is kept.
        reason: why the gate could not be missed, and has missed; None otherwise.
        finds: the smallest loss that it could have seen; None where that was not worked out.
    """

    gate: str
    meaning: str
    bound: Bound
    limit: float
    value: float | None
    passed: bool
    reason: str | None = None
    finds: SmallestLoss | None = None


# Nats: a probability that is off by this factor of hundreds of millions is no probability any more.
_NATS = (0.0, 20.0)
_RATIO = (0.0, 1000.0)
JUDGED = "judged"


def _divergence_gates(model: str, of: str) -> dict[str, Gate]:
    return {
        f"kl_to_{model}_mean": Gate("at most", f"mean KL divergence per token of what is served from {of}", _NATS),
        f"kl_to_{model}_99": Gate("at most", f"KL divergence from {of} that 99 % of the tokens do not exceed", _NATS),
        f"kl_to_{model}_max": Gate("at most", f"largest KL divergence of a token from {of}", _NATS),
        f"top1_agreement_{model}": Gate("at least", f"share of tokens whose most probable successor is that of {of}"),
    }


GATES: Mapping[str, Gate] = {
    JUDGED: Gate("at least", "1 if something was judged of the export", of_export=False),
    "certificate": Gate(
        "at least", "1 if every file, layer and the base are those that the certificate names, or those of the run"
    ),
    "provenance": Gate("at least", "1 if codes and adapters are those that the run and the training recorded"),
    "reference": Gate("at least", "1 if the float model is the one that the run was made from", of_export=False),
    "float_part": Gate("at least", "1 if everything that is not quantized equals the float model"),
    "last_step_difference_mean": Gate(
        "at most",
        "mean log-probability difference, served against what was recorded when the model was made",
        _NATS,
    ),
    "noise_floor_max": Gate(
        "at most", "largest log-probability difference of the float model measured twice", _NATS, of_export=False
    ),
    "logprob_difference_max": Gate("at most", "largest log-probability difference, served against reference", _NATS),
    "logprob_difference_mean": Gate("at most", "mean log-probability difference, served against reference", _NATS),
    "packed_logprob_difference_max": Gate(
        "at most", "largest difference, packed transformers runtime to reference", _NATS
    ),
    "logprob_difference_over_float": Gate(
        "at most",
        "mean difference, served against reference, over the float model's own in the served precision",
        _RATIO,
    ),
    "longest_difference_max": Gate(
        "at most", "largest log-probability difference, served against reference, at the longest length", _NATS
    ),
    "longest_difference_mean": Gate("at most", "mean of these differences at the longest length", _NATS),
    "longest_difference_over_float": Gate(
        "at most", "mean of these differences over the float model's own in the served precision", _RATIO
    ),
    "token_mult_prob_error": Gate(
        "at most",
        "mean of exp(absolute log-probability difference), served against reference; 1 is perfect",
        (1.0, _RATIO[1]),
    ),
    **_divergence_gates("float", "the float model"),
    **_divergence_gates("reference", "the reference"),
    "scale_error_max": Gate(
        "at most", "largest relative error of the scale of one quantized module that is surely not zero"
    ),
    "perplexity_ratio": Gate("at most", "perplexity served over float", _RATIO),
    "perplexity_ratio_upper": Gate("at most", "upper end of the interval of that ratio", _RATIO),
    "perplexity_over_recorded": Gate(
        "at most",
        "lower end of the interval of that ratio, over the ratio that the run recorded when it was made",
        _RATIO,
    ),
    "greedy_agreement": Gate("at least", "share of prompts whose greedy text equals the reference's"),
    "greedy_flips": Gate(
        "at most", "prompts whose greedy text parts from the reference's, near-ties left out", (0.0, math.inf)
    ),
    "decode_gap_max": Gate(
        "at most", "largest log-probability that the reference's best token has over the token that was served", _NATS
    ),
    "decode_gap_mean": Gate("at most", "mean of these gaps over the tokens that were served", _NATS),
    "decode_gap_over_float": Gate(
        "at most", "mean of these gaps over the float model's mean difference in the served precision", _RATIO
    ),
    "live_modules": Gate("at least", "share of the adapters' modules that are shown to reach the served logits"),
    "mixed_batch_difference_max": Gate(
        "at most", "largest log-probability difference, mixed batch to single request", _NATS
    ),
    "mixed_batch_difference_over_float": Gate(
        "at most", "mean difference, mixed batch to single, over the float model's own in the served precision", _RATIO
    ),
    "mixed_decode_gap_max": Gate(
        "at most", "largest gap, as decode_gap_max, of texts that base and adapters wrote in one batch", _NATS
    ),
    "mixed_decode_gap_mean": Gate("at most", "mean of these gaps in mixed batches", _NATS),
    "mixed_decode_gap_over_float": Gate(
        "at most",
        "mean of these gaps in mixed batches over the float model's mean difference in the served precision",
        _RATIO,
    ),
}
# What is measured of each task; the gate's name is the task's `gate_key`, "_" and the figure's.
TASK_GATES: Mapping[str, Gate] = {
    "accuracy": Gate("at least", "share of the questions answered right as served"),
    "accuracy_drop": Gate("at most", "accuracy of the float model minus that as served", (-1.0, 1.0)),
    "accuracy_drop_upper": Gate("at most", "upper 95 % confidence limit of that drop, paired by question", (-1.0, 1.0)),
    "drop_upper": Gate("at most", "the same limit for the reference's accuracy minus that as served", (-1.0, 1.0)),
    "p_value": Gate("at least", "McNemar's exact test, served against reference"),
    "recorded_p_value": Gate(
        "at least", "McNemar's exact test, one-sided: answers lost since the run recorded what it answers"
    ),
    "agreement": Gate("at least", "share of questions with equal answers, served and reference"),
    "questions_missing": Gate(
        "at most", "questions that were typed for and are not there", (0.0, math.inf), of_export=False
    ),
    "questions_repeated": Gate("at most", "questions that stand there once more", (0.0, math.inf), of_export=False),
    "questions_seen": Gate(
        "at most",
        "questions that the adapter's training data holds, as far as its record is known",
        (0.0, math.inf),
        of_export=False,
    ),
}
_ALL_GATES: Mapping[str, Gate] = {
    **GATES,
    **{f"{gate_key(task)}_{figure}": gate for task in task_names() for figure, gate in TASK_GATES.items()},
}

# The reference rounds differently from an engine, and a poor base amplifies it.
_FLOAT32_LIMIT = 1e-3
_FLOAT32_LIMIT_2_BITS = 1e-2
MIXED_LIMIT = 1e-4
# Twice what a 2-bit model with activations in int8 measures (docs/onnx.md).
_ROUNDED_MEAN_LIMIT = 0.25
# In the mean over prompts, as the mean above: rounded activations turn near-ties around.
_ROUNDED_GAP_LIMIT = _ROUNDED_MEAN_LIMIT
# A kernel may err as much as the precision itself does, twice over: once for the base, once for the adapter.
_HALF_FACTOR = 2.0
SIGNIFICANCE = 0.01
# Activations in half precision, then or now, move a log-probability by a few hundredths in the mean.
HALF_PROBE_LIMIT = 0.1


def float32_limit(bits: int) -> float:
    """Return the difference of log-probabilities that is allowed in float32, the smallest width being `bits`."""
    return _FLOAT32_LIMIT_2_BITS if bits == 2 else _FLOAT32_LIMIT


def tie_gap(bits: int) -> float:
    """Return the gap of log-probabilities that counts as a tie in float32: both tokens may be off by the limit."""
    return 2 * float32_limit(bits)


def default_limits(
    dtype: str, bits: int, tasks: tuple[str, ...], *, adapters: int, packed: bool, rounded: bool = False
) -> dict[str, float]:
    """Return the limits that hold unless a file says otherwise.

    Args:
        dtype: of the served activations: "float32", "bfloat16" or "float16".
        bits: the smallest width among the layers.
        tasks: what is measured besides numerics: "ppl", and tasks by name.
        adapters: how many are served.
        packed: whether the packed transformers runtime is measured in addition to another one.
        rounded: whether kernels round activations to int8: no limit on a single log-probability survives that, and the
            effect of a single module drowns in it.

    Returns:
        dict: name of a gate -> limit.
    """
    limit = float32_limit(bits)
    limits: dict[str, float] = {JUDGED: 1.0, "certificate": 1.0}
    mixed = {"mixed_batch_difference_max": MIXED_LIMIT} if adapters else {}
    if rounded:
        limits |= {"logprob_difference_mean": _ROUNDED_MEAN_LIMIT, "longest_difference_mean": _ROUNDED_MEAN_LIMIT}
        limits |= {"decode_gap_mean": _ROUNDED_GAP_LIMIT, **mixed}
        limits |= {"mixed_decode_gap_mean": _ROUNDED_GAP_LIMIT} if adapters else {}
    elif dtype == "float32":
        limits |= {"logprob_difference_max": limit, "longest_difference_max": limit, "greedy_flips": 0.0}
        limits |= {"decode_gap_max": tie_gap(bits), **mixed}
        limits |= {"mixed_decode_gap_max": tie_gap(bits)} if adapters else {}
    else:
        names = ("logprob_difference_over_float", "longest_difference_over_float", "decode_gap_over_float")
        limits |= dict.fromkeys(names, _HALF_FACTOR)
        together = ("mixed_batch_difference_over_float", "mixed_decode_gap_over_float")
        limits |= dict.fromkeys(together, _HALF_FACTOR) if adapters else {}
    if packed:
        limits["packed_logprob_difference_max"] = limit
    if adapters and not rounded:
        limits["live_modules"] = 1.0
    if not rounded:
        limits["scale_error_max"] = SCALE_LIMIT
    of_questions = {"p_value": SIGNIFICANCE, "questions_missing": 0.0, "questions_repeated": 0.0, "questions_seen": 0.0}
    for task in tasks:
        if task != PERPLEXITY:
            limits |= {f"{gate_key(task)}_{name}": value for name, value in of_questions.items()}
    return limits


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
            settable = [name for name in GATES if name != JUDGED]
            known = ", ".join([*settable, *(f"TASK_{figure}" for figure in TASK_GATES)])
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
    """Return the limits that hold: the defaults, with what was chosen in their place, in the order of the gates.

    The gate that something is judged at all always holds.
    """
    joined = {**defaults, **chosen, **{name: 1.0 for name in (JUDGED,) if name in defaults}}
    return {name: limit for name in _ALL_GATES if (limit := joined.get(name)) is not None}


def binding_limits(limits: Mapping[str, float], largest: Mapping[str, float] | None = None) -> list[str]:
    """Return the gates that can be missed and that say something of the export.

    Args:
        limits: name of a gate -> limit.
        largest: the largest value that a count can have in this measurement, such as the number of prompts.
    """
    binding = []
    for name, limit in limits.items():
        gate = _ALL_GATES[name]
        low, high = gate.span[0], min(gate.span[1], (largest or {}).get(name, math.inf))
        if gate.of_export and (limit < high if gate.bound == "at most" else limit > low):
            binding.append(name)
    return binding


def judge(
    limits: Mapping[str, float],
    metrics: Mapping[str, float | None],
    blind: Mapping[str, str] | None = None,
) -> list[Verdict]:
    """Return the verdict on each gate; what was not measured, or is NaN, has missed.

    Args:
        limits: name of a gate -> limit.
        metrics: name of a figure -> value, None if it could not be measured.
        blind: name of a gate that nothing measured here could have missed -> why; it has missed.

    """
    verdicts = []
    for name, limit in limits.items():
        gate, value = _ALL_GATES[name], metrics.get(name)
        if value is not None and math.isnan(value):
            value = None
        passed = value is not None and (value <= limit if gate.bound == "at most" else value >= limit)
        reason = (blind or {}).get(name)
        verdicts.append(Verdict(name, gate.meaning, gate.bound, limit, value, passed and reason is None, reason))
    return verdicts


def explain_miss(verdict: Verdict) -> str:
    """Return one clause on a gate that was missed."""
    gate, bound, limit, value, reason = verdict.gate, verdict.bound, verdict.limit, verdict.value, verdict.reason
    if gate == JUDGED:
        return f"nothing was judged: {reason}" if reason else "nothing was judged"
    if reason is not None and value is not None:
        return f"{gate} says nothing: {reason}"
    if value is None:
        return f"{gate} was not measured ({bound} {limit} is asked for)"
    return f"{gate} is {value}, {bound} {limit} is allowed"


class _DistinctLoader(yaml.SafeLoader):
    """A loader that refuses a key that stands twice: of two limits it is not known which one is meant."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return a mapping, refusing a key that occurs twice."""
        names = [key.value for key, _ in node.value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{str(twice)[:80]!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)
