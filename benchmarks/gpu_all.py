"""Run every GPU test and every GPU benchmark within eight minutes, and write one JSON that names the hardware.

    python benchmarks/gpu_all.py --json benchmarks/results/gpu.json

The parts run one after the other, each in a process of its own with a share of the time; a part that fails or runs out
of its share is recorded as such, the next one runs all the same, and the exit code is 1 at the end. Each writes its
rows as it has them, so one that is cut off counts as far as it came. Before the first one stands, within seconds, what
is wrong with the machine, and parts that cannot run there are left out for it. Without a GPU nothing is measured and
the exit code is 1; `--smoke` runs the parts at toy sizes on the CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from environment import describe_hardware
from gpu_clock import describe_device, device_of

from cloq_export.files.atomic import write_json
from cloq_export.kernels.dispatch import describe_gpu, has_triton
from cloq_export.kernels.gpu import cuda, first_line

# What the largest part holds at most: the default preset of a 7B, see docs/gpu.md.
_MEMORY = 32 << 30
# What another program holds of a card that is said to be free.
_OCCUPIED = 2 << 30
_DISK = 4 << 30
# The weights of a 7B in page-locked memory, and its batches that wait there.
_HOST_MEMORY = 48 << 30
HERE = Path(__file__).resolve().parent
_SHOWN_CHARACTERS = 4000


def parts(smoke: bool) -> dict[str, tuple[list[str], float]]:
    """Return name -> (arguments, seconds): tests first, because a wrong kernel is not worth a time."""
    if smoke:
        shape = ["--shapes", "32x32", "--group", "32", "--bits", "2", "--tokens", "1", "--repeats", "1"]
        return {
            "kernels": ([str(HERE / "kernels_gpu.py"), *shape, "--device", "cpu", "--smoke"], 600.0),
            "training": ([str(HERE / "train_gpu.py"), "--shape", "tiny", "--device", "cpu", "--steps", "2"], 600.0),
            "decoding": ([str(HERE / "decode_gpu.py"), "--shape", "tiny", "--device", "cpu", "--steps", "2"], 600.0),
            "initialisation": ([str(HERE / "gpu_init.py"), "--shapes", "tiny", "--device", "cpu"], 600.0),
        }
    init = [str(HERE / "gpu_init.py"), "--presets"]
    few = ["--bits", "2,4,3", "--tokens", "1,16"]
    return {
        "tests": (["-m", "pytest", "-q", "-m", "gpu and not slow", *gpu_tests()], 80.0),
        "kernels": ([str(HERE / "kernels_gpu.py"), "--shapes", "4096x11008,4096x4096", *few], 110.0),
        "training": ([str(HERE / "train_gpu.py")], 45.0),
        "decoding": ([str(HERE / "decode_gpu.py")], 45.0),
        "initialisation 7b": ([*init, "paper,default", "--shapes", "7b", "--seconds", "30"], 110.0),
        "initialisation 7b in 8 GB": ([*init, "default", "--shapes", "7b", "--seconds", "25", "--memory", "8GB"], 60.0),
        "initialisation 1b": ([*init, "paper,default", "--shapes", "1b", "--seconds", "10"], 30.0),
    }


def gpu_tests() -> list[str]:
    """Return the files with tests for GPUs: collecting all tests would take longer than these do."""
    files = sorted((HERE.parent / "tests").rglob("test_*.py"))
    return [str(file.relative_to(HERE.parent)) for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]


def missing_packages(parts: Sequence[str] = ("pytest", "transformers", "peft")) -> list[str]:
    """Return the packages that the parts need and this environment lacks."""
    return [name for name in parts if importlib.util.find_spec(name) is None]


def launches() -> str:
    """Return why a first kernel does not compute what torch does, in one line; nothing if it does."""
    from cloq_export import kernels
    from cloq_export.kernels.reference import linear as reference

    qweight = torch.arange(256, dtype=torch.int32).view(4, 64)
    qzeros = torch.arange(8, dtype=torch.int32).view(2, 4)
    scales = torch.full((2, 64), 0.5, dtype=torch.float16)
    x = torch.linspace(-1, 1, 64).view(1, 64)
    try:
        found = kernels.packed_linear(x.cuda(), qweight.cuda(), qzeros.cuda(), scales.cuda(), 2).cpu()
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        return f"a first kernel does not run: {first_line(error)}"
    wanted = x @ reference.dequantize(qweight, qzeros, scales, 2).t()
    return "" if torch.allclose(found, wanted, rtol=1e-4, atol=1e-4) else "a first kernel computes wrong numbers"


def machine_faults(device: torch.device) -> dict[str, str]:
    """Return what is wrong with a machine -> the parts that cannot run for it, all, or none where it is only to know.

    Args:
        device: the GPU.
    """
    found: dict[str, str] = {}
    if cuda().capability(device) < (8, 0) or not has_triton():
        found[describe_gpu()] = "kernels"
    elif shutil.which(os.environ.get("CC", "")) is None and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        found["no C compiler is on the PATH, which Triton builds its launchers with; install gcc, or set CC"] = "all"
    elif not Path(sysconfig.get_path("include"), "Python.h").exists():
        found[f"{sysconfig.get_path('include')}/Python.h is missing; install the headers of this Python"] = "all"
    elif wrong := launches():
        found[wrong] = "all"
    free, total = cuda().free_bytes(device), cuda().total_bytes(device)
    if total - free > _OCCUPIED:
        found[f"{(total - free) / 1e9:.0f} GB of the GPU are taken by another program; times will be wrong"] = ""
    if free < _MEMORY:
        found[f"{free / 1e9:.0f} GB of the GPU are free; the 7B takes up to {_MEMORY / 1e9:.0f}"] = "initialisation 7b"
    if missing := missing_packages():
        wanted = {"pytest": ("tests",), "peft": ("training", "decoding"), "transformers": ("initialisation",)}
        found.update({f"{name} is not installed ({part})": part for name in missing for part in wanted[name]})
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if host < _HOST_MEMORY:
        found[f"the host has {host / 1e9:.0f} GB; the 7B takes up to {_HOST_MEMORY / 1e9:.0f}"] = "initialisation 7b"
    if not (HERE.parent / "tests").is_dir():
        found["there is no folder tests/ beside benchmarks/"] = "tests"
    if shutil.disk_usage(tempfile.gettempdir()).free < _DISK:
        found[f"{tempfile.gettempdir()} has less than {_DISK / 1e9:.0f} GB left; name another folder in TMPDIR"] = (
            "initialisation"
        )
    return found


def run_part(arguments: list[str], seconds: float, result: Path) -> dict[str, Any]:
    """Run one part; return what it wrote, how it ended and the end of what it said."""
    command = [sys.executable, *arguments]
    writes = arguments[0] != "-m"
    if writes:
        command += ["--json", str(result)]
    started = time.perf_counter()
    # Libraries that look for something at a hub would wait for a network that is not there.
    places = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": places, "HF_HUB_OFFLINE": "1"}
    # In a file, because a pipe stays open as long as a process lives that the part has started.
    with tempfile.TemporaryFile() as output:
        started_part = subprocess.Popen(
            command, cwd=HERE.parent, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            ended = f"exit code {started_part.wait(seconds)}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds:.0f} s"
            os.killpg(started_part.pid, signal.SIGKILL)
            started_part.wait()
        output.seek(0)
        said = output.read().decode(errors="replace")
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
    if not options.smoke and not cuda().count():
        raise SystemExit(
            f"torch sees no GPU ({cuda().why_none()}); nothing was measured. --smoke shows that the benchmarks work."
        )
    device = device_of("cpu" if options.smoke else "auto")
    faults = {} if options.smoke else machine_faults(device)
    for fault, part in faults.items():
        print(f"!! {fault}{f': {part} cannot run' if part else ''}", flush=True)
    report: dict[str, Any] = {
        "device": describe_device(device),
        "host": describe_hardware(),
        "bitsandbytes": importlib.util.find_spec("bitsandbytes") is not None,
        "faults": faults,
        "parts": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (arguments, seconds)) in enumerate(parts(options.smoke).items()):
            print(f"== {name}", flush=True)
            why = next((fault for fault, part in faults.items() if part == "all" or (part and part in name)), None)
            if why is None:
                report["parts"][name] = run_part(arguments, seconds, Path(folder) / f"{number}.json")
            else:
                report["parts"][name] = {"ended": f"not run: {why}", "seconds": 0.0}
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
