"""What a measurement ran on, in words."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

# Instruction sets that decide the speed of matrix products, as /proc/cpuinfo names them (x86, then Arm).
_ISA_FLAGS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "bf16", "i8mm", "sve", "sve2", "sme"),
)


def describe_hardware() -> dict[str, Any]:
    """Return CPU model, cores that this process may use, memory, the instruction sets that matter, and GPUs.

    Returns:
        dict: "cpu", "cores", "memory_bytes" and "isa"; "gpus" where torch sees any.
    """
    import torch

    from cloq_export.kernels.gpu import cuda

    fields: dict[str, str] = {}
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, colon, value = line.partition(":")
            if colon:
                fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [cuda().name(torch.device("cuda", index)) for index in range(cuda().count())]
    hardware: dict[str, Any] = {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": cores,
        "memory_bytes": psutil.virtual_memory().total,
        "isa": [flag for flag in _ISA_FLAGS if flag in flags],
    }
    return hardware | {"gpus": gpus} if gpus else hardware


def hardware_line(hardware: Mapping[str, Any]) -> str:
    """Return the hardware in one line.

    Args:
        hardware: as `describe_hardware` returns it.
    """
    memory, cores = hardware["memory_bytes"], hardware["cores"]
    parts = [*hardware.get("gpus", ()), str(hardware["cpu"]), f"{cores} core{'s' if cores != 1 else ''}"]
    if memory:
        parts.append(f"{memory / 2**30:.0f} GiB")
    return ", ".join(parts) + (f" ({' '.join(hardware['isa'])})" if hardware["isa"] else "")
