"""How an export is loaded in each engine that reads it."""

from __future__ import annotations

import collections
import itertools
import re
import string

from cloq_export.errors import UsageError
from cloq_export.formats.targets.questions import TargetQuestion
from cloq_export.formats.targets.table import (
    DEVICE_NAMES,
    DEVICES,
    Device,
    Exported,
    allowed_rank,
    needed_packages,
    read_table,
    span,
)

_PATH = re.compile(r"[\w./:@+~ -]+")


def load_snippets(
    layout: str,
    exported: Exported,
    *,
    folder: str = "PATH/TO/EXPORT",
    adapter: str = "PATH/TO/ADAPTER",
) -> list[dict[str, str]]:
    """Return how an export is loaded in each engine that reads it, for its model card.

    Args:
        layout: the layout of the export.
        exported: what it holds.
        folder: path or hub id of the export, as the snippets shall name it.
        adapter: path or hub id of the adapter, likewise.

    Returns:
        One entry per engine and way to load: engine, version, device, needs, language and snippet.

    Raises:
        UsageError: a path holds characters that would need quoting.
    """
    for path in (folder, adapter):
        if _PATH.fullmatch(path) is None:
            raise UsageError(f"the path {path!r} holds characters that need quoting in a snippet; use a plain name.")
    table = read_table()
    entries: list[dict[str, str]] = []
    for engine in table.engines.values():
        # (snippet, needs, device) -> the versions in which it works.
        works: dict[tuple[str, tuple[str, ...], Device], list[str]] = collections.defaultdict(list)
        for device, version in itertools.product(DEVICES, engine.versions):
            rules = TargetQuestion(engine, (version,), exported).answer(layout, device)
            if not isinstance(rules, str):
                # Of two ways to load, the one further down in the table also takes what the one above it takes.
                snippet = max(rules, key=table.rules.index).snippet
                works[snippet, needed_packages(rules), device].append(version)
        places: dict[tuple[str, tuple[str, ...], tuple[str, ...]], list[Device]] = collections.defaultdict(list)
        for (snippet, needs, device), read_by in works.items():
            places[snippet, needs, tuple(read_by)].append(device)
        for (name, needs, versions), devices in places.items():
            with_adapter = bool(exported.ranks) and allowed_rank(engine.adapters, max(exported.ranks)) is not None
            code = table.snippets[name].adapter if with_adapter else table.snippets[name].plain
            rank = allowed_rank(engine.adapters, max(exported.ranks)) if with_adapter else None
            entries.append(
                {
                    "engine": engine.title,
                    "version": span(versions),
                    "device": ", ".join(DEVICE_NAMES[device] for device in devices),
                    "needs": ", ".join(needs),
                    "language": "sh" if code.startswith("python -m") else "python",
                    "snippet": string.Template(code).substitute(folder=folder, adapter=adapter, rank=rank).rstrip(),
                }
            )
    return entries
