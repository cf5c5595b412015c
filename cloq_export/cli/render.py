"""Results for people: tables of what the verbs give as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cloq_export.cli.output import print_line

_MODEL_LABELS = {
    "float": "float model",
    "quantized": "quantized",
    "adapter": "quantized + adapter",
    "merged": "merged",
    "finetuned": "fine-tuned",
}
# A terminal of 80 columns shows no more of them side by side.
_MOST_COLUMNS = 6
_STORED_LABELS = {
    "bits_per_weight_base": "bits per weight",
    "bits_per_weight_with_adapter": "bits per weight with adapter",
    "checkpoint_bytes": "checkpoint",
    "adapter_bytes": "adapter",
    "float_bytes": "float model",
}


def render_summary(summary: Mapping[str, Any], console: Console) -> None:
    """Print the summary of `run`, `quantize`, `adapt` or `export`; parts that it lacks are left out."""
    render_notes(summary, console)
    if summary.get("perplexity"):
        render_perplexity(summary["perplexity"], console)
    facts = Table("run", "", title_justify="left", show_header=False)
    layers = summary.get("layers") or {}
    for name in ("model", "bits", "group_size", "rank", "preset", "format"):
        if summary.get(name) is not None:
            facts.add_row(name.replace("_", " "), _of_layers(layers.get(name) or {}) or escape(str(summary[name])))
    for name, value in (summary.get("stored") or {}).items():
        if value is not None:
            shown = format_bytes(value) if name.endswith("_bytes") else f"{value:.3f}"
            facts.add_row(_STORED_LABELS.get(name, name.replace("_", " ")), shown)
    if layers.get("count") is not None:
        facts.add_row("layers", str(layers["count"]))
    if layers.get("worst_error_adapted") is not None:
        facts.add_row(
            "worst layer",
            f"{escape(str(layers.get('worst_module')))}: relative error {layers['worst_error_adapted']:.4f}",
        )
    _add_time(facts, summary)
    if summary.get("peak_memory_bytes") is not None:
        beyond = summary.get("memory_beyond_model_bytes")
        more = "" if beyond is None else f", {format_bytes(beyond)} beyond the loaded model"
        facts.add_row("peak memory", format_bytes(summary["peak_memory_bytes"]) + more)
    if facts.row_count:
        console.print(facts)
    for warning in layers.get("warnings") or []:
        print_line(console, f"warning: {warning}")
    verified = summary.get("verified")
    if verified:
        print_line(
            console, "verified: " + ("every gate passed" if verified["passed"] else f"missed: {verified['missed']}")
        )
    render_next(summary, console)
    _gates(summary.get("gates") or [], console)


def _of_layers(counts: Mapping[str, int]) -> str:
    """Return which layers have which value, or nothing where all have the same."""
    if len(counts) < 2:
        return ""
    return ", ".join(f"{value} in {count} layers" for value, count in counts.items())


def render_export(summary: Mapping[str, Any], console: Console) -> None:
    """Print the result of `export` or `convert`."""
    render_notes(summary, console)
    facts = Table("export", "", title_justify="left", show_header=False)
    for name in ("format", "target", "base_fingerprint"):
        if summary.get(name) is not None:
            facts.add_row(name.replace("_", " "), escape(str(summary[name])))
    for adapter in summary.get("adapters") or []:
        more = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in adapter.items() if key != "name")
        facts.add_row("adapter", escape(f"{adapter['name']}: {more}"))
    _add_time(facts, summary)
    console.print(facts)
    print_line(console, "read back from disk and compared bit for bit; the certificate is in the folder")
    render_next(summary, console)


def render_evaluation(result: Mapping[str, Any], console: Console) -> None:
    """Print the result of `eval`."""
    if any(result.get(name) for name in _MODEL_LABELS):
        render_perplexity(result, console)
    if result.get("tasks"):
        from cloq_export.cli.parity_table import render_tasks

        render_tasks(result["tasks"], console)
    for group, means in (result.get("means") or {}).items():
        print_line(console, f"mean of {group}: " + ", ".join(f"{name} {value:.1%}" for name, value in means.items()))
    render_notes(result, console)
    _gates(result.get("gates") or [], console)


def render_perplexity(result: Mapping[str, Any], console: Console) -> None:
    """Print perplexities with their standard errors, and on what they were measured."""
    table = Table("model", "perplexity", "± s.e.", "over float")
    for column in table.columns[1:]:
        column.justify = "right"
    reference = (result.get("float") or {}).get("perplexity")
    for name, label in _MODEL_LABELS.items():
        entry = result.get(name)
        if not entry or entry.get("perplexity") is None:
            continue
        value, error = entry["perplexity"], entry.get("standard_error")
        ratio = f"{value / reference:.3f}" if reference else ""
        table.add_row(label, f"{value:.3f}", "" if error is None else f"{error:.3f}", ratio)
    console.print(table)
    for name, label in _MODEL_LABELS.items():
        far = (result.get(name) or {}).get("to_float")
        if far and far["kl_mean"] is not None:
            print_line(
                console,
                f"{label}: KL divergence from the float model {far['kl_mean']:.3g} in the mean, "
                f"{far['kl_quantile_99']:.3g} at 99%, {far['kl_max']:.3g} at most; the same best token for "
                f"{far['top1_agreement']:.1%} of {far['tokens']} tokens",
            )
    if result.get("tokens") is not None:
        digest = str(result.get("text_sha256") or "")[:16]
        print_line(
            console, f"{result['tokens']} tokens of {result.get('text')}" + (f" (sha256 {digest}…)" if digest else "")
        )


def render_notes(summary: Mapping[str, Any], console: Console) -> None:
    """Print what did not go the ordinary way."""
    for note in summary.get("notes") or []:
        print_line(console, f"note: {note}")


def render_next(summary: Mapping[str, Any], console: Console) -> None:
    """Print the files of a summary and the commands that it suggests."""
    files = summary.get("files") or {}
    if files:
        print_line(console, "files:")
        width = max(len(str(name)) for name in files)
        for name, path in files.items():
            print_line(console, f"  {str(name).ljust(width)}  {path}")
    if summary.get("next"):
        print_line(console, "next:")
        for command in summary["next"]:
            print_line(console, f"  {command}")


def format_bytes(count: float) -> str:
    """Return a number of bytes for people, in decimal units."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{int(count)} B"


def _add_time(facts: Table, summary: Mapping[str, Any]) -> None:
    seconds = summary.get("seconds") or {}
    if seconds:
        facts.add_row("time", ", ".join(f"{escape(str(stage))} {value:.1f} s" for stage, value in seconds.items()))


def render_facts(mapping: Mapping[str, Any], console: Console, *, title: str = "") -> None:
    """Print facts as a table of two columns, then the parts that have facts of their own one by one."""
    table = Table("", "", title=escape(title) or None, title_justify="left", show_header=False)
    parts: list[tuple[str, Any]] = []
    for name, value in mapping.items():
        label = str(name).replace("_", " ")
        if isinstance(value, Mapping) or (
            isinstance(value, (list, tuple)) and any(isinstance(v, Mapping) for v in value)
        ):
            parts.append((label, value))
        elif isinstance(value, (list, tuple)):
            table.add_row(escape(label), escape("\n".join(str(entry) for entry in value)) or "none")
        elif str(name).endswith("bytes") and isinstance(value, (int, float)):
            table.add_row(escape(label), format_bytes(value))
        elif isinstance(value, float):
            table.add_row(escape(label), f"{value:.6g}")
        elif value is not None:
            table.add_row(escape(label), escape(str(value)))
    if table.row_count:
        console.print(table)
    for label, value in parts:
        full = f"{title}, {label}" if title else label
        if isinstance(value, Mapping):
            render_facts(value, console, title=full)
        else:
            _records([entry for entry in value if isinstance(entry, Mapping)], console, title=full)


def _records(records: Sequence[Mapping[str, Any]], console: Console, *, title: str) -> None:
    columns = list(dict.fromkeys(key for record in records for key in record))
    if len(columns) > _MOST_COLUMNS:
        for number, record in enumerate(records, start=1):
            render_facts(record, console, title=f"{title}, {record.get('name', number)}")
        return
    table = Table(*(str(column).replace("_", " ") for column in columns), title=escape(title), title_justify="left")
    for record in records:
        cells = (record.get(column, "") for column in columns)
        table.add_row(*(f"{cell:.6g}" if isinstance(cell, float) else escape(str(cell)) for cell in cells))
    console.print(table)


def _gates(verdicts: Sequence[Mapping[str, Any]], console: Console) -> None:
    for verdict in verdicts:
        word = "passed" if verdict["passed"] else "missed"
        print_line(console, f"gate {word}: {verdict['metric']} {verdict['value']} (limit {verdict['limit']})")
