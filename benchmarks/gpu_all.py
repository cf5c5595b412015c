"""Run every GPU test and every GPU benchmark within eight minutes, and write one JSON that names the hardware.

    python benchmarks/gpu_all.py --json benchmarks/results/gpu.json

The parts run one after the other, each in a process of its own with a share of the time; a part that fails or runs out
of its share is recorded as such, the next one runs all the same, and the exit code is 1 at the end. Without a GPU
nothing is measured and the exit code is 1; `--smoke` runs the parts at toy sizes on the CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from environment import describe_hardware
from gpu_clock import describe_device, device_of

from cloq_export.files.atomic import write_json

HERE = Path(__file__).resolve().parent
_SHOWN_CHARACTERS = 4000


def parts(smoke: bool) -> dict[str, tuple[list[str], float]]:
    """Return name -> (arguments, seconds): tests first, because a wrong kernel is not worth a time."""
    if smoke:
        shape = ["--shapes", "32x32", "--group", "32", "--bits", "2", "--tokens", "1", "--repeats", "1"]
        return {
            "kernels": ([str(HERE / "kernels_gpu.py"), *shape, "--device", "cpu", "--smoke"], 600.0),
            "training": ([str(HERE / "train_gpu.py"), "--shape", "tiny", "--device", "cpu", "--steps", "2"], 600.0),
            "initialisation": ([str(HERE / "gpu_init.py"), "--shapes", "tiny", "--device", "cpu"], 600.0),
        }
    init = [str(HERE / "gpu_init.py"), "--presets", "paper,default"]
    return {
        "tests": (["-m", "pytest", "-q", "-m", "gpu and not slow", "tests"], 120.0),
        "kernels": ([str(HERE / "kernels_gpu.py"), "--shapes", "4096x11008,4096x4096"], 110.0),
        "training": ([str(HERE / "train_gpu.py")], 50.0),
        "initialisation 1b": ([*init, "--shapes", "1b", "--seconds", "20"], 70.0),
        "initialisation 7b": ([*init, "--shapes", "7b", "--seconds", "40"], 130.0),
    }


def run_part(arguments: list[str], seconds: float, result: Path) -> dict[str, Any]:
    """Run one part; return what it wrote, how it ended and the end of what it said."""
    command = [sys.executable, *arguments]
    writes = arguments[0] != "-m"
    if writes:
        command += ["--json", str(result)]
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(HERE)}
    try:
        done = subprocess.run(
            command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
        said, ended = done.stdout + done.stderr, f"exit code {done.returncode}"
    except subprocess.TimeoutExpired as stopped:
        said, ended = str(stopped.stdout or ""), f"stopped after {seconds:.0f} s"
    found: dict[str, Any] = {"ended": ended, "seconds": time.perf_counter() - started}
    if writes and result.exists():
        found["result"] = json.loads(result.read_text(encoding="utf-8"))
    if not writes or ended != "exit code 0":
        found["output"] = said[-_SHOWN_CHARACTERS:]
    print(said[-_SHOWN_CHARACTERS:], flush=True)
    return found


def sanitizer(arguments: list[str], seconds: float) -> dict[str, Any]:
    """Run the GPU tests of the kernels under compute-sanitizer where it is installed."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"ended": "compute-sanitizer is not installed"}
    command = [program, "--error-exitcode", "9", sys.executable, *arguments]
    try:
        done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"ended": f"stopped after {seconds:.0f} s"}
    return {"ended": f"exit code {done.returncode}", "output": (done.stdout + done.stderr)[-_SHOWN_CHARACTERS:]}


def main() -> None:
    """Run the parts and write what they gave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="toy sizes on the CPU")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; nothing was measured. --smoke shows that the benchmarks work.")
    device = device_of("cpu" if options.smoke else "auto")
    report: dict[str, Any] = {
        "device": describe_device(device),
        "host": describe_hardware(),
        "bitsandbytes": importlib.util.find_spec("bitsandbytes") is not None,
        "parts": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (arguments, seconds)) in enumerate(parts(options.smoke).items()):
            print(f"== {name}", flush=True)
            report["parts"][name] = run_part(arguments, seconds, Path(folder) / f"{number}.json")
            # Written after every part: what was measured is not lost with the machine.
            write_json(options.json, report, sort_keys=False)
    if not options.smoke:
        tests = ["-m", "pytest", "-q", "-m", "gpu and not slow", "tests/kernels", "-k", "few_tokens or walk"]
        report["compute_sanitizer"] = sanitizer(tests, 30.0)
        write_json(options.json, report, sort_keys=False)
    failed = [name for name, part in report["parts"].items() if part["ended"] != "exit code 0"]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; see {options.json}")


if __name__ == "__main__":
    main()
