"""What the GPU benchmarks share: the device in words, its two ceilings as measured, and times from device events.

Without a GPU everything runs on the CPU with ordinary clocks, which shows that a benchmark works and measures nothing.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from environment import describe_hardware

Call = Callable[[], Any]
_Operand = TypeVar("_Operand")


def describe_device(device: torch.device) -> dict[str, Any]:
    """Return name, memory, multiprocessors, capability and versions; on a CPU the machine in words."""
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = None
    if device.type != "cuda":
        return {"name": describe_hardware()["cpu"], "kind": "cpu", "versions": versions}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "kind": "cuda",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "versions": versions,
    }


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(calls: Sequence[Call], device: torch.device, repeats: int = 30, *, graphed: bool = True) -> float:
    """Return the median time of one call; the calls of a list take turns, so that no cache serves them all.

    On a GPU one round through the list is captured as a graph where that is possible, so that launching costs as
    little as in an engine that does the same, and device events are read around each replay.

    Args:
        calls: what is timed.
        device: where.
        repeats: rounds.
        graphed: the calls may be captured; what asks the device for numbers may not, and would spoil the capture.
    """
    for call in calls:
        call()
    synchronize(device)
    if device.type != "cuda":
        found = []
        for _ in range(repeats):
            started = time.perf_counter()
            for call in calls:
                call()
            found.append((time.perf_counter() - started) / len(calls))
        return statistics.median(found)
    replay = _captured(calls, device) if graphed else _in_turn(calls)
    found = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1000 / len(calls))
    return statistics.median(found)


def _in_turn(calls: Sequence[Call]) -> Call:
    def once() -> None:
        for call in calls:
            call()

    return once


def _captured(calls: Sequence[Call], device: torch.device) -> Call:
    once = _in_turn(calls)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            once()
    except RuntimeError:
        # Something in the call waits for the device: it is timed as it is.
        synchronize(device)
        return once
    replay: Call = graph.replay
    return replay


def ring(
    make: Callable[[int], _Operand], bytes_each: int, device: torch.device, at_least: int = 256 << 20
) -> list[_Operand]:
    """Return so many fresh operands that together they are larger than any cache; two on a CPU."""
    count = 2 if device.type != "cuda" else max(2, -(-at_least // max(1, bytes_each)))
    return [make(number) for number in range(min(count, 64))]


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """Return bytes per second of a device copy and of copies from the host, and operations per second by dtype.

    These, measured in the same run, are what times are held against: no version runs much faster.
    """
    on_gpu = device.type == "cuda"
    count = 1 << (29 if on_gpu else 20)
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ceilings = {"copy_bytes": 2 * count / median_seconds([_copy(target, source)], device, 10)}
    if on_gpu:
        host = torch.empty(count, dtype=torch.uint8, pin_memory=True)
        seconds = median_seconds([_copy(target, host)], device, 5)
        ceilings["host_to_device_bytes"] = count / seconds
        del host
    del source, target
    width = 8192 if on_gpu else 64
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32), ("float64", torch.float64)):
        side = width if dtype == torch.bfloat16 else width // 2
        # Random numbers: a product of zeros draws less power and runs faster than any real one.
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        product = _product(left, right)
        ceilings[f"{name}_operations"] = 2 * side**3 / median_seconds([product], device, 5)
    release(device)
    return ceilings


def _copy(target: torch.Tensor, source: torch.Tensor) -> Call:
    return lambda: target.copy_(source, non_blocking=True)


def _product(left: torch.Tensor, right: torch.Tensor) -> Call:
    return lambda: left @ right


def release(device: torch.device) -> None:
    """Give memory back, so that the next measurement starts as the first one did."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def device_of(name: str) -> torch.device:
    """Return the device of a command line: "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
