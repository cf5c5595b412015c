"""A folder in which a table is measured row by row, so that an interrupted call continues."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cloq_export.errors import UsageError
from cloq_export.files.atomic import make_folder, write_bytes, write_json
from cloq_export.files.safe_json import read_json
from cloq_export.files.versions import environment
from cloq_export.process.hardware import describe_hardware, hardware_line

_ENVIRONMENTS = "environments.json"


class RowFolder:
    """The rows of one table, each in a file of its own from the moment it is measured.

    A table may be continued on another machine, so each row names the one that it was measured on.

    Args:
        path: the folder; new, empty, or of the same table.
        what: what the table is, one word; `<what>.json` tells what was asked for.
        asked: all that the rows depend on, as JSON values.

    Raises:
        UsageError: the folder holds another table, or something else.
        RunDirectoryError: it is a file, or cannot be made or written.
    """

    def __init__(self, path: Path, what: str, asked: Mapping[str, Any]) -> None:
        self.path = path
        plain = json.loads(json.dumps(asked))
        make_folder(path)
        binding = path / f"{what}.json"
        if binding.exists():
            held = read_json(binding)
            differing = sorted(key for key in {*held, *plain} if held.get(key) != plain.get(key))
            if differing:
                raise UsageError(
                    f"{path} holds another {what} ({', '.join(differing)} differ); choose another folder with `out`."
                )
        elif any(path.iterdir()):
            raise UsageError(f"{path} holds other files; choose an empty or new folder with `out`.")
        else:
            (path / "rows").mkdir()
            write_json(binding, plain)

    def has(self, name: str) -> bool:
        """Return whether a row is measured."""
        return row_path(self.path, name).exists()

    def write(self, name: str, row: Mapping[str, Any]) -> None:
        """Keep a row, with the name of the environment."""
        write_json(row_path(self.path, name), {**row, "environment": self.environment()})

    def environment(self) -> str:
        """Return the name that this hardware with these versions has in the folder; a new one gets the next number."""
        known = _environments(self.path)
        here = {"hardware": describe_hardware(), "versions": environment()}
        for name, told in known.items():
            if _in_words(told) == _in_words(here):
                return name
        name = str(len(known) + 1)
        write_json(self.path / _ENVIRONMENTS, {**known, name: here})
        return name


def row_path(folder: Path, name: str) -> Path:
    """Return where the row of a name stands."""
    return folder / "rows" / f"{name}.json"


def write_table(
    folder: Path,
    name: str,
    content: Mapping[str, Any],
    table: Callable[[Mapping[str, Any]], str],
    plots: Callable[[Mapping[str, Any]], Mapping[str, str]],
) -> dict[str, Any]:
    """Write NAME.json, NAME.md and the plots of a table.

    Args:
        folder: where they go.
        name: of the table.
        content: what the JSON holds besides the environments that its rows name.
        table: gives the Markdown of what the JSON holds.
        plots: gives name -> SVG of what the JSON holds.

    Returns:
        dict: what the JSON holds, with "files" beside it.
    """
    result = {**content, "environments": _environments(folder)}
    files = {"json": str(folder / f"{name}.json"), "table": str(folder / f"{name}.md")}
    write_json(folder / f"{name}.json", result)
    write_bytes(folder / f"{name}.md", table(result).encode("utf-8", "replace"))
    for picture, svg in plots(result).items():
        files[picture] = str(folder / f"{picture}.svg")
        write_bytes(folder / f"{picture}.svg", svg.encode("utf-8", "replace"))
    return result | {"files": files}


def table_foot(result: Mapping[str, Any]) -> list[str]:
    """Return what stands below a table in Markdown: what its rows were measured on, and how many are missing.

    Args:
        result: what the table's JSON holds.
    """
    environments = result["environments"]
    lines = ["", "Measured on", ""]
    for name, told in environments.items():
        hardware, versions = _in_words(told)
        lines.append(
            f"-{environment_mark([name], environments)} {hardware}; {_listed(versions, 'torch', 'transformers')}"
        )
    # A peer's rows carry the versions of its own environment, which differ if that was recreated in between.
    peers = [(row["method"], row["versions"]) for row in result["rows"] if "versions" in row]
    lines += dict.fromkeys(f"- {peer}: {_listed(versions, *versions)}" for peer, versions in peers)
    if result["missing_rows"]:
        lines += ["", f"{result['missing_rows']} rows are not measured yet."]
    return lines


def environment_mark(names: Iterable[str], environments: Mapping[str, Any]) -> str:
    """Return what stands behind a figure that depends on the machine; nothing where all have the same.

    Args:
        names: of the environments that the figure comes from.
        environments: all of the table.
    """
    return f" [{', '.join(sorted(set(names)))}]" if len(environments) > 1 else ""


def _in_words(told: Mapping[str, Any]) -> tuple[str, Mapping[str, str]]:
    # The exact bytes of memory differ from one boot to the next; the rounded description does not.
    return hardware_line(told["hardware"]), told["versions"]


def _listed(versions: Mapping[str, str], *packages: str) -> str:
    return ", ".join(f"{package} {versions[package]}" for package in packages)


def _environments(folder: Path) -> dict[str, Any]:
    path = folder / _ENVIRONMENTS
    return dict(read_json(path)) if path.exists() else {}


def making_seconds(summary: Mapping[str, Any]) -> float:
    """Return the seconds that a run's summary names, less reading the model and measuring the result."""
    return sum(spent for stage, spent in summary["seconds"].items() if stage not in ("measure", "read model"))


def making_cost(summary: Mapping[str, Any], *, in_one_go: bool) -> dict[str, Any]:
    """Return what making a run took, without reading the model and measuring the result.

    Args:
        summary: of the run's last call.
        in_one_go: that call began the run; of one that went on where an earlier call had stopped, nothing is known.

    Returns:
        dict: "seconds" and "memory_beyond_model_bytes", None where they are not known.
    """
    if not in_one_go:
        return {"seconds": None, "memory_beyond_model_bytes": None}
    beyond = summary["memory_beyond_model_bytes"]
    return {"seconds": making_seconds(summary), "memory_beyond_model_bytes": beyond}


def seconds_cell(seconds: float | None, mark: str) -> str:
    """Return what a table says of the seconds of a row that was made: `mark` names the machine behind them."""
    return "not in one go" if seconds is None else f"{seconds:.0f}{mark}"
