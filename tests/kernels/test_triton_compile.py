"""Every Triton kernel compiles to machine code for the GPUs that it is meant for, without one at hand."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from cloq_export.kernels import dispatch

PROBE = Path(__file__).parent / "probes" / "compile_triton.py"


@pytest.mark.slow
@pytest.mark.skipif(
    not dispatch.has_triton() or platform.machine() != "x86_64", reason="Triton's compiler for NVIDIA GPUs"
)
@pytest.mark.parametrize(
    ("capability", "shapes"),
    [("80", "first"), ("90", "first"), ("86", "brief"), ("89", "brief"), ("100", "brief"), ("120", "brief")],
)
def test_every_kernel_compiles_as_it_should(capability, shapes, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, str(PROBE), capability, shapes],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = json.loads(done.stdout.splitlines()[-1])
    assert {kernel["kernel"] for kernel in kernels} == {
        *("_dequantize", "vector_product", "matrix_product", "add_partial_sums"),
        *("_add_gram", "_walk", "_search", "_clip"),
    }
    assert [kernel for kernel in kernels if kernel["spilled_bytes"] > 64] == []
    # What was written for the matrix units reaches them, and no block asks for more memory than they have.
    assert all(kernel["matrix_units"] for kernel in kernels if kernel["kernel"] in ("matrix_product", "_add_gram"))
    assert max(kernel["shared_bytes"] for kernel in kernels) <= 99 * 1024
    # A decoding kernel leaves room for five blocks of its four warps on a multiprocessor of 65,536 registers.
    assert max(kernel["registers"] for kernel in kernels if kernel["kernel"] == "vector_product") <= 96
    # Nothing is added where another program may add: sums would come in the order in which programs end.
    assert [kernel for kernel in kernels if kernel["atomics"]] == []
