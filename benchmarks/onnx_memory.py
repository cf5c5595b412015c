"""Memory of the surgery that turns a float ONNX graph into a quantized one, beside the graph's largest tensor.

    python benchmarks/onnx_memory.py RUN --json benchmarks/results/onnx_memory.json

The float graph is made first, by an exporter that holds the model, in a process of its own. The surgery then runs in a
fresh process, whose anonymous memory (what it allocates; pages of mapped files are the system's to drop) is sampled.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from environment import describe_hardware, hardware_line

from cloq_export.files.atomic import write_json

STYLES = ("matmulnbits", "qdq")


def anonymous_bytes() -> int:
    """Return the anonymous memory that this process holds (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no line RssAnon; this benchmark needs Linux")


@contextlib.contextmanager
def sampled_peak() -> Iterator[list[int]]:
    """Give a list that holds, at the end, the largest anonymous memory of every 2 ms in between, less that before."""
    start, stop = anonymous_bytes(), threading.Event()
    peak = [0]

    def sample() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes() - start)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield peak
    finally:
        stop.set()
        sampler.join()


def make_float_graph(run: Path, place: Path) -> None:
    """Write the float graph of a run's dequantized base to `place`, and say where in `graph.json`."""
    import torch

    from cloq_export.artifact.checkpoint_writer import FloatPart, LayerSource
    from cloq_export.artifact.merged import MergedAdapter, export_merged
    from cloq_export.artifact.run_directory import RunDirectory
    from cloq_export.engines.onnx.float_graph import build_graph
    from cloq_export.files.fingerprint import base_fingerprint
    from cloq_export.models.saving import save_source_files
    from cloq_export.models.source import open_model

    directory = RunDirectory.open(run)
    layers = LayerSource.of_run(directory)
    loaded = open_model(directory.recipe.model, dtype=torch.float32)
    floats = FloatPart.of_model(loaded.model, layers, save_files=lambda folder: save_source_files(loaded, folder))
    fingerprint = base_fingerprint((name, layers.read(name)) for name in layers.specs)
    export_merged(place / "model", layers, floats, MergedAdapter(), dtype=torch.float32)
    graph = build_graph(place / "model", place, {shape[0] for shape in layers.shapes.values()})
    (place / "graph.json").write_text(json.dumps({"path": str(graph.path), "fingerprint": fingerprint}))


def operate(run: Path, place: Path, style: str) -> dict[str, Any]:
    """Quantize the float graph in `place` and return the memory that it took."""
    import onnx_ir

    from cloq_export.artifact.checkpoint_writer import LayerSource
    from cloq_export.artifact.run_directory import RunDirectory
    from cloq_export.formats.onnx.graph import quantize_graph
    from cloq_export.formats.onnx.matching import GraphLayers
    from cloq_export.formats.onnx.record import GraphOptions

    made = json.loads((place / "graph.json").read_text())
    layers = LayerSource.of_run(RunDirectory.open(run))
    out = place / style
    out.mkdir()
    started = time.perf_counter()
    with sampled_peak() as peak:
        quantize_graph(
            Path(made["path"]),
            out,
            GraphLayers(layers.specs, layers.shapes, layers.read),
            GraphOptions(style=style),  # type: ignore[arg-type]
            base_fingerprint=made["fingerprint"],
            exporter="builder",
        )
    tensors = onnx_ir.load(made["path"]).graph.initializers.values()
    sizes = [value.const_value.nbytes for value in tensors if value.const_value is not None]
    return {
        "style": style,
        "peak_bytes": peak[0],
        "largest_tensor_bytes": max(sizes),
        "float_graph_bytes": sum(sizes),
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    """Measure each style, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("--part", nargs=2, metavar=("STYLE", "PLACE"), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.part:
        style, place = options.part[0], Path(options.part[1])
        if style == "graph":
            make_float_graph(options.run, place)
        else:
            print(json.dumps(operate(options.run, place, style)))
        return
    rows: list[dict[str, Any]] = []
    hardware = describe_hardware()
    print(hardware_line(hardware))
    with tempfile.TemporaryDirectory(prefix="cloq-onnx-memory-") as folder:
        for part in ("graph", *STYLES):
            words = [sys.executable, __file__, str(options.run), "--part", part, folder]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            if part == "graph":
                continue
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(
                f"{part:12} {rows[-1]['peak_bytes'] / 1e6:6.0f} MB at its peak; the float graph has "
                f"{rows[-1]['float_graph_bytes'] / 1e6:.0f} MB, its largest tensor "
                f"{rows[-1]['largest_tensor_bytes'] / 1e6:.0f} MB"
            )
    if options.json:
        write_json(options.json, {"rows": rows, "hardware": hardware}, sort_keys=False)


if __name__ == "__main__":
    main()
