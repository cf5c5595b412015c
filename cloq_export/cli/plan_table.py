"""The plan of a run, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from cloq_export.cli.output import print_line
from cloq_export.cli.render import format_bytes, render_notes


def render_plan(plan: Mapping[str, Any], console: Console) -> None:
    """Print what `run --plan` gives."""
    render_notes(plan, console)
    for grid, count in plan["grids"].items():
        print_line(console, f"{count} of {plan['layers']} layers: {grid}")
    device = plan["device"]
    about = "about, " if device["estimated"] else ""
    table = Table(f"on a GPU, in {device['dtype']}", "at most", f"{about}of which", title_justify="left")
    for stage in device["stages"]:
        parts = ", ".join(f"{name} {format_bytes(count)}" for name, count in stage["parts"].items() if count)
        table.add_row(stage["stage"], format_bytes(stage["bytes"]), parts)
    console.print(table)
    print_line(console, _verdict(device))
    console.print(_times(device["times"]))
    most: dict[str, list[str]] = {}
    for card in device["times"]:
        most.setdefault(card["dominating"], []).append(f"{card['card']} ({card['share']:.0%})")
    for kernel, cards in most.items():
        print_line(console, f"most is taken by {kernel} on {', '.join(cards)}")


def _times(times: Sequence[Mapping[str, Any]]) -> Table:
    """Return the least seconds of each stage on known cards."""
    table = Table("least seconds of the walk", title_justify="left")
    for card in times:
        table.add_column(card["card"], justify="right")
    for stage in times[0]["stages"]:
        table.add_row(stage, *(f"{card['stages'][stage]:.1f}" for card in times))
    table.add_row("together", *(f"{card['seconds']:.1f}" for card in times))
    return table


def _verdict(device: Mapping[str, Any]) -> str:
    if device["free"] is None:
        return "torch sees no GPU here, or `device` says cpu: the run computes on the processor, in host memory"
    card = f"{device['device']}, {format_bytes(device['free'])} of {format_bytes(device['total'])} free"
    if device["windows_per_batch"]:
        parked = "; batches that wait for each other lie in host memory" if device["parks"] else ""
        return f"{card}: {device['windows_per_batch']} windows in a forward pass fit{parked}"
    largest = max(device["stages"], key=lambda stage: stage["bytes"])
    part = max(largest["parts"], key=largest["parts"].get)
    return (
        f"{card}: not even one window in a forward pass fits; the most is taken by {part} in the stage "
        f"{largest['stage']!r}. Choose fewer `samples` or a smaller `seqlen` where that is for windows that wait, or a "
        "larger device."
    )
