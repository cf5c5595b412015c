"""Plant faults in a tiny model's export, its adapters and its engine, and count those that `cloq verify` names rightly.

    python benchmarks/planted_faults.py --json faults.json
    python benchmarks/planted_faults.py --groups engine --only scale

Rows are written one by one. Faults that the JSON file holds as named are not planted again; the others are.

Four groups: bytes behind the certificate, what lies before it, adapters outside the export, engines and evaluation.
Most of these faults are others than `tests/` plants. A fault is named rightly if the gate that is meant misses, with
the reason that is meant, or if the call ends with an error that says it.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import planted_adapters
import planted_beside
import planted_bytes
import planted_engines
import planted_made
from environment import describe_hardware, hardware_line
from gate_subjects import SILENT, Subject, make_subject
from planted_scene import Fault, Scene, certify_again

from cloq_export.errors import CloqError
from cloq_export.files.atomic import write_json
from cloq_export.files.safe_json import read_json
from cloq_export.files.versions import environment
from cloq_export.parity.report import missed_gates
from cloq_export.verbs.verification import engines
from cloq_export.verbs.verify import verify

GROUPS: dict[str, Sequence[Fault]] = {
    "bytes": planted_bytes.FAULTS,
    "before": [*planted_made.BEFORE, *planted_beside.BEFORE],
    "outside": [*planted_adapters.OUTSIDE, *planted_beside.OUTSIDE],
    "engine": planted_engines.FAULTS,
}
_SHARE = 0.95


def try_fault(fault: Fault, scene: Scene) -> dict[str, Any]:
    """Plant one fault, verify, and return what was said."""
    changed = dict((fault.plant(scene) if fault.plant else None) or {})
    export = changed.pop("export", scene.export)
    healthy = engines.OPENERS["hf"]
    missed: list[str] = []
    try:
        if fault.certified and export.exists():
            certify_again(export)
        engines.OPENERS["hf"] = _faulty(fault, scene, healthy)
        report = verify(export, dataclasses.replace(scene.subject.options(), **changed), console=SILENT)
        missed = [verdict.gate for verdict in report.gates if not verdict.passed]
        said = str(missed_gates(report))
        named = fault.gate in missed and fault.says in said
    except CloqError as error:
        said = str(error)
        named = bool(fault.says or fault.gate == "certificate") and (fault.says or "") in said
    finally:
        engines.OPENERS["hf"] = healthy
    return {"fault": fault.name, "gate": fault.gate, "named": named, "missed": missed, "said": said}


def _faulty(fault: Fault, scene: Scene, healthy: Any) -> Any:
    """Return what opens the engine of a fault."""

    def opener(export: Path, adapters: Any, options: Any) -> Any:
        if fault.misread is not None:
            export = Path(shutil.copytree(export, scene.place / "misread", dirs_exist_ok=True))
            fault.misread(export)
            # Its adapters are bound to the codes as they were.
            options = dataclasses.replace(options, force=True)
        served = healthy(export, adapters, options)
        return served if fault.serve is None else fault.serve(served)

    return opener


def try_group(
    name: str, faults: Iterable[Fault], subject: Subject, other: Subject, place: Path
) -> Iterator[dict[str, Any]]:
    """Give a row for each of these faults of a group."""
    healthy = subject.export(place / "healthy")
    for number, fault in enumerate(faults):
        own = place / str(number)
        own.mkdir()
        export = Path(shutil.copytree(healthy, own / "export"))
        (own / "beside").mkdir()
        row = {"group": name, **try_fault(fault, Scene(subject, other, export, own / "beside"))}
        yield row
        if not row["named"]:
            print(
                f"NOT NAMED {name}: {fault.name} ({fault.gate}, {fault.says!r}): {row['missed']} {row['said'][:600]}",
                flush=True,
            )
        shutil.rmtree(own)


def main() -> None:
    """Plant, print what is not named and a line for each group, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--only", default="", help="parts of the names of faults, joined by commas")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    hardware = describe_hardware()
    print(hardware_line(hardware))
    start = time.perf_counter()
    held = read_json(arguments.json)["rows"] if arguments.json and arguments.json.exists() else []
    rows: list[dict[str, Any]] = [row for row in held if row["named"]]
    done = {(row["group"], row["fault"]) for row in rows}
    with tempfile.TemporaryDirectory(prefix="cloq-faults-") as name:
        places = [Path(name) / str(seed) for seed in (0, 1)]
        for place in places:
            place.mkdir()
        subject, other = (make_subject(place, seed=seed) for seed, place in enumerate(places))
        report = verify(subject.export(Path(name) / "healthy"), subject.options(), console=SILENT)
        if not report.passed:
            sys.exit(f"the healthy export misses already: {missed_gates(report)}")
        for group in arguments.groups.split(","):
            place = Path(name) / group
            place.mkdir()
            asked = [
                fault
                for fault in GROUPS[group]
                if any(part in fault.name for part in arguments.only.split(",")) and (group, fault.name) not in done
            ]
            for row in try_group(group, asked, subject, other, place):
                rows.append(row)
                if arguments.json:
                    write_json(arguments.json, {"rows": rows, "hardware": hardware, "versions": environment()})
    short = []
    for group in arguments.groups.split(","):
        own = [row["named"] for row in rows if row["group"] == group]
        print(f"{group}: {sum(own)} of {len(own)} faults are named")
        short += [group] if sum(own) < _SHARE * len(own) else []
    print(f"{sum(row['named'] for row in rows)} of {len(rows)} in {time.perf_counter() - start:.0f} s")
    if short:
        sys.exit(3)


if __name__ == "__main__":
    main()
