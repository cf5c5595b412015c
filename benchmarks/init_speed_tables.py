"""The tables of `init_speed.py`, for a terminal and for Markdown."""

from __future__ import annotations

import statistics
import sys
from typing import Any

from environment import hardware_line

PEER = "GPTQModel"
PEER_VERSION = "7.3.2"


def paired_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, per preset and width, the median over repeats of our seconds over the peer's of the same repeat."""
    peer = {(row["bits"], row["repeat"]): row for row in rows if row["engine"] == PEER}
    pairs: dict[tuple[str, int], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for row in rows:
        if row["engine"] != PEER and (row["bits"], row["repeat"]) in peer:
            pairs.setdefault((row["preset"], row["bits"]), []).append((row, peer[row["bits"], row["repeat"]]))
    return [
        {
            "preset": preset,
            "bits": bits,
            "median": statistics.median(ours["seconds"] / theirs["seconds"] for ours, theirs in found),
            "smallest": min(ours["seconds"] / theirs["seconds"] for ours, theirs in found),
            "largest": max(ours["seconds"] / theirs["seconds"] for ours, theirs in found),
            "pairs": len(found),
        }
        for (preset, bits), found in pairs.items()
    ]


def table_of(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows: medians over the repeats of each engine, preset and width."""
    groups: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        groups.setdefault((row["bits"], row["engine"], row["preset"]), []).append(row)
    ratios = {(ratio["bits"], ratio["preset"]): ratio for ratio in report["ratio"]}
    headings = ["engine", "preset", "bits", "seconds", "range", "runs", "of the peer's", "MiB beyond the model"]
    lines = []
    for (bits, engine, preset), rows in sorted(groups.items()):
        seconds = [row["seconds"] for row in rows]
        peaks = [row["peak_bytes_beyond_model"] for row in rows if row["peak_bytes_beyond_model"] is not None]
        ratio = ratios.get((bits, preset)) if engine != PEER else None
        lines.append(
            [
                engine,
                preset,
                str(bits),
                f"{statistics.median(seconds):.1f}",
                f"{min(seconds):.1f} to {max(seconds):.1f}",
                str(len(rows)),
                f"{ratio['median']:.3f}" if ratio else "",
                f"{statistics.median(peaks) / 2**20:.0f}" if peaks else "",
            ]
        )
    return headings, lines


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    headings, lines = table_of(report)
    table = Table(title=f"calibrate + quantize + adapt, {report['rows'][0]['tokens']} tokens of {report['model']}")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("engine", "preset") else "right")
    for line in lines:
        table.add_row(*line)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(hardware_line(report["hardware"]), highlight=False)
    console.print(table)


def markdown(report: dict[str, Any]) -> str:
    """Return the table of a result file as markdown."""
    ours, theirs = report["versions"]["ours"], report["versions"]["peer"]
    arithmetic = {row["engine"]: row["arithmetic"] for row in report["rows"]}
    about = ", ".join(f"{engine} in {kind}" for engine, kind in arithmetic.items())
    headings, lines = table_of(report)
    return "\n".join(
        [
            f"{hardware_line(report['hardware'])}; cloq_export {ours['cloq_export']} with torch {ours['torch']}, "
            f"gptqmodel {theirs['gptqmodel']} with torch {theirs['torch']}. Model: {report['model']}, "
            f"{report['rows'][0]['tokens']} tokens of {report['calibration']['text']}. Forward passes: {about}.",
            "",
            f"| {' | '.join(headings)} |",
            "|---|---|" + "--:|" * (len(headings) - 2),
            *(f"| {' | '.join(line)} |" for line in lines),
        ]
    )
