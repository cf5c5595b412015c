"""The parity report for people at a terminal."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cloq_export.cli.output import print_line


def render_parity(report: Mapping[str, Any], console: Console) -> None:
    """Print the tables of a parity report, the gate last."""
    from cloq_export.parity.page import figure, row_label, share, smallest_loss

    for note in report["notes"]:
        print_line(console, f"note: {note}")
    for each in [*report["provenance"]["findings"], *report["float_part"]]:
        print_line(console, f"{each['what']}: {each['verdict']}" + (f" ({each['reason']})" if each["reason"] else ""))
    for row in report["provenance"]["probes"]:
        print_line(
            console,
            f"last step{_with(row['adapter'])}: log-probabilities differ by {figure(row['mean'])} in the mean "
            f"from those recorded in {row['precision']}",
        )
    numerics = _table("log-probabilities", ("measured", "against"), ("max", "mean", "median", "99%", "99.9%"))
    floor = report["noise_floor"]
    if floor:
        numerics.add_row("float, again", "float", *map(figure, _spread(floor)))
    for row in report["numerics"]:
        numerics.add_row(escape(row_label(row)), row["against"], *map(figure, _spread(row)))
    console.print(numerics)
    if report["divergence"]:
        table = _table("KL divergence", ("measured", "against"), ("mean", "99%", "max", "same best token"))
        for row in report["divergence"]:
            mark = "" if row["estimate"] == "exact" else "≥ "
            values = [mark + figure(row[key]) for key in ("kl_mean", "kl_quantile_99", "kl_max")]
            table.add_row(escape(row_label(row)), row["against"], *values, share(row["top1_agreement"]))
        console.print(table)
    if report["quality"]["perplexity"]:
        table = _table("perplexity", ("model",), ("perplexity", "± s.e.", "over float", "95% interval"))
        for row in report["quality"]["perplexity"]:
            beside = ["", ""]
            if "ratio_to_float" in row:
                beside = [
                    figure(row["ratio_to_float"]),
                    f"{figure(row['ratio_lower'])} to {figure(row['ratio_upper'])}",
                ]
            table.add_row(escape(row_label(row)), figure(row["perplexity"]), figure(row["standard_error"]), *beside)
        console.print(table)
    entries = [(task, entry) for task, rows in report["quality"]["tasks"].items() for entry in rows]
    render_tasks({f"{task}{_with(entry['adapter'])}": entry for task, entry in entries}, console)
    for row in report["greedy"]:
        print_line(
            console,
            f"greedy text{_with(row['adapter'])}: {share(row['agreement'])} of {row['prompts']} prompts agree, "
            f"{row['ties']} part at a near-tie, {row['flips']} elsewhere",
        )
    for row in report["decoding"]:
        print_line(
            console,
            f"{row['kind']} text of {row['adapter'] or 'the base'}: {row['tokens']} tokens at most "
            f"{figure(row['gap_max'])} below the reference's best, {figure(row['gap_mean'])} in the mean",
        )
    if report["scales"]:
        scales = report["scales"]
        least = f", {max(scales['found'].values()):.2%} would have been found in any" if scales["found"] else ""
        print_line(
            console,
            f"scales of {scales['modules']} modules: {figure(scales['largest'])} is the largest sure error{least}",
        )
    for row in report["liveness"]:
        counts = _counted(each["verdict"] for each in row["modules"])
        print_line(console, f"liveness of {row['adapter']}: {counts}")
    if report["isolation"]:
        print_line(console, f"mixed batch against single requests: at most {figure(report['isolation']['max'])}")
    for entry in report["missing"]:
        print_line(console, f"not measured: {entry['what']}: {entry['reason']}")
    gate = _table("gate", ("figure",), ("value", "limit", ""))
    for verdict in report["gates"]:
        word = "[green]passed[/green]" if verdict["passed"] else "[red]missed[/red]"
        gate.add_row(verdict["gate"], figure(verdict["value"]), f"{verdict['bound']} {figure(verdict['limit'])}", word)
    console.print(gate)
    for verdict in report["gates"]:
        if verdict["finds"]:
            print_line(console, f"{verdict['gate']}: {smallest_loss(verdict['finds'])}")
    for name, path in (report.get("files") or {}).items():
        print_line(console, f"{name}: {path}")
    for reason in report["judged"]["reasons"]:
        print_line(console, f"nothing was judged: {reason}")
    print_line(console, "parity: " + ("passed" if report["passed"] else "missed"))


def render_applied(report: Mapping[str, Any], console: Console) -> None:
    """Print whether adapters are applied, question by question."""
    from cloq_export.parity.page import figure

    table = _table(
        escape(f"{report['base']} served by {report['runtime']}"), ("question", "adapter"), ("value", "limit", "")
    )
    words = {True: "[green]passed[/green]", False: "[red]missed[/red]", None: "not judged"}
    for check in report["checks"]:
        limit = "" if check["limit"] is None else figure(check["limit"])
        row = (escape(check["adapter"] or "all and the base"), figure(check["value"]), limit, words[check["passed"]])
        table.add_row(check["what"], *row)
    console.print(table)
    for check in report["checks"]:
        print_line(console, f"{check['what']}{_with(check['adapter'])}: {check['reason']}")
    for entry in report["missing"]:
        print_line(console, f"not measured: {entry['what']}: {entry['reason']}")
    print_line(console, "applied: " + ("yes, as far as it was asked" if report["passed"] else "not shown"))


def render_tasks(tasks: Mapping[str, Any], console: Console) -> None:
    """Print what models answered, task by task: accuracies, and a comparison of every two models."""
    from cloq_export.parity.page import figure, share

    for task, answered in tasks.items():
        table = _table(escape(task), ("model",), ("accuracy", answered["other_rule"]))
        for name, entry in answered["models"].items():
            table.add_row(escape(name), share(entry["accuracy"]), share(entry["other_accuracy"]))
        console.print(table)
        for pair in answered["comparisons"]:
            print_line(
                console,
                f"{pair['first']} and {pair['second']}: {share(pair['agreement'])} of the answers equal, McNemar's p "
                f"{figure(pair['p_value'])} ({pair['only_first']} against {pair['only_second']}), drop "
                f"{share(pair['drop'])}, at most {share(pair['drop_upper'])} with a confidence of 95%",
            )
        print_line(console, f"{answered['questions']} questions of {answered['origin']} ({answered['definition']})")
        if "power" in answered:
            print_line(console, _power_of(answered["power"]))


def _power_of(power: Mapping[str, Any]) -> str:
    if power["smallest_drop"] is None:
        return f"McNemar's test finds no loss among so few questions at the limit {power['limit']:g}"
    return (
        f"McNemar's test at the limit {power['limit']:g} needs {power['answers_needed']} answers that are lost and "
        f"none won; with a probability of {power['probability']:.0%} it finds a loss of {power['smallest_drop']:.1%}"
    )


def _spread(row: Mapping[str, Any]) -> list[Any]:
    return [row["max"], row["mean"], *(row["quantiles"][share] for share in ("0.5", "0.99", "0.999"))]


def _table(title: str, left: Iterable[str], right: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def _counted(words: Iterable[str]) -> str:
    counts = collections.Counter(words)
    return ", ".join(f"{count} {word}" for word, count in counts.items()) or "not measured"


def _with(adapter: str | None) -> str:
    return f" with {adapter}" if adapter else ""
