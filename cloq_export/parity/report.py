"""The parity report: figures for the gate out of what was measured, parity.json, and one page that stands alone."""

from __future__ import annotations

import importlib.resources
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from cloq_export.files.atomic import make_folder, translate_os_errors, write_bytes, write_json
from cloq_export.files.safe_json import parse_json
from cloq_export.parity.gate import TASK_GATES
from cloq_export.parity.liveness import ZERO
from cloq_export.parity.plots import histogram_plot, line_plot, matrix_plot, scatter_plot
from cloq_export.parity.provenance import NOT_RECORDED, PROVEN
from cloq_export.parity.tasks import gate_key

JSON_NAME = "parity.json"
HTML_NAME = "parity.html"
REPORT_FORMAT = "cloq-parity"
FORMAT_VERSION = 1

_SCHEMA_FILE = "parity.schema.json"
_TEMPLATE_FILE = "report.html.jinja"
_INDEX = re.compile(r"\.(\d+)\.")
_BASE = "base"
# What a finding on the float model is called, rather than one on the export.
_REFERENCE = ("reference", "tokenizer of the reference")
# More lines than this cannot be told apart; the tables hold them all.
_MOST_SERIES = 12


def schema() -> dict[str, Any]:
    """Return the JSON schema of parity.json."""
    data = importlib.resources.files("cloq_export.parity").joinpath(_SCHEMA_FILE).read_bytes()
    return parse_json(data, _SCHEMA_FILE)


def collect_metrics(report: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the figures that a gate can be set on; None for what could not be measured.

    Where there are several adapters, the worst one counts, and one that is missing makes the figure missing.

    Args:
        report: the report as it is measured so far.
    """
    adapters = [each["name"] for each in report["adapters"]]
    subjects, scored = adapters or [None], [*adapters, None]
    numerics = report["numerics"]
    served = _of(numerics, scored, measured="served", against="reference")
    packed = _of(numerics, subjects, measured="packed", against="reference") or (
        served if report["runtime"] == "hf" and report["dtype"] == "float32" else []
    )
    longest = _of(numerics, scored, measured="served at length", against="reference")
    own, own_longest = (
        next((row["mean"] for row in numerics if row["measured"] == f"float in served precision{at}"), None)
        for at in ("", ", at length")
    )
    perplexities = _of(report["quality"]["perplexity"], subjects, model="served")
    greedy = _of(report["greedy"], subjects)
    liveness, isolation, scales = report["liveness"], report["isolation"], report["scales"]
    written = [row for row in report["decoding"] if row["kind"] != "mixed"]
    mixed = [row for row in report["decoding"] if row["kind"] == "mixed"]
    certificate, found = report["certificate"], report["provenance"]["findings"]
    metrics: dict[str, float | None] = {
        "certificate": None if certificate is None else float(certificate["passed"]),
        "provenance": _verdict(each for each in found if not each["what"].startswith(_REFERENCE)),
        "reference": _verdict(each for each in found if each["what"].startswith(_REFERENCE)),
        "float_part": _verdict(report["float_part"]),
        "last_step_difference_mean": _worst(row["mean"] for row in report["provenance"]["probes"]),
        "noise_floor_max": (report["noise_floor"] or {}).get("max"),
        "logprob_difference_max": _worst(row["max"] for row in served),
        "logprob_difference_mean": _worst(row["mean"] for row in served),
        "packed_logprob_difference_max": _worst(row["max"] for row in packed),
        "logprob_difference_over_float": _over(_worst(row["mean"] for row in served), own),
        "longest_difference_max": _worst(row["max"] for row in longest),
        "longest_difference_mean": _worst(row["mean"] for row in longest),
        "longest_difference_over_float": _over(_worst(row["mean"] for row in longest), own_longest),
        "scale_error_max": None if scales is None else scales["largest"],
        "perplexity_ratio": _worst(row.get("ratio_to_float") for row in perplexities),
        "perplexity_over_recorded": _over_recorded(perplexities, report["provenance"]["recorded_ratios"]),
        "perplexity_ratio_upper": _worst(row.get("ratio_upper") for row in perplexities),
        "greedy_agreement": _share(greedy, "agreement", "prompts"),
        "greedy_flips": float(sum(row["flips"] for row in greedy)) if greedy else None,
        "decode_gap_max": _worst(row["gap_max"] for row in written),
        "decode_gap_mean": _worst(row["gap_mean"] for row in written),
        "decode_gap_over_float": _over(_worst(row["gap_mean"] for row in written), own),
        "live_modules": _worst((row["live_share"] for row in liveness), least=True),
        "mixed_batch_difference_max": isolation["max"] if isolation else None,
        "mixed_batch_difference_over_float": _over(
            _worst(row["mean"] for row in isolation["by_adapter"]) if isolation else None, own
        ),
        "mixed_decode_gap_max": _worst(row["gap_max"] for row in mixed),
        "mixed_decode_gap_mean": _worst(row["gap_mean"] for row in mixed),
        "mixed_decode_gap_over_float": _over(_worst(row["gap_mean"] for row in mixed), own),
    }
    for task, entries in report["quality"]["tasks"].items():
        metrics |= _task_metrics(task, entries)
    return metrics


def write_report(folder: Path, report: Mapping[str, Any]) -> dict[str, str]:
    """Write parity.json and parity.html into a folder.

    Args:
        folder: it is made if need be; other files in it stay.
        report: the report, complete.

    Returns:
        dict: "json" and "html", the paths.

    Raises:
        RunDirectoryError: the folder cannot be written.
    """
    paths = {"json": folder / JSON_NAME, "html": folder / HTML_NAME}
    page = render_html(report)
    make_folder(folder)
    with translate_os_errors(folder):
        # A kill between the two must not leave a new file beside an old one.
        for path in paths.values():
            path.unlink(missing_ok=True)
    write_json(paths["json"], report, sort_keys=False)
    write_bytes(paths["html"], page.encode("utf-8", "replace"))
    return {name: str(path) for name, path in paths.items()}


def render_html(report: Mapping[str, Any]) -> str:
    """Return the report as one page: no script, no font, no image and no address is fetched.

    Args:
        report: the report, complete.
    """
    text = importlib.resources.files("cloq_export.parity").joinpath(_TEMPLATE_FILE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"figure": figure, "share": share}
    return environment.from_string(text).render(
        report=report,
        verdict="passed" if report["passed"] else "missed",
        differences=_difference_plot(report),
        positions=_position_plot(report),
        layers=_layer_plot(report),
        matrices=[(row["adapter"], _liveness_plot(row)) for row in report["liveness"]],
    )


def figure(value: Any) -> str:
    """Return a figure with as many digits as one can read; the report itself is not rounded."""
    if value is None:
        return "not measured"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or float(value).is_integer():
        return f"{value:.0f}" if abs(value) < 1e6 else f"{value:.3g}"
    return f"{value:.4f}" if 1e-2 <= abs(value) < 1e4 else f"{value:.2e}"


def share(value: float | None) -> str:
    """Return a share in per cent, for people."""
    return "not measured" if value is None else f"{value:.1%}"


def label_of(row: Mapping[str, Any]) -> str:
    """Return what a row is of, with its adapter."""
    name = row.get("measured") or row.get("model") or ""
    return f"{name}, {row['adapter']}" if row.get("adapter") else str(name)


def _of(rows: Iterable[Mapping[str, Any]], subjects: Sequence[str | None], **wanted: str) -> list[Mapping[str, Any]]:
    """Return the rows of a kind, none if one of the subjects has no row: its figure is then missing as a whole."""
    found = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    return found if {row["adapter"] for row in found} >= set(subjects) else []


def _verdict(findings: Iterable[Mapping[str, Any]]) -> float | None:
    """Return 1 if all that was recorded is proven, 0 if something is not, None if nothing was compared."""
    verdicts = [each["verdict"] for each in findings if each["verdict"] != NOT_RECORDED]
    return float(all(verdict == PROVEN for verdict in verdicts)) if verdicts else None


def _over_recorded(rows: Sequence[Mapping[str, Any]], recorded: Sequence[Mapping[str, Any]]) -> float | None:
    lower = {row["adapter"]: row.get("ratio_lower") for row in rows}
    return _worst(_over(lower.get(entry["adapter"]), entry["ratio"]) for entry in recorded)


def _worst(values: Iterable[float | None], *, least: bool = False) -> float | None:
    known = list(values)
    if not known or None in known:
        return None
    numbers = [value for value in known if value is not None]
    return min(numbers) if least else max(numbers)


def _over(value: float | None, own: float | None) -> float | None:
    return None if value is None or not own else value / own


def _share(rows: Sequence[Mapping[str, Any]], key: str, weight: str) -> float | None:
    total = sum(row[weight] for row in rows)
    if not total or any(row[key] is None for row in rows):
        return None
    return sum(row[key] * row[weight] for row in rows) / total


def _task_metrics(task: str, entries: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    figures = [_task_figures(entry) for entry in entries]
    return {
        f"{gate_key(task)}_{name}": _worst((row[name] for row in figures), least=gate.bound == "at least")
        for name, gate in TASK_GATES.items()
    }


def _task_figures(entry: Mapping[str, Any]) -> dict[str, float | None]:
    models, pairs = entry["models"], entry["comparisons"]
    served, reference = models.get("served"), models.get("float")
    pair = next((pair for pair in pairs if (pair["first"], pair["second"]) == ("reference", "served")), None)
    return {
        "accuracy": None if served is None else served["accuracy"],
        "accuracy_drop": None if served is None or reference is None else reference["accuracy"] - served["accuracy"],
        "p_value": None if pair is None else pair["p_value"],
        "agreement": None if pair is None else pair["agreement"],
        "questions_missing": float(entry["missing"]),
        "questions_repeated": float(entry["repeated"]),
        # Where no record tells what an adapter was trained on, nothing can be said against a question.
        "questions_seen": float(entry["seen"] or 0),
    }


def _difference_plot(report: Mapping[str, Any]) -> Markup:
    rows = [row for row in report["numerics"] if row.get("histogram") and row["against"] != "float"]
    rows += [row for row in report["numerics"] if row.get("histogram") and row["against"] == "float"]
    series = [
        (f"{label_of(row)} against {row['against']}", row["histogram"]["edges"], row["histogram"]["counts"])
        for row in rows[:_MOST_SERIES]
    ]
    return histogram_plot(series, x_label="|difference of log-probabilities|", y_label="share of tokens")


def _position_plot(report: Mapping[str, Any]) -> Markup:
    series = [
        (label_of(row), row["by_position"]["position"], row["by_position"]["perplexity"])
        for row in report["quality"]["perplexity"][:_MOST_SERIES]
    ]
    return line_plot(series, x_label="position in the window", y_label="perplexity", log_y=True)


def _layer_plot(report: Mapping[str, Any]) -> Markup:
    layers = report["layers"] or []
    numbers, no_bars = list(range(len(layers))), [None] * len(layers)
    series = [
        (label, numbers, [math.nan if layer[key] is None else layer[key] for layer in layers], no_bars)
        for label, key in (("Q alone", "error_quantized"), ("Q + BA", "error_adapted"), ("lower bound", "error_bound"))
    ]
    return scatter_plot(series, x_label="layer", y_label="relative error", log_y=True)


def _liveness_plot(row: Mapping[str, Any]) -> Markup:
    """Return blocks downwards, kinds of modules across."""
    cells: dict[tuple[str, str], Mapping[str, Any]] = {}
    for entry in row["modules"]:
        index = _INDEX.search(f".{entry['module']}.")
        if index is None:
            cells[_BASE, entry["module"]] = entry
        else:
            cells[index[1], f".{entry['module']}"[index.end() :]] = entry

    def cell(block: str, kind: str) -> tuple[str, str] | None:
        entry = cells.get((block, kind))
        if entry is None:
            return None
        known = (
            "" if entry["presence"] is None else f", presence {figure(entry['presence'])} ± {figure(entry['error'])}"
        )
        gain = f", product times {entry['gain']:g}" if entry["gain"] != 1 else ""
        word = "product is zero" if entry["verdict"] == ZERO else entry["verdict"]
        return entry["verdict"], f"{entry['module']}: {word}{known}{gain}"

    blocks = sorted({block for block, _ in cells}, key=lambda block: int(block) if block.isdigit() else -1)
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    return matrix_plot(blocks, kinds, cell)
