"""Put the rows of a comparison side by side: JSON, a table in Markdown, and plots."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.files.safe_json import read_json
from cloq_export.lab.comparison import FLOAT_BITS, LORA, STARTS, ComparisonRecipe, base_name, row_name
from cloq_export.lab.row_folder import environment_mark, row_path, seconds_cell, table_foot, write_table
from cloq_export.parity.plots import line_plot, standalone

FORMAT, FORMAT_VERSION = "cloq-compare", 1
MEAN = "mean"
# Field of a row -> what the tables and plots call it.
_FIGURES = {
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "held_out_perplexity": "perplexity of held-out examples",
}
# Field of a certificate -> norm: the paper's Figure 2.
_DISCREPANCIES = {"error_adapted": "frobenius", "spectral_error_adapted": "spectral"}


def write_comparison(comparison: ComparisonRecipe, out: Path) -> dict[str, Any]:
    """Write compare.json, compare.md and the plots from the rows that are there.

    Args:
        comparison: what is compared.
        out: its folder.

    Returns:
        dict: what compare.json holds, with "files" beside it.
    """
    rows, curves = [], {}
    for task, start, width, seed in comparison.cases():
        path = row_path(out, row_name(task, start, width, seed))
        if path.exists():
            row = read_json(path)
            curves[task, start, width, seed] = row.pop("curve", None)
            if row.get("held_out_loss") is not None:
                row["held_out_perplexity"] = math.exp(row["held_out_loss"])
            rows.append(row)
    missing = len(comparison.cases()) - len(rows)
    rows += _means(rows)
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "comparison": dataclasses.asdict(comparison),
        "missing_rows": missing,
        "bases": _bases(out),
        "rows": rows,
    }

    def plots(result: Mapping[str, Any]) -> dict[str, str]:
        return _plots(comparison, out, result["rows"], curves)

    return write_table(out, "compare", content, comparison_table, plots)


def comparison_table(result: Mapping[str, Any]) -> str:
    """Return the rows as tables in Markdown: one line for each start, one column for each width.

    Args:
        result: what compare.json holds.
    """
    lines: list[str] = []
    rows = [row for row in result["rows"] if row["seed"] == MEAN]
    for task in dict.fromkeys(row["task"] for row in rows):
        for figure, called in _FIGURES.items():
            chosen = [row for row in rows if row["task"] == task and row.get(figure) is not None]
            widths = sorted({row["bits"] for row in chosen})
            if not chosen:
                continue
            beside = "; beside 16-bit LoRA" if figure == "perplexity" and any(r["init"] == LORA for r in chosen) else ""
            lines += [f"{task}, {called} after training (mean ± spread over seeds{beside}):", ""]
            lines += ["| start | " + " | ".join(f"{width} bits" for width in widths) + " |"]
            lines += ["|---|" + "---|" * len(widths)]
            for init in dict.fromkeys(row["init"] for row in chosen):
                cells = [_cell(chosen, init, width, figure) for width in widths]
                lines.append(f"| {init} | " + " | ".join(cells) + " |")
            lines.append("")
    failed = [row for row in result["rows"] if row.get("failed")]
    if failed:
        lines += [*(f"- {row['init']}, {row['task']}, seed {row['seed']}: {row['failed']}" for row in failed), ""]
    known = [row for row in result["rows"] if row.get("held_out_tokens_calibrated_on")]
    if known:
        lines += [
            *(
                f"- {row['init']}, {row['task']}, {row['bits']} bits, seed {row['seed']}: the codes were calibrated on "
                f"{row['held_out_tokens_calibrated_on']} of the tokens that are held out, so its rate and its held-out "
                "perplexity are not of new text"
                for row in known
            ),
            "",
        ]
    if result["bases"]:
        lines += [
            "| base | seconds | peak memory beyond the model | mean relative discrepancy, Frobenius | spectral |",
        ]
        lines += ["|---|---|---|---|---|"]
        for name, base in result["bases"].items():
            beyond = base.get("memory_beyond_model_bytes")
            memory = "" if beyond is None else f"{beyond / 1e9:.2f} GB"
            seconds = seconds_cell(base["seconds"], environment_mark([base["environment"]], result["environments"]))
            discrepancies = " | ".join(f"{base[f'mean_{field}']:.4f}" for field in _DISCREPANCIES)
            lines.append(f"| {name} | {seconds} | {memory} | {discrepancies} |")
    lines += table_foot(result)
    return "\n".join(lines) + "\n"


def _means(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each task, start and width with the means over its seeds and their spread."""
    means = []
    for key in dict.fromkeys((row["task"], row["init"], row["bits"]) for row in rows):
        own = [row for row in rows if (row["task"], row["init"], row["bits"]) == key and not row.get("failed")]
        if not own:
            continue
        mean: dict[str, Any] = dict(zip(("task", "init", "bits"), key, strict=True)) | {"seed": MEAN, "seeds": len(own)}
        for figure in _FIGURES:
            values = [row[figure] for row in own if row.get(figure) is not None]
            if values:
                mean[figure] = statistics.fmean(values)
                mean[f"{figure}_spread"] = statistics.stdev(values) if len(values) > 1 else None
        means.append(mean)
    return means


def _cell(rows: Sequence[Mapping[str, Any]], init: str, width: int, figure: str) -> str:
    row = next((row for row in rows if (row["init"], row["bits"]) == (init, width)), None)
    if row is None:
        return ""
    spread = row.get(f"{figure}_spread")
    digits = 2 if figure == "perplexity" else 3
    cell = f"{row[figure]:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")
    whole = next((row for row in rows if row["init"] == LORA), None)
    if whole is not None and init != LORA and figure == "perplexity":
        cell += f" ({row[figure] / whole[figure]:.2f}x)"
    return cell


def _bases(out: Path) -> dict[str, Any]:
    bases = {}
    for folder in sorted((out / "bases").iterdir()) if (out / "bases").is_dir() else ():
        if not RunDirectory.is_run(folder) or "cost" not in RunDirectory.open(folder).reports():
            continue
        directory = RunDirectory.open(folder)
        certificates = directory.certificates()
        bases[folder.name] = directory.read_report("cost") | {
            f"mean_{field}": statistics.fmean(getattr(certificate, field) for certificate in certificates)
            for field in _DISCREPANCIES
        }
    return bases


def _plots(
    comparison: ComparisonRecipe, out: Path, rows: Sequence[Mapping[str, Any]], curves: Mapping[Any, Any]
) -> dict[str, str]:
    """Return figures over widths, losses over steps, and discrepancies over layers, as SVG by name."""
    means = [row for row in rows if row["seed"] == MEAN]
    pictures: dict[str, str] = {}
    for task in comparison.tasks:
        pictures |= _plots_of_figures(task, means)
        for width in comparison.bits:
            pictures |= _plot_of_losses(task, width, curves)
    for width, (field, norm) in itertools.product(comparison.bits, _DISCREPANCIES.items()):
        series = []
        for start in comparison.starts:
            folder = out / "bases" / base_name(STARTS[start], width)
            own_codes = STARTS[start].kind == "run" and STARTS[start].adapt is None and not STARTS[start].zero
            if own_codes and RunDirectory.is_run(folder):
                errors = [getattr(certificate, field) for certificate in RunDirectory.open(folder).certificates()]
                series.append((start, [float(n) for n in range(len(errors))], errors))
        if series:
            plot = line_plot(series, x_label="layer", y_label=f"relative discrepancy, {norm}", log_y=True)
            pictures[f"discrepancy-{norm}-{width}"] = standalone(plot)
    return pictures


def _plots_of_figures(task: str, means: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    pictures = {}
    for figure, called in _FIGURES.items():
        chosen = [row for row in means if row["task"] == task and row.get(figure) is not None]
        series = []
        for init in dict.fromkeys(row["init"] for row in chosen):
            points = sorted((float(row["bits"]), float(row[figure])) for row in chosen if row["init"] == init)
            series.append((init, [x for x, _ in points], [y for _, y in points]))
        if series:
            plot = line_plot(series, x_label="bits", y_label=called, log_y=figure != "accuracy")
            pictures[f"{task}-{figure}"] = standalone(plot)
    return pictures


def _plot_of_losses(task: str, width: int, curves: Mapping[Any, Any]) -> dict[str, str]:
    series = [
        (start, [float(p["step"]) for p in curve["losses"]], [float(p["loss"]) for p in curve["losses"]])
        for (name, start, own, seed), curve in curves.items()
        if curve and name == task and own in (width, FLOAT_BITS) and seed == 0
    ]
    if not series:
        return {}
    plot = line_plot(series, x_label="step", y_label=f"loss at {width} bits")
    return {f"{task}-losses-{width}": standalone(plot)}
