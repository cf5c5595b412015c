"""Compile every Triton kernel for a GPU that need not be here, as its caller launches it, and print what came out.

Triton compiles for a named target without a device, down to machine code by its own copy of ptxas; only the launch is
left out. Arguments: the compute capability, such as 90, and "all" or the "first" shapes of the tuned kernels, or
"brief" for the first shape of one problem of each kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

CAPABILITY, SHAPES = int(sys.argv[1]), sys.argv[2]
found: list[dict[str, object]] = []
# Instructions of the matrix units, from Ampere's to Blackwell's; and those that add where another program may add too.
# ATOMS is not among them: it reaches the memory of one block only, and Blackwell's barriers are made of it.
MATRIX = re.compile(r"\b(HMMA|HGMMA|IMMA|DMMA|UTCHMMA|OMMA|QMMA)\b")
ATOMIC = re.compile(r"\b(ATOM|ATOMG|RED|REDG|UREDG)\b")
ATOMIC_IR = re.compile(r"\btt\.atomic_\w+")


class AbsentDevice:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_only(self, *args, grid, warmup, **kwargs):
    kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
    with tempfile.TemporaryDirectory() as folder:
        source, machine = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(kernel.asm["ptx"], encoding="utf-8")
        tools = triton.knobs.nvidia
        assembler = tools.ptxas_blackwell if CAPABILITY >= 100 else tools.ptxas
        target = f"-arch=sm_{CAPABILITY}" + ("a" if CAPABILITY >= 90 else "")
        command = [assembler.path, target, "-v", str(source), "-o", str(machine)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        dumped = [tools.cuobjdump.path, "--dump-sass", str(machine)]
        instructions = subprocess.run(dumped, capture_output=True, text=True, check=True).stdout
    spilled = re.search(r"(\d+) bytes spill stores", said)
    registers = re.search(r"Used (\d+) registers", said)
    assert spilled is not None
    assert registers is not None
    found.append(
        {
            "kernel": self.fn.__name__,
            "shape": {name: value for name, value in kwargs.items() if isinstance(value, (bool, int))},
            "registers": int(registers[1]),
            "spilled_bytes": int(spilled[1]),
            "shared_bytes": kernel.metadata.shared,
            "matrix_units": sorted(set(MATRIX.findall(instructions))),
            "atomics": sorted({*ATOMIC_IR.findall(kernel.asm["ttir"]), *ATOMIC.findall(instructions)}),
            "widest_load": max([1, *(int(width) for width in re.findall(r"ld\.global\.v(\d)", kernel.asm["ptx"]))]),
        }
    )
    return kernel


def compile_shapes(self, *args, **kwargs):
    for config in self.configs if SHAPES == "all" else self.configs[:1]:
        result = self.fn.run(*args, **kwargs, **config.all_kwargs())
    return result


driver.set_active(AbsentDevice())
launch = JITFunction.run
JITFunction.run = compile_only
Autotuner.run = compile_shapes

from cloq_export.kernels.reference.lora import Adapters  # noqa: E402
from cloq_export.kernels.triton import dequantize, gram, grid, linear, optq, prox  # noqa: E402

IN, OUT, RANK = 4096, 11008, 64
BRIEF = SHAPES == "brief"
for bits in (2,) if BRIEF else (2, 3, 4, 8):
    for dtype in (torch.float16, torch.bfloat16) if bits == 2 and not BRIEF else (torch.float16,):
        layer = (
            torch.zeros(IN * bits // 32, OUT, dtype=torch.int32),
            torch.zeros(IN // 64, OUT * bits // 32, dtype=torch.int32),
            torch.zeros(IN // 64, OUT, dtype=torch.float16),
        )
        dequantize.dequantize(*layer, bits, dtype)
        lora = (torch.zeros(2, RANK, IN, dtype=dtype), torch.zeros(2, OUT, RANK, dtype=dtype), torch.ones(2))
        for tokens in (1, 16):
            x, index = torch.zeros(tokens, IN, dtype=dtype), torch.zeros(tokens, dtype=torch.int32)
            if not BRIEF:
                linear.lora_linear(x, layer, bits, torch.zeros(OUT, dtype=dtype), splits=1)
            if bits in (2, 3):
                linear.lora_linear(x, layer, bits, None, Adapters(*lora, index))
for dtype in (torch.bfloat16,) if BRIEF else (torch.bfloat16, torch.float16):
    gram.add_gram(torch.zeros(512, 512), torch.zeros(64, 512, dtype=dtype))
columns = torch.zeros(128, 4096)
optq.walk_block(columns, columns, columns, torch.zeros(128, 128), 3, (columns.to(torch.uint8), columns))
for shape in ((4096, 64),) if BRIEF else ((4096, 64), (16, 11008)):
    for symmetric in (False,) if BRIEF else (False, True):
        grid.search_grid(torch.zeros(shape), 3, (1.0, 0.9), (0.1,), (1e-4, 6e4), symmetric=symmetric)
    prox.clip_groups(torch.zeros(shape), 0.1, torch.zeros(shape[0]))
print(json.dumps(found))
