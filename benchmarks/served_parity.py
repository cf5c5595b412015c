"""Serve SmolLM2-135M-Instruct at 2, 3 and 4 bits with two adapters in vLLM, measured with `cloq verify`'s own code.

    python benchmarks/served_parity.py --python ENGINE/bin/python
    python benchmarks/served_parity.py --python ENGINE/bin/python --runs 2=RUN2,3=RUN3 --bits 2,3 --dtypes float32

Every width is a default run of `cloq run`, made in --work unless --runs names one, with its own adapter `cloq` and a
copy of it with noise, `noisy1`. In float32 the figures of the gate are absolute, in half precision relative to what the
float model itself loses in that precision. A row is the report of one `cloq verify`, shortened to what the gate is
about; the JSON file is written after every row, and rows that it holds are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from environment import describe_hardware, hardware_line, perturbed_adapters
from rich.console import Console

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.engines.vllm.facts import engine_facts
from cloq_export.files.atomic import write_json
from cloq_export.files.safe_json import read_json
from cloq_export.files.versions import environment
from cloq_export.models.source import DEMO_MODEL
from cloq_export.recipe import DEMO, Recipe
from cloq_export.verbs.export import export as write_export
from cloq_export.verbs.options import ExportOptions
from cloq_export.verbs.run import run as make_run
from cloq_export.verbs.serve import served_adapters
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verify import verify

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "served_parity.json"


def measure(run: Path, reference: str, dtype: str, *, runtime: str = "vllm", **options: Any) -> dict[str, Any]:
    """Return one row: what `cloq verify` reports of a run served with its adapter and a copy with noise.

    Args:
        run: a finished run, or an export with one adapter or more, of which the first is taken.
        reference: the float model.
        dtype: of the served activations.
        runtime: as `cloq verify` names it.
        options: more of `VerifyOptions`.
    """
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="cloq-parity-") as place:
        export = run
        if RunDirectory.is_run(run):
            export = Path(place) / "export"
            write_export(run, ExportOptions(out=export), console=console)
        name, folder = next(iter(served_adapters(export).items()))
        copies = perturbed_adapters(folder, Path(place), 1)
        adapters = (name, *(f"{copy}={where}" for copy, where in copies.items()))
        asked = VerifyOptions(reference=reference, runtime=runtime, dtype=dtype, adapters=adapters, **options)
        return shortened(verify(export, asked, console=console).to_json())


def shortened(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report without plots, modules and answers."""
    served = [row for row in report["numerics"] if row["measured"] == "served"]
    kept = ("layout", "bits", "runtime", "dtype", "passed", "gates", "metrics", "missing")
    conditions = report["conditions"] | {"text": Path(report["conditions"]["text"]).name}
    return {
        **{key: report[key] for key in kept},
        "conditions": conditions,
        "adapters": [adapter["name"] for adapter in report["adapters"]],
        "served": [{key: row[key] for key in ("adapter", "tokens", "max", "mean", "quantiles")} for row in served],
        "perplexity": [
            {key: row[key] for key in ("model", "adapter", "perplexity")} for row in report["quality"]["perplexity"]
        ],
        "greedy": report["greedy"],
        "mixed_batch": report["isolation"],
        "seconds": report["seconds"],
    }


def line_of(row: Mapping[str, Any]) -> str:
    """Return a row of the table for people."""
    metrics = row["metrics"]
    over = metrics["logprob_difference_over_float"]
    mixed = metrics["mixed_batch_difference_max"]
    prompts = sum(each["prompts"] for each in row["greedy"])
    equal = sum(round(each["agreement"] * each["prompts"]) for each in row["greedy"])
    return (
        f"INT{row['bits'][0]} {row['dtype']:9} served-reference max {metrics['logprob_difference_max']:.2e} "
        f"mean {metrics['logprob_difference_mean']:.2e}"
        + (f" ({over:.2f} of float's own)" if over is not None else "")
        + f"  greedy {equal}/{prompts} equal, {metrics['greedy_flips']:.0f} flips  mixed-single {mixed:.2e}  "
        + ("passed" if row["passed"] else "MISSED")
    )


def main() -> None:
    """Measure, print a line for each width and dtype, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", type=Path, help="interpreter of the environment that has vLLM")
    parser.add_argument("--reference", default=DEMO_MODEL, help="the float model")
    parser.add_argument("--runs", default="", help="BITS=FOLDER,... of runs that are there already")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="where missing runs are made")
    parser.add_argument("--bits", default="2,3,4")
    parser.add_argument("--dtypes", default="float32,bfloat16,float16")
    parser.add_argument("--windows", type=int, default=16, help="of 512 tokens")
    parser.add_argument("--prompts", type=int, default=200, help="greedy texts")
    parser.add_argument("--json", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    runs = dict(text.split("=", 1) for text in arguments.runs.split(",") if text)
    hardware = describe_hardware()
    versions = environment() | {"vllm": engine_facts(arguments.python).version}
    print(hardware_line(hardware))
    rows: list[dict[str, Any]] = read_json(arguments.json)["rows"] if arguments.json.exists() else []
    held = {(row["dtype"], str(row["bits"][0])) for row in rows}
    widths = arguments.bits.split(",")
    for bits in widths:
        if bits not in runs:
            runs[bits] = str(arguments.work / f"served-int{bits}")
            make_run(Recipe.from_mapping({**DEMO, "bits": int(bits)}), Path(runs[bits]))
    for dtype, bits in itertools.product(arguments.dtypes.split(","), widths):
        if (dtype, bits) in held:
            continue
        options = {"windows": arguments.windows, "prompts": arguments.prompts, "python": arguments.python}
        rows.append(measure(Path(runs[bits]), arguments.reference, dtype, **options))
        print(line_of(rows[-1]), flush=True)
        write_json(arguments.json, {"rows": rows, "hardware": hardware, "versions": versions})
    if not all(row["passed"] for row in rows):
        sys.exit(3)


if __name__ == "__main__":
    main()
