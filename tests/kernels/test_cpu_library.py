"""The native library: what is loaded, how it is chosen, and what happens without it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cloq_export.kernels import bitpack, cpu
from cloq_export.kernels.cpu import library

DESCRIBE = "from cloq_export.kernels import cpu; print(cpu.describe())"


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_a_development_checkout_has_the_library():
    assert cpu.available(), f"{cpu.describe()} Build it with: python setup.py build_ext --inplace"
    assert cpu.runnable_isas()[0] == "scalar"
    assert "instruction set" in cpu.describe()
    assert "OpenMP runtime of the process" in cpu.describe()


def test_the_environment_chooses_the_instruction_set():
    assert "instruction set scalar " in run_python(DESCRIBE, CLOQ_EXPORT_CPU_ISA="scalar").stdout
    result = run_python(DESCRIBE, CLOQ_EXPORT_CPU_ISA="avx9000")
    assert result.returncode == 1
    assert "CLOQ_EXPORT_CPU_ISA is 'avx9000', but it is unknown; allowed are scalar" in result.stderr


def test_an_instruction_set_that_the_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch):
    class Machine:
        def cloq_select_isa(self, name: bytes) -> int:
            return 2

        def cloq_runnable_isas(self) -> bytes:
            return b"scalar,avx2"

    with pytest.raises(
        ValueError, match="the variable is 'amx', but this build or machine cannot run it; allowed are scalar, avx2, or"
    ):
        library._select(Machine(), "amx", "the variable")


def test_the_choice_ends_with_its_block():
    before = cpu.describe()
    with cpu.select_isa("scalar"):
        assert "instruction set scalar " in cpu.describe()
    assert cpu.describe() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "libcloq_cpu.so was not built: the package was installed without a working C\\+\\+17 compiler"),
        (b"not a library", "libcloq_cpu.so cannot be loaded"),
    ],
)
def test_without_a_library_torch_computes_and_says_so(content, message, tmp_path: Path, monkeypatch):
    path = tmp_path / "libcloq_cpu.so"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(library, "LIBRARY", path)
    monkeypatch.setattr(library, "_open", library._open.__wrapped__)
    assert not cpu.available()
    assert cpu.runnable_isas() == ()
    assert cpu.describe().startswith("CPU kernels: the torch reference, because libcloq_cpu.so ")
    with pytest.raises(RuntimeError, match=message), cpu.select_isa("scalar"):
        pass
    codes = torch.arange(8, dtype=torch.uint8).view(1, 8)
    assert bitpack.pack_rows(codes, 4).tolist() == [[0x76543210]]


def test_a_library_of_another_interface_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(library, "ABI_VERSION", 10**6)
    found, reason = library._open.__wrapped__()
    assert found is None
    assert "needs 1000000: it is left from another build" in reason


def test_a_forked_child_computes():
    code = (
        "import os, torch\n"
        "from cloq_export.kernels import bitpack\n"
        "torch.set_num_threads(2)\n"
        "codes = torch.randint(0, 4, (600, 2048), dtype=torch.uint8)\n"
        "words = bitpack.pack_rows(codes, 2)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    torch.set_num_threads(1)\n"
        "    os._exit(0 if torch.equal(bitpack.unpack_rows(words, 2), codes) else 1)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_signatures_name_every_function_of_the_header():
    header = (Path(cpu.__file__).parent / "cloq_cpu.h").read_text(encoding="utf-8")
    declared = {line.split("(")[0].split()[-1].lstrip("*") for line in header.splitlines() if "CLOQ_EXPORT " in line}
    declared.discard("CLOQ_EXPORT")
    functions = {name for name in declared if name.startswith("cloq_")}
    assert functions == set(cpu.library._SIGNATURES)
    assert all(isinstance(getattr(cpu.load(), name), ctypes._CFuncPtr) for name in functions)
