"""Other quantizers, each run from its own package in an environment of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cloq_export.files.safe_json import read_json
from cloq_export.process.progress import show_waiting

_WORKERS = Path(__file__).with_name("peer_workers")
_SHOWN_CHARACTERS = 300
_HOURS = 6.0


class PeerError(Exception):
    """A peer could not be installed, or did not make a checkpoint; the message is for a row of a table."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another quantizer.

    Args:
        worker: script in `peer_workers` that runs it.
        packages: what is installed besides torch, with versions.
        adapters: whether it makes adapters.
    """

    worker: str
    packages: tuple[str, ...]
    adapters: bool = False


PEERS: dict[str, Peer] = {
    "autoround": Peer("autoround.py", ("auto-round==0.16.1",)),
    "gptqmodel": Peer("gptqmodel_gptq.py", ("gptqmodel==7.3.2", "requests")),
    "gptqmodel-eora": Peer("gptqmodel_gptq.py", ("gptqmodel==7.3.2", "requests"), adapters=True),
}


def run_peer(name: str, job: Mapping[str, Any], environments: Path, place: Path, *, console: Console) -> dict[str, Any]:
    """Run a peer on a job, its environment made on first use.

    Args:
        name: in `PEERS`.
        job: "model" (a folder), "bits", "group_size", "rank", "seed", "windows" (token ids of the calibration windows),
            "out" (folder for what it makes).
        environments: folder of the peers' environments; peers of the same packages share one.
        place: folder for the job and the log.
        console: where progress goes.

    Returns:
        dict: "checkpoint" and perhaps "adapter" (folders), "seconds", "memory_beyond_model_bytes", "versions".

    Raises:
        PeerError: it cannot be installed, or failed; the log's last line is quoted.
    """
    peer = PEERS[name]
    python = _environment(peer, environments, console)
    place.mkdir(parents=True, exist_ok=True)
    job_file, result, log = place / "job.json", place / "result.json", place / "log.txt"
    job_file.write_text(json.dumps(job), encoding="utf-8")
    result.unlink(missing_ok=True)
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    command = [str(python), str(_WORKERS / peer.worker), str(job_file), str(result)]
    with show_waiting(f"{name} is at work; its log is {log}", console), log.open("w", encoding="utf-8") as sink:
        try:
            code = subprocess.run(
                command, cwd=place, env=clean, stdout=sink, stderr=subprocess.STDOUT, timeout=3600 * _HOURS
            ).returncode
        except subprocess.TimeoutExpired:
            raise PeerError(f"gave no result within {_HOURS:g} hours (the log is {log})") from None
    if code or not result.exists():
        raise PeerError(f"failed with exit code {code}: {_last_line(log)} (the log is {log})")
    return read_json(result)


def _environment(peer: Peer, environments: Path, console: Console) -> Path:
    """Return the interpreter of a peer's environment."""
    folder = environments / "-".join(package.partition("==")[0] for package in peer.packages)
    python, made = folder / "bin" / "python", folder / ".made"
    if made.exists():
        return python
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "install.log"
    # The same torch is installed first: an open version range may fetch a build of several gigabytes.
    own = torch.__version__.partition("+")[0]
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    steps = [[sys.executable, "-m", "venv", str(folder)], [*pip, f"torch=={own}"], [*pip, *peer.packages]]
    what = f"installing {', '.join(peer.packages)} in {folder}"
    with show_waiting(what, console), log.open("w", encoding="utf-8") as sink:
        for step in steps:
            try:
                code = subprocess.run(step, stdout=sink, stderr=subprocess.STDOUT).returncode
            except OSError as error:
                raise PeerError(f"could not be installed: {error}") from None
            if code:
                sink.flush()
                raise PeerError(f"could not be installed: {_last_line(log)} (the log is {log})")
    made.touch()
    return python


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:_SHOWN_CHARACTERS] if lines else "it said nothing"
