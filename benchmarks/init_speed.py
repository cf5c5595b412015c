"""Time calibrate + quantize + adapt against GPTQModel, on the same CPU, model and tokens, in one run.

Both sides take turns, each time in a fresh process with its own interpreter. What is timed on either side starts at
token ids and ends when the last layer is solved: see `measure_ours` and `measure_peer`. Reading the model, importing,
packing and writing files are outside.

    python benchmarks/init_speed.py --json benchmarks/results/init_speed.json
    python benchmarks/init_speed.py --peer-python OTHER_VENV/bin/python --bits 2,3,4 --presets default --repeats 5

This file is run by the peer's interpreter too, so nothing but the standard library is imported at the top.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

from environment import describe_hardware, model_folder, put_into
from init_speed_tables import PEER, PEER_VERSION, markdown, paired_ratios, show

TORCH = "torch==2.13.0"
ROOT = Path(__file__).resolve().parents[1]
PEER_VENV = ROOT / ".venv-gptqmodel"
# Options of the command line that say nothing about what was measured.
_NOT_MEASURED = ("json", "worker", "markdown", "into", "peer_python")


class Stopwatch:
    """Wall time, and peak resident memory beyond what the process holds when the watch starts."""

    def __init__(self) -> None:
        gc.collect()
        _return_freed_memory()
        self._before = _status_bytes("VmRSS")
        # Linux forgets the peak so far, so that reading the model does not count.
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            self._before = None
        self._started = time.perf_counter()

    def stop(self) -> tuple[float, int | None]:
        """Return seconds, and bytes beyond the start (None where the system does not tell)."""
        seconds = time.perf_counter() - self._started
        peak = _status_bytes("VmHWM")
        return seconds, None if self._before is None or peak is None else max(0, peak - self._before)


def _return_freed_memory() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


class _LastLayerSolved(Exception):
    """Ends the pipeline after what is timed."""


def measure_ours(job: dict[str, Any]) -> dict[str, Any]:
    """Run this package's pipeline up to the last solved layer.

    Timed: the walk over the blocks (`BlockWalk`), from the token windows to the last layer's codes, scales, zeros,
    adapter and certificate; less the time in which finished layers are written to the run directory.
    """
    import torch

    from cloq_export.compress import strategies
    from cloq_export.compress.walk import BlockWalk
    from cloq_export.recipe import Recipe
    from cloq_export.verbs.run import run

    result: dict[str, Any] = {}

    class TimedWalk(BlockWalk):
        def __init__(self, compression: Any, *arguments: Any, **options: Any) -> None:
            if compression.windows.solving.tolist() != job["windows"]:
                raise SystemExit("the pipeline drew other windows than the peer is given")
            _touch(compression.model)
            self._watch = Stopwatch()
            super().__init__(compression, *arguments, **options)

        def run(self) -> None:
            super().run()
            seconds, peak = self._watch.stop()
            result.update(
                seconds=seconds - self.seconds.write,
                peak_bytes_beyond_model=peak,
                arithmetic="bfloat16 products" if self._stream.rounds_inputs else "float32",
                threads=torch.get_num_threads(),
                stages={
                    "forward and statistics": self.seconds.forward_and_statistics,
                    "solve": self.seconds.solve,
                    "write (not counted)": self.seconds.write,
                },
            )
            raise _LastLayerSolved

    strategies.BlockWalk = TimedWalk  # type: ignore[attr-defined,assignment]
    # The text to measure on is never reached, but it is opened beforehand.
    recipe = Recipe.from_mapping({**job["recipe"], "eval_text": "embedded"}, preset=job["preset"])
    with tempfile.TemporaryDirectory(dir=job["folder"]) as folder:
        try:
            run(recipe, Path(folder) / "run")
        except _LastLayerSolved:
            return result
    raise SystemExit("the pipeline ended without walking the blocks")


def measure_peer(job: dict[str, Any]) -> dict[str, Any]:
    """Run GPTQModel's quantization with its defaults, on the same token ids.

    Timed: `model.quantize(...)`, less the time in which it makes and packs its quantized modules, which falls between
    two layers because it is asked to finish one layer before the next. Its model stays in memory, so nothing is
    written to disk. Its damping, symmetric grid and activation order are its own defaults; it makes no adapter.
    """
    _do_without_torchvision()
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.looper.gptq_processor import GPTQProcessor

    spans: list[tuple[float, float]] = []
    finalize = GPTQProcessor.submodule_finalize

    def timed_finalize(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return finalize(*arguments, **options)
        finally:
            spans.append((started, time.perf_counter()))

    GPTQProcessor.submodule_finalize = timed_finalize
    config = QuantizeConfig(
        bits=job["recipe"]["bits"],
        group_size=job["recipe"]["group_size"],
        device="cpu",
        offload_to_disk=False,
        wait_for_submodule_finalizers=True,
    )
    dtype = job["peer_dtype"]
    options = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
    model = GPTQModel.load(job["recipe"]["model"], config, **options)
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.model.parameters()}
    calibration = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job["windows"]]
    _touch(model.model)
    watch = Stopwatch()
    model.quantize(calibration, batch_size=job["peer_batch"])
    seconds, peak = watch.stop()
    if not spans:
        raise SystemExit(f"this {PEER} packs elsewhere than in submodule_finalize; the benchmark knows {PEER_VERSION}")
    return {
        "seconds": seconds - _union(spans),
        "seconds_with_packing": seconds,
        "peak_bytes_beyond_model": peak,
        "arithmetic": "/".join(sorted(dtypes)),
        "threads": torch.get_num_threads(),
        "stages": {"make and pack modules (not counted)": _union(spans)},
    }


def _do_without_torchvision() -> None:
    """Let GPTQModel be imported without torchvision, which it does not require but imports for one vision model."""
    try:
        import torchvision  # noqa: F401
    except Exception:  # a build for another torch raises whatever it likes
        stand_in = types.ModuleType("gptqmodel.models.definitions.internvl_chat")
        stand_in.InternVLChatQModel = type("InternVLChatQModel", (), {})  # type: ignore[attr-defined,assignment]
        sys.modules[stand_in.__name__] = stand_in


def _touch(model: Any) -> None:
    """Read every weight once: pages of a mapped file count as memory only from then on."""
    for parameter in model.parameters():
        float(parameter.detach().sum())


def _union(spans: list[tuple[float, float]]) -> float:
    """Return the length of a union of intervals: threads that work at once are counted once."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """Make what both sides are given: the model as a folder, and the token ids of the calibration windows."""
    from transformers import AutoTokenizer

    from cloq_export.files.versions import environment
    from cloq_export.texts.corpora import load_text, sample_windows, tokenize_text

    folder = model_folder(job["model"], Path(job["folder"]) / "model")
    text = load_text(job["calibration"])
    ids = tokenize_text(AutoTokenizer.from_pretrained(folder), text.text)
    windows = sample_windows(ids, job["samples"], job["seqlen"], job["seed"])
    return {
        "model": str(folder),
        "windows": windows.tolist(),
        "calibration": {"text": job["calibration"], "sha256": text.sha256},
        "versions": environment(),
    }


def peer_versions(job: dict[str, Any]) -> dict[str, Any]:
    """Return what the peer's environment holds."""
    import importlib.metadata as metadata
    import platform

    found = {"python": platform.python_version()}
    for package in ("gptqmodel", "torch", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            raise SystemExit(f"{sys.executable} has no {package}; install {PEER.lower()}=={PEER_VERSION}") from None
    return found


WORKERS = {"prepare": prepare, "versions": peer_versions, "ours": measure_ours, "peer": measure_peer}


def call_worker(name: str, python: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a worker in a fresh process of an interpreter; return what it found.

    Raises:
        SystemExit: the worker failed; the end of its output is shown.
    """
    job_file, result_file, log_file = (folder / f"{name}.{suffix}" for suffix in ("job.json", "result.json", "log"))
    job_file.write_text(json.dumps(job), encoding="utf-8")
    result_file.unlink(missing_ok=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # a comparison on the CPU
    command = [python, str(Path(__file__).resolve()), "--worker", name, str(job_file), str(result_file)]
    cwd = folder if name == "peer" else None  # GPTQModel leaves a folder of logs wherever it is called
    with log_file.open("w", encoding="utf-8") as log:
        code = subprocess.run(command, cwd=cwd, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    if code or not result_file.exists():
        tail = log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
        raise SystemExit("\n".join([f"the worker {name!r} failed with exit code {code}; its last lines:", *tail]))
    return json.loads(result_file.read_text(encoding="utf-8"))


def make_peer_venv() -> str:
    """Return the interpreter of `.venv-gptqmodel`, made on first use."""
    python = PEER_VENV / "bin" / "python"
    if not (PEER_VENV / ".made").exists():
        print(f"making {PEER_VENV.name} with {TORCH} and {PEER.lower()}=={PEER_VERSION}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(PEER_VENV)], check=True)
        (PEER_VENV / ".gitignore").write_text("*\n", encoding="utf-8")
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        # torch first and pinned, as in the Makefile: an open range may bring a build of several gigabytes.
        subprocess.run([*pip, TORCH], check=True)
        subprocess.run([*pip, TORCH, f"{PEER.lower()}=={PEER_VERSION}"], check=True)
        (PEER_VENV / ".made").touch()
    return str(python)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-demo", help="as in `cloq run` (default: %(default)s)")
    parser.add_argument("--calibration", default="wikitext2", help="as in `cloq run` (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=40, help="windows (default: %(default)s)")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens in a window (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the windows (default: %(default)s)")
    parser.add_argument("--bits", default="3", help="widths, separated by commas (default: %(default)s)")
    parser.add_argument("--presets", default="default,paper", help="ours to time (default: %(default)s)")
    parser.add_argument("--group-size", type=int, default=64, help="of both sides (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=64, help="of our adapter (default: %(default)s)")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"), help="of ours")
    parser.add_argument("--repeats", type=int, default=5, help="of every pair (default: %(default)s)")
    parser.add_argument("--peer-python", help="interpreter with gptqmodel; default: .venv-gptqmodel, made on first use")
    parser.add_argument("--peer-dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: its own")
    parser.add_argument("--peer-batch", type=int, default=4, help="windows in its forward pass (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for every figure")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="render a result file and end")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="with --markdown: put it between the page's marks")
    parser.add_argument("--worker", nargs=3, metavar=("NAME", "JOB", "RESULT"), help=argparse.SUPPRESS)
    return parser.parse_args()


def run_benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Run both sides in turns; return the report."""
    from cloq_export.files.atomic import write_json

    peer_python = options.peer_python or make_peer_venv()
    # Not resolved: in a virtual environment the interpreter is a link, and the link is what finds the packages.
    peer_python = os.path.abspath(peer_python)
    with tempfile.TemporaryDirectory(prefix="cloq-init-speed-") as temporary:
        folder = Path(temporary)
        theirs = call_worker("versions", peer_python, {}, folder)
        job: dict[str, Any] = {"folder": temporary}
        for name in ("model", "calibration", "samples", "seqlen", "seed"):
            job[name] = getattr(options, name)
        given = call_worker("prepare", sys.executable, job, folder)
        report: dict[str, Any] = {
            "hardware": describe_hardware(),
            "versions": {"ours": given.pop("versions"), "peer": theirs},
            "model": options.model,
            "calibration": given["calibration"],
            "options": {name: value for name, value in vars(options).items() if name not in _NOT_MEASURED},
            "rows": [],
            "ratio": [],
        }
        turns = [("cloq_export", preset) for preset in _listed(options.presets)]
        turns.insert(1, (PEER, "its defaults"))  # next to as many of ours as possible
        for repeat in range(options.repeats):
            for bits in map(int, _listed(options.bits)):
                for engine, preset in turns:
                    recipe = {name: getattr(options, name) for name in ("samples", "seqlen", "seed", "calibration")}
                    recipe |= {"model": given["model"], "bits": bits, "group_size": options.group_size}
                    recipe |= {"rank": options.rank, "precision": options.precision, "device": "cpu"}
                    work = {"folder": temporary, "preset": preset, "recipe": recipe, "windows": given["windows"]}
                    work |= {"peer_dtype": options.peer_dtype, "peer_batch": options.peer_batch}
                    worker, python = ("peer", peer_python) if engine == PEER else ("ours", sys.executable)
                    row = {
                        "engine": engine,
                        "preset": preset,
                        "bits": bits,
                        "tokens": options.samples * options.seqlen,
                        "repeat": repeat,
                        **call_worker(worker, python, work, folder),
                    }
                    report["rows"].append(row)
                    report["ratio"] = paired_ratios(report["rows"])
                    print(f"INT{bits} {engine} ({preset}), repeat {repeat}: {row['seconds']:.1f} s", file=sys.stderr)
                    if options.json:
                        write_json(options.json, report, sort_keys=False)
    return report


def main() -> None:
    """Run a worker, or the benchmark."""
    options = parse_arguments()
    if options.worker:
        name, job_file, result_file = options.worker
        result = WORKERS[name](json.loads(Path(job_file).read_text(encoding="utf-8")))
        Path(result_file).write_text(json.dumps(result), encoding="utf-8")
        return
    if options.markdown:
        put_into(options.into, "init_speed", markdown(json.loads(options.markdown.read_text(encoding="utf-8"))))
        return
    show(run_benchmark(options))


if __name__ == "__main__":
    main()
