"""Verify healthy exports of a tiny model over layouts, widths, dtypes and runtimes: no gate may be missed.

    python benchmarks/gate_clean_runs.py --json clean.json
    python benchmarks/gate_clean_runs.py --runtimes vllm --python ENGINE/bin/python --json clean.json

Rows are written one by one, and those that the JSON file holds are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from environment import describe_hardware, hardware_line
from gate_subjects import SILENT, Subject, make_subject

from cloq_export.files.atomic import write_json
from cloq_export.files.safe_json import read_json
from cloq_export.files.versions import environment
from cloq_export.parity.report import missed_gates
from cloq_export.verbs.verify import verify

LAYOUTS = "gptq_v2,gptq,compressed_tensors,compressed_tensors_padded,onnx,run"


def fits(layout: str, bits: int, dtype: str, runtime: str) -> bool:
    """Return whether there is such an export, and the runtime serves it."""
    if (layout == "onnx") != (runtime == "onnx") or (layout == "onnx" and dtype != "float32"):
        return False
    # The padded form differs at 3 bits alone, and vLLM reads the dense one.
    return layout != "compressed_tensors_padded" or (bits == 3 and not runtime.startswith("vllm"))


def measure(subject: Subject, place: Path, layout: str, bits: int, **options: Any) -> dict[str, Any]:
    """Return one row.

    Args:
        subject: what is exported.
        place: where exports lie.
        layout: of the export, or "run" for the run directory itself.
        bits: of the codes.
        options: more of `VerifyOptions`.
    """
    folder = place / f"{layout}-{bits}"
    if layout == "run":
        folder = subject.run
    elif not folder.exists():
        subject.export(folder, layout)
    start = time.perf_counter()
    report = verify(folder, subject.options(**options), console=SILENT)
    seconds = time.perf_counter() - start
    metrics = {name: value for name, value in report.metrics.items() if value is not None}
    return {
        "layout": layout,
        "bits": bits,
        "dtype": report.dtype,
        "runtime": report.runtime,
        "passed": report.passed,
        "missed": missed_gates(report),
        "seconds": seconds,
        "metrics": metrics,
        # The smallest error of each module's scale that would have missed the limit.
        "scales_found": {} if report.scales is None else dict(report.scales.found),
    }


def main() -> None:
    """Verify, print a line for each export, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", default=LAYOUTS)
    parser.add_argument("--bits", default="2,3,4")
    parser.add_argument("--dtypes", default="float32,bfloat16,float16")
    parser.add_argument("--runtimes", default="hf", help="hf, onnx, vllm, vllm-server")
    parser.add_argument("--windows", type=int, default=96, help="of 48 tokens; half precision needs 4096 tokens")
    parser.add_argument("--python", type=Path, help="interpreter of the environment that has vLLM")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    hardware = describe_hardware()
    print(hardware_line(hardware))
    rows: list[dict[str, Any]] = read_json(arguments.json)["rows"] if arguments.json.exists() else []
    held = {(row["layout"], row["bits"], row["dtype"], row["runtime"]) for row in rows}
    asked = [arguments.runtimes, arguments.dtypes, arguments.layouts]
    with tempfile.TemporaryDirectory(prefix="cloq-clean-") as name:
        for bits in map(int, arguments.bits.split(",")):
            subject = None
            for runtime, dtype, layout in itertools.product(*(text.split(",") for text in asked)):
                if not fits(layout, bits, dtype, runtime) or (layout, bits, dtype, runtime) in held:
                    continue
                place = Path(name) / str(bits)
                if subject is None:
                    place.mkdir()
                    # Symmetric grids and zeros of at least 1 are not asked for: all layouts hold one run.
                    subject = make_subject(place, bits=bits, seed=bits)
                more = {"runtime": runtime, "dtype": dtype, "python": arguments.python, "windows": arguments.windows}
                rows.append(measure(subject, place, layout, bits, **more))
                row = rows[-1]
                verdict = "passed" if row["passed"] else f"MISSED {row['missed']}"
                found = sorted(row["scales_found"].values())
                finds = f", finds {found[0]:.2%} to {found[-1]:.2%} of a scale" if found else ""
                print(f"{runtime} {dtype} {layout} INT{bits} {row['seconds']:.0f} s {verdict}{finds}", flush=True)
                write_json(arguments.json, {"rows": rows, "hardware": hardware, "versions": environment()})
    print(f"{sum(row['passed'] for row in rows)} of {len(rows)} clean exports pass")
    if not all(row["passed"] for row in rows):
        sys.exit(3)


if __name__ == "__main__":
    main()
