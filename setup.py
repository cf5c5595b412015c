"""Maps the folders kernels/ and formats/ to packages of cloq_export, and builds the native CPU library.

The library is plain C++17 behind a C interface, loaded with ctypes: it links neither Python nor torch, so one wheel
serves every Python and every torch. Each instruction set is a translation unit with its own compiler flags. A compiler
that lacks a flag leaves that variant out; without a compiler nothing is built, the package says so at run time
(`cloq_export.kernels.cpu.describe()`) and computes with torch.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

MAPPED = ("kernels", "formats")
NATIVE = Path("kernels/cpu")
# The source that must know which of the others there are.
CHOOSING = "kernels/cpu/dispatch.cpp"
LIBRARY = "libcloq_cpu.so"

FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-g0", "-Wall", "-Wextra"),
    # Where a product and a sum become one instruction is written in the code: what a token gets must not depend on
    # which copy of a loop the compiler found worth it.
    "-ffp-contract=off",
    # GCC's own headers of AVX-512 begin with values that they leave undefined on purpose.
    *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2")
_AVX512 = (
    *_AVX2,
    *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx512vbmi", "-mavx512vnni", "-mavx512bf16"),
    "-mprefer-vector-width=512",
)
# Suffix of a source file -> its flags; sources without such a suffix are built for any machine.
ISA_FLAGS = {
    "avx2": _AVX2,
    "avx512": _AVX512,
    "amx": (*_AVX512, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    # Every 64-bit Arm processor has it.
    "neon": (),
}
# Names of a machine -> the instruction sets of its family.
FAMILIES = {("x86_64", "amd64"): ("avx2", "avx512", "amx"), ("aarch64", "arm64"): ("neon",)}


def sources() -> list[str]:
    """Return the C++ files that this machine's processor family can use."""
    machine = platform.machine().lower()
    isas = next((isas for names, isas in FAMILIES.items() if machine in names), ())
    found = sorted(path.as_posix() for path in NATIVE.glob("*.cpp"))
    return [source for source in found if _isa_of(source) in (None, *isas)]


def _isa_of(source: str) -> str | None:
    suffix = Path(source).stem.rpartition("_")[2]
    return suffix if suffix in ISA_FLAGS else None


class BuildNative(build_ext):
    """Compiles every source with the flags of its instruction set, and links a library without Python."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the name that `kernels/cpu/library.py` opens, the same on every platform."""
        return os.path.join(*fullname.split(".")[:-1], LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        """Compile and link; a failure is reported by the caller, because the extension is optional."""
        target = Path(self.get_ext_fullpath(ext.name))
        inputs = [Path(name) for name in (*ext.sources, *ext.depends)]
        if not self.force and target.exists() and all(p.stat().st_mtime < target.stat().st_mtime for p in inputs):
            return
        if self.compiler.compiler_type != "unix":
            raise CompileError(f"the {self.compiler.compiler_type} compiler is not supported; use GCC or Clang")
        extra = shlex.split(os.environ.get("CLOQ_EXPORT_CXXFLAGS", ""))
        built: set[str] = set()
        objects: list[str] = []
        # Beside each other: a source takes up to a minute. Those of any machine hold the slowest.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiling = {
                isa: [
                    pool.submit(self._compile, source, [*ISA_FLAGS.get(isa or "", ()), *extra])
                    for source in ext.sources
                    if _isa_of(source) == isa and source != CHOOSING
                ]
                for isa in (None, *ISA_FLAGS)
            }
        objects += [one.result() for one in compiling.pop(None)]
        for isa, variants in compiling.items():
            try:
                objects += [variant.result() for variant in variants]
            except CompileError as error:
                # A level builds on those below it, so what comes after is left out too.
                self.warn(f"the kernels from {isa} upward are left out: {error}")
                break
            if variants:
                built.add(isa)
        macros: list[tuple[str, str | None]] = [(f"CLOQ_HAVE_{isa.upper()}", "1") for isa in sorted(built)]
        objects.append(self._compile(CHOOSING, extra, macros))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Linked beside its place and moved, because a running process may have the old file mapped.
        partial = target.with_name(f".{target.name}.partial")
        self.compiler.link_shared_object(
            objects, str(partial), extra_postargs=["-pthread", *extra], libraries=_libraries(), target_lang="c++"
        )
        partial.replace(target)

    def _compile(self, source: str, flags: list[str], macros: list[tuple[str, str | None]] | None = None) -> str:
        objects = self.compiler.compile(
            [source], output_dir=self.build_temp, macros=macros, extra_postargs=[*FLAGS, *flags]
        )
        return objects[0]


def _libraries() -> list[str]:
    return ["dl"] if platform.system() == "Linux" else []


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel for its platform only: the library knows no Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return py3-none-PLATFORM, or py3-none-any if no library was built."""
        built = any(Path(self.bdist_dir).rglob(LIBRARY)) if self.bdist_dir else False
        return "py3", "none", super().get_tag()[2] if built else "any"


setup(
    packages=find_packages(include=["cloq_export", "cloq_export.*"])
    + [f"cloq_export.{name}" for folder in MAPPED for name in find_packages(include=[folder, f"{folder}.*"])],
    package_dir={f"cloq_export.{folder}": folder for folder in MAPPED},
    package_data={
        "": [
            "py.typed",
            "*.md",
            "*.json",
            "*.yaml",
            "*.jinja",
            "named/*.yaml",
            "recipes/compare/*.yaml",
            "recipes/frontier/*.yaml",
            "*.cpp",
            "*.h",
            "golden/**/*",
            "golden/*",
        ]
    },
    # The kernels read words as bytes and the other way round, so they are built for little-endian machines only.
    ext_modules=[
        Extension(
            "cloq_export.kernels.cpu.libcloq_cpu",
            sources(),
            depends=[path.as_posix() for path in sorted(NATIVE.glob("*.h"))],
            language="c++",
            optional=True,
        )
    ]
    if sys.byteorder == "little"
    else [],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
)
