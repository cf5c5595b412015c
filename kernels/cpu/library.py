"""Load the native CPU library and say what was loaded, or why nothing was."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Imported first so that torch's OpenMP runtime is in the process when the library looks for one; see threads.cpp.

# Another build, for the sanitizers.
LIBRARY_VARIABLE = "CLOQ_EXPORT_CPU_LIBRARY"
LIBRARY = Path(os.environ.get(LIBRARY_VARIABLE) or Path(__file__).parent / "libcloq_cpu.so")
ABI_VERSION = 5
ISA_VARIABLE = "CLOQ_EXPORT_CPU_ISA"
ISAS = ("scalar", "avx2", "avx512", "amx", "neon")

_POINTER, _SIZE, _INT, _TEXT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_char_p


class WeightStructure(ctypes.Structure):
    """`cloq_weight` of cloq_cpu.h."""

    _fields_ = [
        ("words", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("bits", ctypes.c_int64),
    ]


class LoraStructure(ctypes.Structure):
    """`cloq_lora` of cloq_cpu.h."""

    _fields_ = [
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("scaling", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
        ("ends", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("adapters", ctypes.c_int64),
        ("slices", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    ]


_WEIGHT, _LORA = ctypes.POINTER(WeightStructure), ctypes.POINTER(LoraStructure)

# Function -> (result, arguments), in the order of cloq_cpu.h.
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "cloq_abi_version": (_INT, []),
    "cloq_built_isas": (_TEXT, []),
    "cloq_runnable_isas": (_TEXT, []),
    "cloq_isa": (_TEXT, []),
    "cloq_select_isa": (_INT, [_TEXT]),
    "cloq_threading": (_TEXT, []),
    "cloq_pack_rows": (_INT, [_POINTER, _SIZE, _SIZE, _INT, _POINTER, _INT]),
    "cloq_unpack_rows": (None, [_POINTER, _SIZE, _SIZE, _SIZE, _INT, _POINTER, _INT]),
    "cloq_pack_columns": (_INT, [_POINTER, _SIZE, _SIZE, _INT, _POINTER, _INT]),
    "cloq_unpack_columns": (None, [_POINTER, _SIZE, _SIZE, _INT, _POINTER, _INT]),
    "cloq_pack_weight": (None, [_WEIGHT, _POINTER, _POINTER, _INT]),
    "cloq_unpack_weight": (None, [_WEIGHT, _POINTER, _INT]),
    "cloq_dequantize": (None, [_WEIGHT, _SIZE, _SIZE, _INT, _POINTER, _INT]),
    "cloq_linear": (_INT, [_WEIGHT, _POINTER, _SIZE, _INT, _POINTER, _LORA, _INT, _INT, _POINTER, _INT]),
    "cloq_dense_linear": (None, [_POINTER, _INT, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER, _POINTER, _INT]),
    "cloq_linear_input_grad": (None, [_WEIGHT, _POINTER, _SIZE, _INT, _POINTER, _INT]),
}


@functools.cache
def _open() -> tuple[ctypes.CDLL | None, str]:
    """Return the library and "", or None and the reason why there is none."""
    if not LIBRARY.exists():
        return None, (
            f"{LIBRARY.name} was not built: the package was installed without a working C++17 compiler; install one "
            "and install the package again"
        )
    try:
        library = ctypes.CDLL(str(LIBRARY))
        version = library.cloq_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"{LIBRARY.name} cannot be loaded ({error}); install the package again"
    if version != ABI_VERSION:
        return None, (
            f"{LIBRARY.name} has interface version {version}, this package needs {ABI_VERSION}: it is left from "
            "another build; install the package again"
        )
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    _select(library, os.environ.get(ISA_VARIABLE, ""), ISA_VARIABLE)
    return library, ""


def _select(library: ctypes.CDLL, name: str, source: str) -> None:
    if library.cloq_select_isa(name.encode()) == 0:
        return
    runnable = library.cloq_runnable_isas().decode().replace(",", ", ")
    reason = "this build or machine cannot run it" if name in ISAS else "it is unknown"
    raise ValueError(f"{source} is {name!r}, but {reason}; allowed are {runnable}, or nothing for the fastest.")


def load() -> ctypes.CDLL | None:
    """Return the library, or None where there is none.

    Raises:
        ValueError: the environment variable CLOQ_EXPORT_CPU_ISA names an instruction set that cannot be used.
    """
    return _open()[0]


def available() -> bool:
    """Return whether the native library is loaded.

    Raises:
        ValueError: as `load`.
    """
    return load() is not None


def describe() -> str:
    """Return one line: which instruction sets the native library uses and who runs its threads, or why there is none.

    Raises:
        ValueError: as `load`.
    """
    library, reason = _open()
    if library is None:
        return f"CPU kernels: the torch reference, because {reason}."
    built, runnable, isa, threading = (
        getattr(library, name)().decode()
        for name in ("cloq_built_isas", "cloq_runnable_isas", "cloq_isa", "cloq_threading")
    )
    return (
        f"CPU kernels: native, instruction set {isa} (built: {built.replace(',', ' ')}; this machine runs: "
        f"{runnable.replace(',', ' ')}), threads of {threading}."
    )


def runnable_isas() -> tuple[str, ...]:
    """Return the instruction sets that this build has code for and this machine runs, slowest first.

    Raises:
        ValueError: as `load`.
    """
    library = load()
    return () if library is None else tuple(library.cloq_runnable_isas().decode().split(","))


@contextmanager
def select_isa(name: str) -> Iterator[None]:
    """Use one instruction set, and what lies below it, within a `with` block: for tests and benchmarks.

    The choice holds for the whole process, so no other thread should compute meanwhile.

    Args:
        name: one of `runnable_isas()`.

    Raises:
        ValueError: it cannot be used here.
        RuntimeError: there is no native library.
    """
    library, reason = _open()
    if library is None:
        raise RuntimeError(f"no instruction set can be chosen: {reason}.")
    before = library.cloq_isa()
    _select(library, name, "the instruction set")
    try:
        yield
    finally:
        library.cloq_select_isa(before)
