"""The parity report as one page that stands alone, and figures as people read them."""

from __future__ import annotations

import importlib.resources
import math
import re
from collections.abc import Mapping
from typing import Any

import jinja2
from markupsafe import Markup

from cloq_export.parity.liveness import ZERO
from cloq_export.parity.plots import histogram_plot, line_plot, matrix_plot, scatter_plot

_TEMPLATE_FILE = "report.html.jinja"
_INDEX = re.compile(r"\.(\d+)\.")
_BASE = "base"
# More lines than this cannot be told apart; the tables hold them all.
_MOST_SERIES = 12


def render_html(report: Mapping[str, Any]) -> str:
    """Return the report as one page: no script, no font, no image and no address is fetched.

    Args:
        report: content of parity.json.
    """
    text = importlib.resources.files("cloq_export.parity").joinpath(_TEMPLATE_FILE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"figure": figure, "share": share}
    environment.filters["found"] = smallest_loss
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


def smallest_loss(finds: Mapping[str, Any]) -> str:
    """Return the smallest loss that a gate could have seen, as a sentence without a stop."""
    if finds["loss"] is None:
        return "It could have seen no loss"
    alarm = "" if finds["alpha"] is None else f"; it is missed by chance with a probability of {finds['alpha']:.1%}"
    return f"It sees a loss of {finds['loss']:.2%} with a probability of {1 - finds['beta']:.0%}{alarm}"


def row_label(row: Mapping[str, Any]) -> str:
    """Return what a row is of, with its adapter."""
    name = row.get("measured") or row.get("model") or ""
    return f"{name}, {row['adapter']}" if row.get("adapter") else str(name)


def _difference_plot(report: Mapping[str, Any]) -> Markup:
    rows = [row for row in report["numerics"] if row.get("histogram") and row["against"] != "float"]
    rows += [row for row in report["numerics"] if row.get("histogram") and row["against"] == "float"]
    series = [
        (f"{row_label(row)} against {row['against']}", row["histogram"]["edges"], row["histogram"]["counts"])
        for row in rows[:_MOST_SERIES]
    ]
    return histogram_plot(series, x_label="|difference of log-probabilities|", y_label="share of tokens")


def _position_plot(report: Mapping[str, Any]) -> Markup:
    series = [
        (row_label(row), row["by_position"]["position"], row["by_position"]["perplexity"])
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
