"""Mutated checkpoints and adapters: each is refused in one line, or reads to what its bytes say.

`mutations.py` damages the originals of `originals.py`, `oracle.py` says what the bytes mean, and `run_cases.py` lets
the readers at them in a process of its own, with little memory to take and a watchdog. A case is made from the seed and
its number alone, so a failure is replayed with the command that its message gives.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent / "run_cases.py"
FAST_CASES = 300
# Far beyond what the cases take; the watchdog in the process ends a case that hangs.
SECONDS_FOR_EACH = 1.0


def run_cases(folder: pathlib.Path, seed: int, first: int, cases: int) -> dict[str, int]:
    """Run cases and return what was counted; fail on the first kind of misbehaviour."""
    command = [sys.executable, str(SCRIPT), "--seed", str(seed), "--first", str(first), "--cases", str(cases)]
    finished = subprocess.run(
        [*command, "--folder", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120 + SECONDS_FOR_EACH * cases,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    said = [json.loads(line) for line in finished.stdout.splitlines()]
    at = [entry["at"] for entry in said if "at" in entry]
    replay = "python -m pytest tests/fuzz -m slow --fuzz-cases 1 --fuzz-seed {seed} --fuzz-first {number}"
    failures = [entry for entry in said if "failure" in entry]
    texts = [
        f"case {entry['case']} of seed {seed} ({entry['original']}: {', '.join(entry['mutations'])}): "
        f"{entry['failure']}\n  replay: {replay.format(seed=seed, number=entry['case'])}"
        for entry in failures[:10]
    ]
    assert not failures, f"{len(failures)} of {cases} cases:\n" + "\n".join(texts)
    if finished.returncode:
        where = replay.format(seed=seed, number=at[-1]) if at else "no case was begun"
        pytest.fail(
            f"the process ended with {finished.returncode} in case {at[-1:]} of seed {seed}; replay: {where}\n"
            + finished.stderr[-3000:]
        )
    return said[-1]["counts"]


def assert_both_ways(counts: dict[str, int], cases: int) -> None:
    """A fuzz test that refuses everything, or changes nothing, shows nothing."""
    for kind in ("checkpoints", "adapters"):
        assert counts[f"{kind} read"] > 0.01 * cases, counts
        assert counts[f"{kind} refused"] > 0.05 * cases, counts
    assert counts["certificates repeated"] > 0, counts
    assert counts["not compared"] < 0.01 * cases, counts


def test_hostile_files_are_refused_or_read_as_they_are(tmp_path, fuzz_option):
    counts = run_cases(tmp_path, fuzz_option("seed", 1), 0, FAST_CASES)
    assert_both_ways(counts, FAST_CASES)


@pytest.mark.slow
def test_many_hostile_files_are_refused_or_read_as_they_are(tmp_path, fuzz_option):
    cases = fuzz_option("cases", 10_000)
    counts = run_cases(tmp_path, fuzz_option("seed", 1), fuzz_option("first", 0), cases)
    if cases >= 1000:
        assert_both_ways(counts, cases)
        assert all(count > 0 for name, count in counts.items() if name.startswith("mutation ")), counts
