"""Build the native library with the address and undefined-behaviour sanitizers and run the kernel tests on it.

    python tests/kernels/sanitized.py

The library is built into a temporary folder, from where `CLOQ_EXPORT_CPU_LIBRARY` has it loaded. The sanitizers' own
library must be in the process before anything else is, hence LD_PRELOAD. Ends with 1 at any finding, and where the
compiler lacks the sanitizers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Python asks for -fwrapv, with which no overflow is undefined, and the compiler takes minutes.
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -fno-wrapv -O1 -g1"
TESTS = ("test_bitpack.py", "test_cpu_linear.py")


def runtime(compiler: str, name: str) -> str:
    """Return the path of a sanitizer's library.

    Raises:
        SystemExit: the compiler has none.
    """
    command = [*compiler.split(), f"-print-file-name={name}"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"{compiler} cannot be run ({error}); install GCC, or name a compiler in CXX.") from None
    if not os.path.isabs(found):
        raise SystemExit(f"{compiler} has no {name}; install its sanitizer libraries (libasan, libubsan).")
    return str(Path(found).resolve())


def main() -> None:
    """Build, run, and report."""
    compiler = os.environ.get("CXX", "g++")
    preload = " ".join(runtime(compiler, name) for name in ("libasan.so", "libubsan.so"))
    with tempfile.TemporaryDirectory(prefix="cloq-sanitized-") as folder:
        environment = os.environ | {"CLOQ_EXPORT_CXXFLAGS": FLAGS}
        build = ["setup.py", "-q", "build_ext", "--force", "--build-lib", folder, "--build-temp", f"{folder}/temp"]
        subprocess.run([sys.executable, *build], cwd=ROOT, env=environment, check=True)
        libraries = list(Path(folder).rglob("libcloq_cpu.so"))
        if not libraries:
            raise SystemExit("the library could not be built with sanitizers; the compiler's message stands above.")
        environment = os.environ | {
            "CLOQ_EXPORT_CPU_LIBRARY": str(libraries[0]),
            "LD_PRELOAD": preload,
            # Python leaves memory to the end of the process, and torch's allocations are none of ours.
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:detect_odr_violation=0",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
            "OMP_NUM_THREADS": "2",
        }
        # Without a library the tests would have nothing to run on, and pass.
        loaded = [sys.executable, "-c", "from cloq_export.kernels.cpu import library; print(library.load()._name)"]
        answer = subprocess.run(loaded, cwd=ROOT, env=environment, capture_output=True, text=True)
        if answer.stdout.strip() != str(libraries[0]):
            raise SystemExit(f"the library that was built with sanitizers cannot be loaded: {answer.stderr[-500:]}")
        tests = [str(ROOT / "tests" / "kernels" / name) for name in TESTS]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", *tests]
        if subprocess.run(command, cwd=ROOT, env=environment).returncode:
            raise SystemExit("the kernel tests failed on the library that was built with sanitizers; see above.")
    print("the kernels are clean under the address and undefined-behaviour sanitizers")


if __name__ == "__main__":
    main()
