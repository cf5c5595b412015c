"""Kernels for 64-bit Arm, built by a cross compiler and run under an emulator: right, and how many instructions."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
NATIVE = platform.machine() == "aarch64"
PROBE = "tests/kernels/probes/every_isa.cpp"


@pytest.fixture(scope="session")
def build() -> Any:
    """Return setup.py, which knows sources and flags; nothing is built by importing it."""
    spec = importlib.util.spec_from_file_location("cloq_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **options: None)
        patch.chdir(ROOT)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def probe(build: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return a command that runs the probe of all instruction sets on, or as if on, a 64-bit Arm machine."""
    compiler = "c++" if NATIVE else COMPILER
    missing = [tool for tool in (compiler, *([] if NATIVE else [EMULATOR])) if shutil.which(tool) is None]
    if missing:
        what = f"{', '.join(missing)} missing; `make slow` installs g++-aarch64-linux-gnu and qemu-user on Debian"
        # Where there are packages for it, it was to be installed.
        (pytest.fail if shutil.which("apt-get") else pytest.skip)(what)
    place = tmp_path_factory.mktemp("aarch64") / "every_isa"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("platform.machine", lambda: "aarch64")
        patch.chdir(ROOT)
        sources = build.sources()
    assert [source for source in sources if source.endswith("linear_neon.cpp")]
    assert not [source for source in sources if "avx" in source or "amx" in source]
    flags = [flag for flag in build.FLAGS if flag not in ("-fPIC", "-Wno-maybe-uninitialized")]
    command = [compiler, *flags, "-Werror", *([] if NATIVE else ["-static"]), "-DCLOQ_HAVE_NEON=1", "-Ikernels/cpu"]

    def run(*more: str) -> None:
        done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr

    objects = {source: f"{place}-{number}.o" for number, source in enumerate([*sources, PROBE])}
    # Beside each other: one of them takes longer than all the rest.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source: run("-c", source, "-o", objects[source]), objects))
    run(*objects.values(), "-pthread", "-o", str(place))
    return [str(place)] if NATIVE else [EMULATOR, str(place)]


def test_every_result_is_right(probe: list[str]) -> None:
    done = subprocess.run(probe, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines() == ["scalar: 0 faults", "neon: 0 faults"]


@pytest.mark.skipif(NATIVE, reason="the emulator counts instructions")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_vectors_take_fewer_instructions(probe: list[str], bits: int, tmp_path: Path) -> None:
    per_weight = {}
    for isa in ("scalar", "neon"):
        counts = []
        for times in (1, 2):
            log = tmp_path / f"{isa}-{times}"
            # One instruction to a block, and a line for each block that is run.
            trace = ["-singlestep", "-d", "nochain,exec", "-D", str(log)]
            words = [probe[0], *trace, probe[1], isa, str(bits), "1", str(times)]
            subprocess.run(words, check=True, timeout=600)
            with open(log, "rb") as lines:
                counts.append(sum(1 for _ in lines))
        per_weight[isa] = (counts[1] - counts[0]) / (64 * 256)
    print(f"INT{bits}: {per_weight['neon']:.2f} instructions per weight, {per_weight['scalar']:.2f} scalar")
    # The compiler makes vectors of the scalar code too.
    assert per_weight["neon"] < 0.8 * per_weight["scalar"]
