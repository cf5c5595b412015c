"""The table as markdown, and its page."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cloq_export.errors import UsageError
from cloq_export.files.atomic import write_bytes
from cloq_export.formats.targets.table import DEVICE_NAMES, Checked, Engine, read_table, span

_OWN_GRIDS = {"parts": "yes, also in fused layers", "all": "yes", "unfused": "not in fused layers", "none": "no"}
_BEGIN, _END = "<!-- targets table: begin -->", "<!-- targets table: end -->"


def table_markdown() -> str:
    """Return the table as markdown, one part per engine."""
    table = read_table()
    sources: dict[str, int] = {}
    lines: list[str] = []
    for engine in table.engines.values():
        lines += [
            f"## {engine.title}",
            "",
            "| layout | bits | grid | group size | inputs, outputs divisible by | own grids | device | kernel | needs "
            "| versions | source, note |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        shown = [rule for rule in table.rules if rule.target == engine.name]
        for rule in shown:
            number = sources.setdefault(rule.source, len(sources) + 1)
            cells = (
                ", ".join(rule.layouts) + (" (embeddings)" if rule.embeddings else ""),
                _list(rule.bits),
                "symmetric or not" if len(rule.symmetric) == 2 else "symmetric" if rule.symmetric[0] else "asymmetric",
                _list(rule.group_sizes),
                "any" if rule.inputs == rule.outputs == 1 else f"{rule.inputs}, {rule.outputs}",
                _OWN_GRIDS[rule.own_grids],
                ", ".join(DEVICE_NAMES[device] for device in rule.devices),
                rule.kernel,
                ", ".join(f"`{need}`" for need in (*rule.needs, rule.flag) if need) or "nothing",
                _checked(engine, rule.versions),
                f"[{number}]" + (f" {rule.note}" if rule.note else ""),
            )
            lines.append(f"| {' | '.join(cells)} |")
        adapters = engine.adapters
        number = sources.setdefault(adapters.source, len(sources) + 1)
        allowed = "any rank" if adapters.ranks is None else f"ranks up to {max(adapters.ranks)}"
        own = "modules may have ranks of their own" if adapters.patterns else "one rank in all modules"
        about = f"Adapters: {allowed}; {own}; {adapters.note} ({_checked(engine, adapters.versions)}; [{number}])."
        lines += ["", about, ""]
    lines += ["## Sources", ""]
    lines += [f"{number}. {source}" for source, number in sources.items()]
    return "\n".join(lines) + "\n"


def render_into(path: Path) -> None:
    """Write the table between the markers of a page.

    Raises:
        UsageError: the page has no markers.
        RunDirectoryError: it cannot be written.
    """
    page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise UsageError(f"{path} lacks the lines {_BEGIN} and {_END}; put them where the table belongs.")
    write_bytes(path, f"{before}{begin}\n\n{table_markdown()}\n{end}{after}".encode())


def _list(values: Sequence[int] | None) -> str:
    return "any" if values is None else ", ".join(str(value) for value in values)


def _checked(engine: Engine, versions: Mapping[str, Checked]) -> str:
    known = [version for version in engine.versions if version in versions]
    alike = itertools.groupby(known, key=lambda version: versions[version])
    return ", ".join(f"{span(list(names))} {checked}" for checked, names in alike)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or write it into a page."""
    parser = argparse.ArgumentParser(prog="python -m cloq_export.formats.targets", description=__doc__)
    parser.add_argument("--into", type=Path, metavar="PAGE", help="the page to write the table into, at its markers")
    page: Path | None = parser.parse_args(arguments).into
    if page is None:
        sys.stdout.write(table_markdown())
    else:
        render_into(page)
