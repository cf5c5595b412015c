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
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from environment import describe_hardware, hardware_line, put_into

GROUP = 64
CHECKED_TOKENS = 4

Cell = dict[str, Any]
Call = Callable[[], Any]


class Problem:
    """One layer and its input, the same in every process: codes, scales, zeros and x from a seed."""

    def __init__(self, out: int, columns: int, tokens: int, bits: int) -> None:
        import numpy

        random = numpy.random.default_rng((out, columns, tokens, bits))
        groups = columns // GROUP
        self.bits, self.out, self.columns, self.tokens = bits, out, columns, tokens
        self.codes = random.integers(0, 1 << bits, (out, columns), dtype=numpy.uint8)
        # Scales that are exact in float16 and bfloat16: every engine then has the same weights.
        self.scales = (random.integers(128, 256, (out, groups)) / 8192).astype(numpy.float32)
        self.zeros = random.integers(0, 1 << bits, (out, groups), dtype=numpy.uint8)
        self.x = random.standard_normal((tokens, columns), dtype=numpy.float32)
        self.x = (self.x.view(numpy.uint32) & 0xFFFF0000).view(numpy.float32)  # exact in bfloat16

    def weight(self) -> Any:
        """Return Q, (out, in) float32, exact."""
        import numpy

        grouped = self.codes.reshape(self.out, -1, GROUP).astype(numpy.float32)
        return ((grouped - self.zeros[..., None]) * self.scales[..., None]).reshape(self.out, self.columns)

    def error(self, y: Any) -> float:
        """Return the relative error of the first tokens of a result, in the Frobenius norm."""
        import numpy

        difference = y[: self.truth.shape[0]].astype(numpy.float64) - self.truth
        return float(numpy.linalg.norm(difference) / numpy.linalg.norm(self.truth))

    @functools.cached_property
    def truth(self) -> Any:
        """Return the first tokens of x Q^T in float64."""
        import numpy

        rows = self.x[: min(self.tokens, CHECKED_TOKENS)].astype(numpy.float64)
        return rows @ self.weight().astype(numpy.float64).T

    def packed_bytes(self) -> int:
        """Return the bytes of codes, float16 scales and zeros of a byte."""
        return self.codes.size * self.bits // 8 + self.scales.size * 3


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


def cloq_cells(problem: Problem, job: dict[str, Any]) -> Iterator[tuple[str, str, str, Call, list[Call]]]:
    """Yield torch's float layers and ours: engine, activations, precision, result, calls to time."""
    import torch

    from cloq_export.kernels.cpu import linear as kernel
    from cloq_export.kernels.cpu import lora as cpu_lora
    from cloq_export.kernels.cpu import weight as cpu_weight

    torch.set_grad_enabled(False)
    x = torch.from_numpy(problem.x)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if problem.bits == job["bits"][0]:  # float layers know no width
        for name, dtype in dtypes.items():
            dense, given = torch.from_numpy(problem.weight()).to(dtype), x.to(dtype)
            call = _bind(torch.nn.functional.linear, given, dense)
            yield "torch", name, "float", _as_numpy(call), [call]
    weight = cpu_weight.pack_weight(
        torch.from_numpy(problem.codes),
        torch.from_numpy(problem.scales).to(torch.float16),
        torch.from_numpy(problem.zeros),
        problem.bits,
    )
    ring: list[Any] = []
    if job["cold_bytes"] and problem.tokens == 1:
        ring = [_copy_of(weight) for _ in range(-(-job["cold_bytes"] // problem.packed_bytes()))]
    lora = cpu_lora.pack_lora(
        torch.zeros(1, job["rank"], problem.columns, dtype=torch.bfloat16),
        torch.zeros(1, problem.out, job["rank"], dtype=torch.bfloat16),
        torch.ones(1),
    )
    for name, dtype in dtypes.items():
        given = x.to(dtype)
        for precision in ("exact", "int8"):
            call = _bind(kernel.linear, given, weight, precision=precision)
            yield "cloq", name, precision, _as_numpy(call), [call]
            if ring:
                calls = [_bind(kernel.linear, given, each, precision=precision) for each in ring]
                yield "cloq cold", name, precision, _as_numpy(call), calls
        call = _bind(kernel.lora_linear, given, weight, None, lora)
        yield f"cloq + rank {job['rank']}", name, "exact", _as_numpy(call), [call]


def vllm_cells(problem: Problem, job: dict[str, Any]) -> Iterator[tuple[str, str, str, Call, list[Call]]]:
    """Yield vLLM's stock int4 kernels, with its own preparation of the weights."""
    if problem.bits != 4:
        return
    import torch
    from vllm.model_executor.kernels.linear.mixed_precision import MPLinearLayerConfig
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
    from vllm.scalar_type import scalar_types

    torch.set_grad_enabled(False)
    torch.cpu._init_amx()  # type: ignore[attr-defined]  # as vLLM's worker does; its kernels crash without it
    out, columns = problem.out, problem.columns
    for precision in ("exact", "int8"):
        os.environ["VLLM_CPU_INT4_W4A8"] = "1" if precision == "int8" else "0"
        layer = torch.nn.Module()
        layer.register_parameter("bias", None)
        shifts = torch.arange(0, 32, 4)
        words = (
            torch.from_numpy(problem.codes).t().reshape(columns // 8, 8, out).to(torch.int64) << shifts[:, None]
        ).sum(1)
        zeros = (torch.from_numpy(problem.zeros).t().reshape(-1, out // 8, 8).to(torch.int64) << shifts).sum(2)
        parts = {
            "qweight": (words.to(torch.int32), {"input_dim": 0, "output_dim": 1, "packed_dim": 0}),
            "qzeros": (zeros.to(torch.int32), {"input_dim": 0, "output_dim": 1, "packed_dim": 1}),
            "scales": (torch.from_numpy(problem.scales).t().contiguous().bfloat16(), {"input_dim": 0, "output_dim": 1}),
        }
        for name, (tensor, attributes) in parts.items():
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            vars(parameter).update(attributes)
            layer.register_parameter(name, parameter)
        config = MPLinearLayerConfig(
            full_weight_shape=(columns, out),
            partition_weight_shape=(columns, out),
            weight_type=scalar_types.uint4,
            act_type=torch.bfloat16,
            group_size=GROUP,
            zero_points=True,
        )
        kernel = CPUWNA16LinearKernel(config, "qweight", "scales", "qzeros")
        kernel.process_weights_after_loading(layer)
        call = _bind(kernel.apply_weights, layer, torch.from_numpy(problem.x).bfloat16())
        yield "vllm", "bfloat16", precision, _as_numpy(call), [call]


def onnxruntime_cells(problem: Problem, job: dict[str, Any]) -> Iterator[tuple[str, str, str, Call, list[Call]]]:
    """Yield ONNX Runtime's MatMulNBits at accuracy levels 1 (float32) and 4 (8-bit activations)."""
    if problem.bits not in (2, 4):
        return
    import numpy
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    def packed(values: Any) -> Any:
        count = 8 // problem.bits
        shifts = numpy.arange(count, dtype=numpy.uint8) * problem.bits
        return numpy.bitwise_or.reduce(values.reshape(-1, count) << shifts, axis=1).astype(numpy.uint8)

    groups = problem.columns // GROUP
    initializers = {
        "b": packed(problem.codes).reshape(problem.out, groups, -1),
        "scales": problem.scales.reshape(-1),
        "zeros": packed(problem.zeros.reshape(problem.out, -1)),
    }
    for level, precision in ((1, "exact"), (4, "int8")):
        node = helper.make_node(
            "MatMulNBits",
            ["x", *initializers],
            ["y"],
            domain="com.microsoft",
            K=problem.columns,
            N=problem.out,
            bits=problem.bits,
            block_size=GROUP,
            accuracy_level=level,
        )
        graph = helper.make_graph(
            [node],
            "layer",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", problem.columns])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", problem.out])],
            [numpy_helper.from_array(value, name) for name, value in initializers.items()],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = job["threads"]
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        call = _bind(session.run, None, {"x": problem.x})
        yield "onnxruntime", "float32", precision, _first(call), [call]


def ggml_cells(problem: Problem, job: dict[str, Any]) -> Iterator[tuple[str, str, str, Call, list[Call]]]:
    """Yield the kernels of llama.cpp for its own grids Q4_1 and Q2_K, which round activations to 8 bits."""
    kind = {4: ("Q4_1", 3), 2: ("Q2_K", 10)}.get(problem.bits)  # the numbers of ggml.h
    if kind is None:
        return
    import ctypes

    import libggml
    import numpy

    class Room(ctypes.Structure):
        _fields_ = [("bytes", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_data", ctypes.c_bool)]

    class Plan(ctypes.Structure):  # its end, which grows from version to version, is not looked at
        _fields_ = [("bytes", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("rest", ctypes.c_uint8 * 128)]

    folder = Path(libggml.__file__).parent / "lib64"
    base, cpu = (ctypes.CDLL(str(folder / f"libggml-{part}.so"), ctypes.RTLD_GLOBAL) for part in ("base", "cpu"))
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64

    def function(library: Any, name: str, result: Any, *arguments: Any) -> Any:
        found = getattr(library, f"ggml_{name}")
        found.restype, found.argtypes = result, arguments
        return found

    function(cpu, "cpu_init", None)()
    problem_bytes = problem.codes.size + 8 * (problem.x.size + problem.tokens * problem.out)
    make = function(base, "init", pointer, Room)
    context = make(Room(problem_bytes + (1 << 24), None, False))
    tensor = function(base, "new_tensor_2d", pointer, pointer, number, size, size)
    data = function(base, "get_data", pointer, pointer)
    weight = tensor(context, kind[1], problem.columns, problem.out)
    dense = numpy.ascontiguousarray(problem.weight())
    quantize = function(base, "quantize_chunk", ctypes.c_size_t, number, pointer, pointer, *[size] * 3, pointer)
    quantize(kind[1], dense.ctypes.data, data(weight), 0, problem.out, problem.columns, None)
    x = tensor(context, 0, problem.columns, problem.tokens)
    ctypes.memmove(data(x), problem.x.ctypes.data, problem.x.nbytes)
    y = function(base, "mul_mat", pointer, pointer, pointer, pointer)(context, weight, x)
    graph = function(base, "new_graph", pointer, pointer)(context)
    function(base, "build_forward_expand", None, pointer, pointer)(graph, y)
    plan = function(cpu, "graph_plan", Plan, pointer, number, pointer)(graph, job["threads"], None)
    work = numpy.empty(plan.bytes + 64, dtype=numpy.uint8)
    plan.memory = work.ctypes.data
    compute = function(cpu, "graph_compute", number, pointer, pointer)
    call = _bind(compute, graph, ctypes.byref(plan))
    result = numpy.ctypeslib.as_array(
        ctypes.cast(data(y), ctypes.POINTER(ctypes.c_float)), (problem.tokens, problem.out)
    )

    def computed() -> Any:
        call()
        return result.copy()

    try:
        yield f"ggml {kind[0]}", "float32", "int8", computed, [call]
    finally:
        function(base, "free", None, pointer)(context)


WORKERS = {"cloq": cloq_cells, "vllm": vllm_cells, "onnxruntime": onnxruntime_cells, "ggml": ggml_cells}
# What a worker needs beside this file, to find out which workers an interpreter can be, and the package that has it.
NEEDS = {
    "vllm": ("vllm", "vllm-cpu"),
    "onnxruntime": ("onnxruntime, onnx", "onnxruntime and onnx"),
    "ggml": ("libggml, numpy", "libggml-python"),
}


def _bind(function: Callable[..., Any], *arguments: Any, **options: Any) -> Call:
    return lambda: function(*arguments, **options)


def _as_numpy(call: Call) -> Call:
    return lambda: call().float().numpy()


def _first(call: Call) -> Call:
    return lambda: call()[0]


def _copy_of(weight: Any) -> Any:
    import dataclasses

    tensors = {name: getattr(weight, name).clone() for name in ("words", "scales", "zeros")}
    return dataclasses.replace(weight, **tensors)


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
    calls = (block.sum, _bind(torch.mv, block, vector))
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
