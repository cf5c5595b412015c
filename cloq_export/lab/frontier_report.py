"""Put the rows of a frontier side by side: JSON, a table in Markdown, and plots."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cloq_export.files.safe_json import read_json
from cloq_export.lab.frontier_recipe import FLOAT, Frontier
from cloq_export.lab.row_folder import environment_mark, row_path, seconds_cell, table_foot, write_table
from cloq_export.parity.plots import Points, scatter_plot, standalone

FORMAT, FORMAT_VERSION = "cloq-frontier", 1
MEAN = "mean"
# Perplexities up to so many times the float model's are plotted.
_PLOTTED = 20
# The x axes of the plots: field of a row, suffix of the picture's name, label of the axis.
_OVER = (("stored_bits_per_weight", "bits", "stored bits a weight"), ("seconds", "seconds", "seconds"))


def write_frontier(frontier: Frontier, out: Path) -> dict[str, Any]:
    """Write frontier.json, frontier.md and the plots from the rows that are there.

    Args:
        frontier: what is measured.
        out: its folder.

    Returns:
        dict: what frontier.json holds, with "files" beside it.
    """
    cases = frontier.cases()
    rows = [read_json(path) for case in cases if (path := row_path(out, case.name)).exists()]
    missing = len(cases) - len(rows)
    rows += _means(rows)
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "frontier": dataclasses.asdict(frontier),
        "missing_rows": missing,
        "rows": rows,
    }
    return write_table(out, "frontier", content, frontier_table, frontier_plots)


def frontier_table(result: Mapping[str, Any]) -> str:
    """Return the rows as a table in Markdown, by stored bits.

    Args:
        result: what frontier.json holds.
    """
    frontier, environments = result["frontier"], result["environments"]
    texts, asks = frontier["texts"], bool(frontier["problems"])
    means = [row for row in result["rows"] if row["seed"] == MEAN]
    plain = next((row for row in means if row["method"] == FLOAT), None)
    head = ["method", "rank", "stored bits a weight", *texts, *([frontier["questions"]] if asks else []), "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in sorted(means, key=lambda row: row["stored_bits_per_weight"]):
        cells = [f"{row['method']}, {row['bits']} bits" if row is not plain else FLOAT, str(row["rank"])]
        cells.append(f"{row['stored_bits_per_weight']:.2f}")
        for text in texts:
            measured = row["perplexity"][text]
            cell = f"{measured['value']:.2f}"
            if measured["standard_error"] is not None:
                cell += f" ± {measured['standard_error']:.2f}"
            if plain is not None and row is not plain:
                cell += f" ({measured['value'] / plain['perplexity'][text]['value']:.2f}x)"
            cells.append(cell)
        if asks:
            solved = _measured(row, None)
            cells.append("" if solved is None else f"{solved['value']:.3f} ± {solved['standard_error']:.3f}")
        mark = environment_mark(row["environments"], environments)
        cells.append(seconds_cell(row["seconds"], mark) if row is not plain else "")
        lines.append("| " + " | ".join(cells) + " |")
    failed = [row for row in result["rows"] if row.get("failed")]
    if failed:
        lines += ["", "Failed", ""]
    lines += [f"- {row['method']}, {row['bits']} bits, rank {row['rank']}: {row['failed']}" for row in failed]
    lines += table_foot(result)
    return "\n".join(lines) + "\n"


def frontier_plots(result: Mapping[str, Any]) -> dict[str, str]:
    """Return what each measure comes to, with its error, over stored bits and over seconds, as SVG by name.

    Args:
        result: what frontier.json holds.
    """
    frontier = result["frontier"]
    plain = next((row for row in result["rows"] if row["method"] == FLOAT), None)
    means = [row for row in result["rows"] if row["seed"] == MEAN and row["method"] != FLOAT]
    measures: list[tuple[str, str, str | None]] = [
        (Path(text).stem, f"perplexity, {text}", text) for text in frontier["texts"]
    ]
    if frontier["problems"]:
        asked = frontier["questions"]
        measures.append((f"accuracy-{asked.replace(':', '-')}", f"accuracy, {asked}", None))
    pictures = {}
    for (name, y_label, text), (field, end, x_label) in itertools.product(measures, _OVER):
        of_float = _measured(plain, text) if plain is not None else None
        level = None if of_float is None else (FLOAT, of_float["value"])
        if field == "seconds" and len(result["environments"]) > 1:
            x_label = "seconds, on several machines: the table says which"
        # A method whose perplexity is very large would squeeze all others together.
        limit = math.inf if text is None or level is None else _PLOTTED * level[1]
        series: list[Points] = []
        for method in dict.fromkeys(row["method"] for row in means):
            points = [
                (row[field], measured["value"], measured["standard_error"])
                for row in means
                if row["method"] == method and row[field] is not None and (measured := _measured(row, text)) is not None
            ]
            if not points:
                continue
            drawn = [point for point in points if point[1] <= limit]
            label = method if drawn == points else f"{method} ({len(points) - len(drawn)} above {limit:.3g})"
            series.append((label, [x for x, *_ in drawn], [y for _, y, _ in drawn], [error for *_, error in drawn]))
        plot = scatter_plot(series, x_label=x_label, y_label=y_label, log_y=text is not None, level=level)
        if plot:
            pictures[f"{name}-{end}"] = standalone(plot)
    return pictures


def _means(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each method, width and rank: means over seeds; error bars of one seed where there is one."""
    means = []
    for key in dict.fromkeys((row["method"], row["bits"], row["rank"]) for row in rows):
        own = [r for r in rows if (r["method"], r["bits"], r["rank"]) == key and not r.get("failed")]
        if not own:
            continue
        mean: dict[str, Any] = dict(zip(("method", "bits", "rank"), key, strict=True)) | {"seed": MEAN}
        mean["environments"] = sorted({row["environment"] for row in own})
        mean["perplexity"] = {
            text: _over_seeds(row["perplexity"][text] for row in own) for text in own[0]["perplexity"]
        }
        for field in ("stored_bits_per_weight", "seconds", "memory_beyond_model_bytes"):
            mean[field] = _mean(row.get(field) for row in own)
        # Older rows, from before questions were asked, have none.
        solved = [row["accuracy"] for row in own if "accuracy" in row]
        if solved:
            mean["accuracy"] = _over_seeds(solved)
        means.append(mean)
    return means


def _measured(row: Mapping[str, Any], text: str | None) -> Mapping[str, Any] | None:
    """Return a row's perplexity of a text, or without one its accuracy; None where no question was asked."""
    return row.get("accuracy") if text is None else row["perplexity"][text]


def _over_seeds(measured: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the mean of a measure over seeds, the error of one of them, and their spread."""
    every = list(measured)
    values = [each["value"] for each in every]
    return {
        "value": statistics.fmean(values),
        "standard_error": _mean(each["standard_error"] for each in every),
        "spread": statistics.stdev(values) if len(values) > 1 else None,
    }


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are known; a single window, for one, has no standard error."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
