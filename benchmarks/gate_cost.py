"""What the default gate of `cloq verify` costs, beside that of another version: interleaved pairs of processes.

    git worktree add OTHER 0a18f0a && (cd OTHER && PYTHON setup.py -q build_ext --inplace)
    python benchmarks/gate_cost.py OTHER --json cost.json
    python benchmarks/gate_cost.py OTHER --json cost.json --model smollm2-demo --pairs 1

Each version makes a run and an export with an adapter of its own, because no version has to read what a later one
wrote, and verifies that in the transformers runtime with the options that hold by default. What it costs is processor
time of the whole process, which other work on the machine changes little, and wall time, which it does. Tokens that go
through each kind of model are counted meanwhile, in prefill and in steps with a cache. `without decoding` is the same
with `--prompts 0`; a gate that says that nothing was judged so has still measured all the rest.

The JSON file is written after every row, and rows that it holds are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from environment import describe_hardware, hardware_line
from gate_subjects import random_text, write_tiny_llama

from cloq_export.files.atomic import write_json
from cloq_export.files.safe_json import read_json
from cloq_export.files.versions import environment

ROOT = Path(__file__).resolve().parents[1]
CHILD = Path(__file__).resolve().parent / "gate_cost_child.py"
TINY = "tiny"
# What is verified -> options that are added.
PARTS: dict[str, Sequence[str]] = {"all": (), "without decoding": ("--prompts", "0")}
SIDES = ("this", "other")
# Done, and a gate that was missed: its figures were measured all the same.
_MEASURED = (0, 3)
# A context in which the default windows, and the longest text, have room.
_CONTEXT = 2048


def importable(checkout: Path, place: Path) -> Path:
    """Return a folder for PYTHONPATH in which the package of a checkout stands with its kernels and formats.

    Args:
        checkout: a worktree whose native library was built in place.
        place: a folder that does not exist yet.

    Raises:
        SystemExit: there is no library; without it every kernel would be another one.
    """
    library = checkout / "kernels" / "cpu" / "libcloq_cpu.so"
    if not library.is_file():
        sys.exit(f"{library} is missing; build it: cd {checkout} && {sys.executable} setup.py -q build_ext --inplace")
    package = place / "cloq_export"
    package.mkdir(parents=True)
    for part in (*(checkout / "cloq_export").iterdir(), checkout / "kernels", checkout / "formats"):
        if part.name != "__pycache__":
            (package / part.name).symlink_to(part.resolve())
    return place


class Side:
    """One version of the package, with an export that it made.

    Args:
        path: for PYTHONPATH.
        place: an existing folder to write into.
        threads: of each process.
    """

    def __init__(self, path: Path, place: Path, threads: int) -> None:
        self.place = place
        self._environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": str(threads)}

    def call(self, *arguments: str) -> None:
        """Run Python with these arguments.

        Raises:
            SystemExit: it failed.
        """
        # -P: the folder of a script is not on the path of the version that is measured.
        command = [sys.executable, "-P", *arguments]
        ended = subprocess.run(command, env=self._environment, cwd=self.place, capture_output=True, text=True)
        if ended.returncode not in _MEASURED:
            sys.exit(f"{' '.join(command)} ended with code {ended.returncode}:\n{ended.stderr[-2000:]}")

    def prepare(self, model: str, text: str, recipe: Sequence[str]) -> None:
        """Make a run and its export."""
        self.call("-m", "cloq_export", "run", model, "--out", "run", "--calibration", text, *recipe)
        self.call("-m", "cloq_export", "export", "run", "--out", "export")

    def verify(self, options: Sequence[str]) -> dict[str, Any]:
        """Verify the export, and return what it cost."""
        config = json.loads((self.place / "export" / "config.json").read_text(encoding="utf-8"))
        found = self.place / "tokens.json"
        before, start = os.times(), time.perf_counter()
        self.call(str(CHILD), str(found), str(config["num_hidden_layers"]), "verify", "export", *options)
        wall, after = time.perf_counter() - start, os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        return {
            "cpu_seconds": cpu,
            "wall_seconds": wall,
            "tokens": json.loads(found.read_text(encoding="utf-8")),
        }


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return lines for each model and part: tokens, medians of both sides, and the median of the pairs' ratios."""
    lines = []
    for label in sorted({(row["model"], row["options"], row["part"]) for row in rows}):
        own = [row for row in rows if (row["model"], row["options"], row["part"]) == label]
        name = ", ".join(filter(None, label))
        for side in SIDES:
            counted: list[dict[str, Any]] = next((row["tokens"] for row in own if row["side"] == side), [])
            each = [f"{count['tokens']:.0f} {count['step']} in {count['model']}" for count in counted]
            lines.append(f"{name}: tokens of {side}: {', '.join(each)}")
        for figure in ("cpu_seconds", "wall_seconds"):
            held = {side: {row["pair"]: row[figure] for row in own if row["side"] == side} for side in SIDES}
            pairs = sorted(held["this"].keys() & held["other"].keys())
            if pairs:
                ratio = statistics.median(held["this"][pair] / held["other"][pair] for pair in pairs)
                each = [f"{side} {statistics.median(held[side][pair] for pair in pairs):.1f}" for side in SIDES]
                lines.append(f"{name}: {figure}: {', '.join(each)}, ratio {ratio:.2f} in {len(pairs)} pairs")
    return lines


def main() -> None:
    """Measure what is not in the JSON file yet, and print what each model and part cost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="a checkout of the version that is compared with")
    parser.add_argument("--model", default=TINY, help="folder, or smollm2-demo (default: a random Llama)")
    parser.add_argument("--text", help="as `cloq verify` takes it (default: random words, or embedded)")
    parser.add_argument("--recipe", default="--bits 2 --group-size 32 --rank 8 --samples 4 --seqlen 128")
    parser.add_argument("--verify", default="", help="more options of `cloq verify`, such as '--windows 4'")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    hardware = describe_hardware()
    print(hardware_line(hardware))
    rows: list[dict[str, Any]] = read_json(arguments.json)["rows"] if arguments.json.exists() else []
    with tempfile.TemporaryDirectory(prefix="cloq-cost-") as name:
        place = Path(name)
        model, text = arguments.model, arguments.text or "embedded"
        if model == TINY:
            model = str(write_tiny_llama(place / "float", 0, _CONTEXT))
            (place / "text.txt").write_text(random_text(16384, seed=3), encoding="utf-8")
            text = str(place / "text.txt")
        options = ["--reference", model, "--text", text, *arguments.verify.split()]
        sides = {}
        for side, checkout in zip(SIDES, (ROOT, arguments.other.resolve()), strict=True):
            (place / side).mkdir()
            sides[side] = Side(importable(checkout, place / f"{side}-package"), place / side, arguments.threads)
            sides[side].prepare(model, text, ["--set", f"eval_text={text}", *arguments.recipe.split()])
        for part in arguments.parts.split(","):
            for pair in range(arguments.pairs):
                # Each goes first in turn.
                for side in SIDES if pair % 2 == 0 else SIDES[::-1]:
                    row = {"model": arguments.model, "options": arguments.verify, "part": part}
                    row |= {"side": side, "pair": pair, "threads": arguments.threads}
                    if not any(row.items() <= done.items() for done in rows):
                        rows.append({**row, **sides[side].verify([*options, *PARTS[part]])})
                        write_json(arguments.json, {"rows": rows, "hardware": hardware, "versions": environment()})
    print("\n".join(summarize(rows)))


if __name__ == "__main__":
    main()
