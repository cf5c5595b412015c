"""The native CPU library: C++ behind a small C interface, one build for every torch and Python version.

`cloq_cpu.h` is the interface, `dispatch.cpp` picks the instruction set, `library.py` loads and describes it. Where no
library was built, everything that uses it runs on torch instead, and `describe` says so.
"""

from __future__ import annotations

from cloq_export.kernels.cpu.library import available, describe, load, runnable_isas, select_isa

__all__ = ["available", "describe", "load", "runnable_isas", "select_isa"]
