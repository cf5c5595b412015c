"""What one order of addition costs a packed layer on the CPU: medians of ratios of interleaved pairs of calls.

python benchmarks/deterministic_cpu.py --shapes 1536x576 --tokens 1,16
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from typing import Any

import torch
from environment import describe_hardware, hardware_line

GROUP = 64


def ratio_of(weight: Any, x: torch.Tensor, lora: Any, pairs: int) -> float:
    """Return the time of the deterministic layer as a multiple of that of the usual one."""
    from cloq_export.kernels.cpu import linear as kernel

    # What one thread computes is counted by its own clock, which stands while other programs run.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    ways = (dataclasses.replace(weight, deterministic=True), weight)
    ratios = []
    for _ in range(pairs):
        seconds = []
        for way in ways:
            started = clock()
            kernel.lora_linear(x, way, None, lora)
            seconds.append(clock() - started)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def main() -> None:
    """Print a row for each shape, width and number of tokens, with an adapter and without."""
    from cloq_export.kernels import cpu
    from cloq_export.kernels.cpu import lora as cpu_lora
    from cloq_export.kernels.cpu import weight as cpu_weight

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="1536x576,4096x4096", help="out x in (default: %(default)s)")
    parser.add_argument("--tokens", default="1,16", help="(default: %(default)s)")
    parser.add_argument("--bits", default="2,3,4,8", help="(default: %(default)s)")
    parser.add_argument("--rank", type=int, default=64, help="of the adapter (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="(default: all cores)")
    parser.add_argument("--pairs", type=int, default=101, help="(default: %(default)s)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(hardware_line(describe_hardware()), cpu.describe(), sep="\n")
    print(f"{'shape':>11} bits tokens  base  with rank {options.rank}")
    for shape in options.shapes.split(","):
        out, columns = map(int, shape.split("x"))
        for bits in map(int, options.bits.split(",")):
            codes = torch.randint(0, 1 << bits, (out, columns), dtype=torch.uint8)
            scales = torch.rand(out, columns // GROUP).to(torch.float16) + 0.01
            zeros = torch.randint(0, 1 << bits, scales.shape, dtype=torch.uint8)
            weight = cpu_weight.pack_weight(codes, scales, zeros, bits)
            a, b = torch.randn(1, options.rank, columns), torch.randn(1, out, options.rank)
            lora = cpu_lora.pack_lora(a.to(torch.bfloat16), b.to(torch.bfloat16), torch.ones(1))
            for tokens in map(int, options.tokens.split(",")):
                x = torch.randn(tokens, columns)
                base, adapted = (ratio_of(weight, x, each, options.pairs) for each in (None, lora))
                print(f"{shape:>11} {bits:4} {tokens:6} {base:5.2f} {adapted:13.2f}", flush=True)


if __name__ == "__main__":
    main()
