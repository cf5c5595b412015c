"""The tables of `init_quality.py`, for a terminal and for Markdown."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Mapping
from typing import Any

from environment import hardware_line

from cloq_export.recipe import Recipe

MODELS = ("float", "quantized", "adapter")


@dataclasses.dataclass(frozen=True)
class Cell:
    """Perplexity of one setting, width, text and model over the seeds."""

    mean: float
    least: float
    most: float
    seeds: int

    def __str__(self) -> str:
        """Return the mean, and the range over seeds if there are several."""
        if self.seeds == 1:
            return figure(self.mean)
        return f"{figure(self.mean)} ({figure(self.least)} to {figure(self.most)})"


def figure(value: float) -> str:
    """Return a perplexity with as many digits as one can read."""
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def cells_of(content: Mapping[str, Any]) -> dict[tuple[int | None, str, str, str], Cell]:
    """Return (bits, setting, text, model) -> cell."""
    values: dict[tuple[int | None, str, str, str], list[float]] = {}
    for row in content["rows"]:
        # JSON has no infinity: a perplexity beyond all bounds comes back as null.
        value = float("inf") if row["perplexity"] is None else row["perplexity"]
        values.setdefault((row["bits"], row["setting"], row["text"], row["model"]), []).append(value)
    return {key: Cell(statistics.fmean(found), min(found), max(found), len(found)) for key, found in values.items()}


def table_of(content: Mapping[str, Any], bits: int) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of one width; settings come by their first text's perplexity with adapter."""
    cells, texts = cells_of(content), list(content["conditions"]["texts"])
    settings = list(dict.fromkeys(row["setting"] for row in content["rows"] if row["bits"] == bits))

    def judged(setting: str) -> float:
        cell = cells.get((bits, setting, texts[0], "adapter")) or cells.get((bits, setting, texts[0], "quantized"))
        return cell.mean if cell else float("inf")

    headings = ["setting", *(f"{text}, {model}" for text in texts for model in ("Q", "Q + adapter")), "bits per weight"]
    float_cells = [cells.get((None, "float", text, "float")) for text in texts]
    rows = [["float", *(str(cell) if cell else "" for cell in float_cells for _ in range(2)), ""]]
    for setting in sorted(settings, key=judged):
        found = [cells.get((bits, setting, text, model)) for text in texts for model in MODELS[1:]]
        rows.append([setting, *(str(cell) if cell else "" for cell in found), size_of(content, setting, bits)])
    return headings, rows


def size_of(content: Mapping[str, Any], setting: str, bits: int) -> str:
    """Return bits per weight of what is served: with the adapter where there is one."""
    sizes = {
        row["model"]: row.get("bits_per_weight")
        for row in content["rows"]
        if row["setting"] == setting and row["bits"] == bits
    }
    value = sizes.get("adapter", sizes.get("quantized"))
    return "" if value is None else f"{value:.2f}"


def widths_of(content: Mapping[str, Any]) -> list[int]:
    """Return the widths that were measured, ascending."""
    return sorted({row["bits"] for row in content["rows"] if row["bits"] is not None})


def show(content: Mapping[str, Any]) -> None:
    """Print one table per width."""
    from rich.console import Console
    from rich.table import Table

    # A table in a file or a pipe need not be squeezed into 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(hardware_line(content["hardware"]), highlight=False)
    for bits in widths_of(content):
        headings, rows = table_of(content, bits)
        table = Table(title=f"perplexity at INT{bits}")
        for heading in headings:
            table.add_column(heading.replace(", ", "\n"), justify="left" if heading == "setting" else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def markdown(content: Mapping[str, Any]) -> str:
    """Return the tables of a result file as markdown."""
    conditions = content["conditions"]
    versions = content["versions"]
    drawn = f"{conditions['samples']} windows of {conditions['seqlen']} tokens of {conditions['calibration']}"
    lines = [
        f"{hardware_line(content['hardware'])}; torch {versions['torch']}, transformers {versions['transformers']}. "
        f"Model: {conditions['model']}. Calibration: {drawn}.",
        "",
        "| text | tokens left out at the start | windows | tokens in a window | float perplexity | standard error |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, about in conditions["texts"].items():
        found = [row for row in content["rows"] if row["model"] == "float" and row["text"] == name]
        figures = [figure(found[0]["perplexity"]), figure(found[0]["standard_error"] or 0.0)] if found else ["", ""]
        shown = [name, str(about["skipped_tokens"]), str(about["windows"]), str(about["window"]), *figures]
        lines.append(f"| {' | '.join(shown)} |")
    for bits in widths_of(content):
        headings, rows = table_of(content, bits)
        lines += ["", f"### INT{bits}", "", f"| {' | '.join(headings)} |", "|---|" + "--:|" * (len(headings) - 1)]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", "### What the settings are", "", "| setting | options |", "|---|---|"]
    names = {row["setting"] for row in content["rows"]}
    measured = {name: fields for name, fields in content["settings"].items() if name in names}
    # Only the options in which the settings of this file differ.
    telling = [key for key in Recipe().to_mapping() if len({json.dumps(f.get(key)) for f in measured.values()}) > 1]
    for name, fields in measured.items():
        options = ", ".join(f"`{key}: {json.dumps(fields.get(key))}`" for key in telling)
        lines.append(f"| {name} | {options or 'as all others'} |")
    return "\n".join(lines)
