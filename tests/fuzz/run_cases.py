"""Run fuzz cases in a process of its own, so that a crash, a hang or a flood of memory ends only this process.

Each case is made from the seed and its number alone. One JSON object is printed for each failure, and a last one with
counts; the parent knows from "at" which case a process was in when it died.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import os
import pathlib
import random
import resource
import shutil
import sys
import traceback
import warnings

import mutations
import numpy as np
import oracle
import originals
import torch

from cloq_export.artifact.certificate import verify_certificate
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.detective import examine
from cloq_export.artifact.inspection import describe
from cloq_export.errors import CloqError
from cloq_export.formats.peft import read_adapter

SECONDS = 20
# The largest honest file here has some kilobytes.
EXTRA_MEMORY = 1 << 30
EXTRA_RESIDENT = 192 << 10  # KiB
MAX_MESSAGE = 2000


class Failure(Exception):
    """A case did what no file may make a reader do."""


class Case:
    """One mutated folder, and what may follow."""

    def __init__(self, seed: int, number: int, found: dict[str, originals.Original]) -> None:
        chance = random.Random(f"{seed}/{number}")
        self.name = chance.choice(sorted(found))
        self.original = found[self.name]
        self.files: mutations.Files = dict(self.original.files)
        self.applied: list[str] = []
        self.expected: str | None = None
        wanted = chance.choice([1, 1, 1, 2, 3])
        while len(self.applied) < wanted:
            mutate = chance.choice(mutations.ALL)
            kept = dict(self.files)
            try:
                expected = mutate(self.files, chance)
            except Exception as error:
                # What an earlier mutation left may be nothing that this one understands.
                if not self.applied and not isinstance(error, mutations.NotApplicable):
                    raise
                self.files = kept
                continue
            self.applied.append(mutate.__name__)
            # A second mutation may undo what the first made certain.
            self.expected = expected if len(self.applied) == 1 else None

    def write(self, folder: pathlib.Path, outside: pathlib.Path) -> None:
        for name, entry in self.files.items():
            path = folder / name
            if isinstance(entry, bytes):
                path.write_bytes(entry)
            elif isinstance(entry, mutations.Link):
                target = entry.target.replace("{same}", "{outside}/{original}").replace("{original}", self.name)
                path.symlink_to(target.replace("{outside}", str(outside)))
            elif entry.kind == "pipe":
                os.mkfifo(path)
            else:
                path.mkdir()


def attempt(read, *arguments, **options):
    """Return (what a reader returns, None), or (None, its refusal); anything else that it raises is a failure."""
    try:
        return read(*arguments, **options), None
    except CloqError as error:
        text = str(error)
        if not text.isprintable():
            raise Failure(f"{read.__name__}: the message is not one printable line: {text!r:.600}") from None
        if not 10 <= len(text) <= MAX_MESSAGE:
            raise Failure(f"{read.__name__}: the message has {len(text)} characters: {text!r:.300}") from None
        return None, error


def read_checkpoint(folder: pathlib.Path):
    return dict(Checkpoint.open(folder).read_layers())


def compare_layers(layers, folder: pathlib.Path, reader: str) -> bool:
    """Compare with what the bytes say; return whether the oracle knew."""
    try:
        honest = oracle.read_layers(folder)
    except oracle.Unsure:
        return False
    except Exception as error:
        raise Failure(f"{reader} reads what the bytes do not say: {type(error).__name__}: {error}") from None
    if set(layers) != set(honest):
        raise Failure(f"{reader} reads the modules {sorted(layers)}; the bytes say {sorted(honest)}")
    for module, layer in layers.items():
        codes, scales, zeros, grid = honest[module]
        if (layer.spec.bits, layer.spec.group_size, layer.spec.symmetric) != tuple(grid):
            raise Failure(f"{reader} reads {module} as {layer.spec}; the bytes say {grid}")
        for what, mine, theirs in (("codes", layer.codes, codes), ("zeros", layer.zeros, zeros)):
            if not np.array_equal(mine.numpy().astype(np.int64), theirs):
                raise Failure(f"{reader} reads other {what} of {module} than the bytes say")
        if layer.scales.contiguous().numpy().tobytes() != np.ascontiguousarray(scales).tobytes():
            raise Failure(f"{reader} reads other scales of {module} than the bytes say")
        if not np.isfinite(scales.astype("f8")).all() or not (scales > 0).all():
            raise Failure(f"{reader} reads {module} with a scale that is no positive number")
    return True


def compare_pairs(pairs, folder: pathlib.Path) -> None:
    try:
        honest = oracle.read_pairs(folder)
    except Exception as error:
        raise Failure(f"read_adapter reads what the bytes do not say: {type(error).__name__}: {error}") from None
    if set(pairs) != set(honest):
        raise Failure(f"read_adapter reads {sorted(pairs)}; the bytes say {sorted(honest)}")
    for module, pair in pairs.items():
        a, b, alpha = honest[module]
        if not np.array_equal(pair.lora_A.to(torch.float64).numpy(), a.astype("f8")):
            raise Failure(f"read_adapter reads another A of {module} than the bytes say")
        if not np.array_equal(pair.lora_B.to(torch.float64).numpy(), b.astype("f8")):
            raise Failure(f"read_adapter reads another B of {module} than the bytes say")
        if pair.alpha != alpha:
            raise Failure(f"read_adapter reads alpha {pair.alpha} for {module}; the bytes say {alpha}")


def same_layers(folder: pathlib.Path, untouched: pathlib.Path) -> bool:
    mine, theirs = oracle.read_layers(folder), oracle.read_layers(untouched)
    return set(mine) == set(theirs) and all(
        all(np.array_equal(a, b) for a, b in zip(mine[module][:3], theirs[module][:3], strict=True)) for module in mine
    )


def expect(case: Case, refusal: CloqError | None, reader: str) -> None:
    if case.expected == mutations.REFUSED and refusal is None:
        raise Failure(f"{reader} reads what must be refused")
    if case.expected == mutations.READ and refusal is not None:
        raise Failure(f"{reader} refuses what is valid: {refusal}")


def run_checkpoint(case: Case, folder: pathlib.Path, untouched: pathlib.Path, counts: collections.Counter) -> None:
    layers, refusal = attempt(read_checkpoint, folder)
    expect(case, refusal, "Checkpoint")
    if layers is not None:
        counts["checkpoints read"] += 1
        counts["not compared"] += not compare_layers(layers, folder, "Checkpoint")
    else:
        counts["checkpoints refused"] += 1
    found, _ = attempt(examine, folder)
    if found is not None:
        json.dumps(found.to_json(), allow_nan=False)
        if found.readable and layers is None and "read_layer" not in str(refusal):
            counts["readable by sample, refused in whole"] += 1
        if not found.readable and layers is not None:
            raise Failure(f"examine says that what is read is not readable: {found.refusal}")
        for suspicion in found.suspicions:
            for text in (suspicion.finding, suspicion.evidence, suspicion.remedy):
                if not text.isprintable() or len(text) > MAX_MESSAGE:
                    raise Failure(f"examine: a text is not one printable line: {text!r:.300}")
    attempt(describe, folder)
    facts, _ = attempt(describe, folder, verify=True)
    if facts is not None and layers is None and facts["kind"] == "checkpoint":
        raise Failure("describe --verify accepts a checkpoint whose layers are refused")
    certified, _ = attempt(verify_certificate, folder)
    if certified is not None:
        counts["certificates repeated"] += 1
        if not same_layers(folder, untouched):
            raise Failure("verify_certificate accepts other layers than were certified")


def run_adapter(case: Case, folder: pathlib.Path, counts: collections.Counter) -> None:
    adapter, refusal = attempt(read_adapter, folder)
    expect(case, refusal, "read_adapter")
    if adapter is not None:
        counts["adapters read"] += 1
        compare_pairs(adapter.pairs, folder)
    else:
        counts["adapters refused"] += 1
    attempt(describe, folder)
    attempt(examine, folder)


def listing(folder: pathlib.Path) -> list[tuple[str, int, int]]:
    return sorted(
        (str(path.relative_to(folder)), path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")
    )


def limit_memory() -> None:
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_MEMORY, resource.RLIM_INFINITY))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int, required=True)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    untouched = options.folder / "originals"
    found = originals.make_originals(untouched)
    for name, original in found.items():
        (untouched / name).mkdir(exist_ok=True)
        for file, data in original.files.items():
            (untouched / name / file).write_bytes(data)
    outside, empty, place = (options.folder / name for name in ("outside", "empty", "case"))
    for made in (outside, empty):
        made.mkdir()
    (outside / "secret").write_text("nobody may read this")
    shutil.copytree(untouched, outside, dirs_exist_ok=True)
    os.chdir(empty)
    for name, original in found.items():  # what is valid is read
        layers = read_checkpoint(untouched / name) if original.kind == "checkpoint" else {}
        if layers and not compare_layers(layers, untouched / name, "Checkpoint"):
            raise Failure(f"the oracle does not know {name}")
        if original.kind == "adapter":
            compare_pairs(read_adapter(untouched / name).pairs, untouched / name)
        elif not examine(untouched / name).readable:
            raise Failure(f"examine does not know {name}")
        if "cloq_certificate.json" in original.files:
            verify_certificate(untouched / name)
        describe(untouched / name)
    quiet = listing(outside), listing(empty), listing(untouched)
    limit_memory()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts: collections.Counter[str] = collections.Counter()
    for number in range(options.first, options.first + options.cases):
        print(json.dumps({"at": number}), flush=True)
        case = Case(options.seed, number, found)
        place.mkdir()
        case.write(place, outside)
        before = listing(place)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            if case.original.kind == "checkpoint":
                run_checkpoint(case, place, untouched / case.name, counts)
            else:
                run_adapter(case, place, counts)
            if listing(place) != before:
                raise Failure("a reader wrote into the folder")
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if peak > resident + EXTRA_RESIDENT:
                resident = peak
                raise Failure(f"memory rose by more than {EXTRA_RESIDENT >> 10} MiB")
        except Exception as error:
            what = str(error) if isinstance(error, Failure) else traceback.format_exc(limit=-4)
            print(
                json.dumps({"case": number, "original": case.name, "mutations": case.applied, "failure": what}),
                flush=True,
            )
            counts["failures"] += 1
        finally:
            faulthandler.cancel_dump_traceback_later()
        for used in case.applied:
            counts[f"mutation {used}"] += 1
        if number % 64 == 0 and (listing(outside), listing(empty), listing(untouched)) != quiet:
            raise SystemExit(f"a reader wrote outside, in one of the 64 cases before {number}")
        shutil.rmtree(place)
    if (listing(outside), listing(empty), listing(untouched)) != quiet:
        raise SystemExit("a reader wrote outside, in one of the last 64 cases")
    print(json.dumps({"counts": counts}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
