"""Time packing and unpacking of codes against a plain copy of the same bytes, in one run.

Packing n codes reads n bytes and writes n * bits / 8; unpacking the other way round. "A plain copy of the same bytes"
is torch copying a tensor of (n + n * bits / 8) / 2 bytes, which reads and writes just as many bytes in total. All of
them write into memory that is there already: fresh pages of the system cost more than either. Copy and kernel take
turns; what is shown is the median of the ratios of neighbours.

    python benchmarks/packing_speed.py --json benchmarks/results/packing_speed.json
    python benchmarks/packing_speed.py --shapes 4096x4096 --bits 3 --threads 1 --isas scalar,avx2
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import describe_hardware, hardware_line

from cloq_export.files.atomic import write_json
from cloq_export.files.versions import environment
from cloq_export.kernels import cpu
from cloq_export.kernels.bitpack import pack_columns, pack_rows, unpack_columns, unpack_rows


def check(codes: torch.Tensor, bits: int) -> None:
    """Compare a corner of the codes with a bitstream made of one Python integer per row, and the whole with itself.

    Raises:
        SystemExit: a word or a code is wrong; nothing is timed then.
    """
    words, columns = pack_rows(codes, bits), pack_columns(codes, bits)
    for row in (0, codes.shape[0] - 1):
        stream = sum(code << (bits * index) for index, code in enumerate(codes[row].tolist()))
        expected = [stream >> (32 * word) & 0xFFFFFFFF for word in range(words.shape[1])]
        if [word & 0xFFFFFFFF for word in words[row].tolist()] != expected:
            raise SystemExit(f"{bits}-bit packing is wrong in row {row}; nothing was timed.")
    unpacked = unpack_rows(words, bits), unpack_columns(columns, bits)
    if not torch.equal(columns, words.t()) or any(not torch.equal(codes, back) for back in unpacked):
        raise SystemExit(f"{bits}-bit packing does not come back as it was; nothing was timed.")


def seconds_of(call: Callable[[], Any]) -> float:
    """Return how long one call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(codes: torch.Tensor, bits: int, repeats: int) -> list[dict[str, Any]]:
    """Return one row per operation."""
    rows, columns = pack_rows(codes, bits), pack_columns(codes, bits)
    source = torch.zeros((codes.numel() * (8 + bits)) // 16, dtype=torch.uint8)
    target = torch.empty_like(source)
    words, transposed, back = torch.empty_like(rows), torch.empty_like(columns), torch.empty_like(codes)

    def copy() -> None:
        target.copy_(source)

    operations: dict[str, Callable[[], Any]] = {
        "pack rows": lambda: pack_rows(codes, bits, out=words),
        "unpack rows": lambda: unpack_rows(rows, bits, out=back),
        "pack columns": lambda: pack_columns(codes, bits, out=transposed),
        "unpack columns": lambda: unpack_columns(columns, bits, out=back),
    }
    found = []
    for name, operation in operations.items():
        for call in (copy, operation):
            call()
        pairs = [(seconds_of(copy), seconds_of(operation)) for _ in range(repeats)]
        found.append(
            {
                "operation": name,
                "bits": bits,
                "shape": list(codes.shape),
                "bytes_moved": 2 * source.numel(),
                "copy_seconds": statistics.median(plain for plain, _ in pairs),
                "seconds": statistics.median(ours for _, ours in pairs),
                "ratio": statistics.median(ours / plain for plain, ours in pairs),
                "pairs": repeats,
            }
        )
    return found


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="packing against a plain copy of the same bytes")
    for heading in ("instruction set", "threads", "shape", "bits", "operation", "copy ms", "ms", "ratio"):
        table.add_column(heading, justify="left" if heading in ("instruction set", "operation") else "right")
    for row in report["rows"]:
        table.add_row(
            row["isa"],
            str(row["threads"]),
            "x".join(map(str, row["shape"])),
            str(row["bits"]),
            row["operation"],
            f"{row['copy_seconds'] * 1e3:.2f}",
            f"{row['seconds'] * 1e3:.2f}",
            f"{row['ratio']:.2f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(hardware_line(report["hardware"]), highlight=False)
    console.print(report["kernels"], highlight=False)
    console.print(table)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part.strip()]


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="4096x4096,11008x4096", help="out x in (default: %(default)s)")
    parser.add_argument("--bits", type=_numbers, default=[2, 3, 4, 8], help="widths (default: 2,3,4,8)")
    parser.add_argument("--threads", type=_numbers, help="of both sides (default: torch's own, then 1)")
    parser.add_argument("--isas", default="", help="instruction sets, e.g. scalar,avx2 (default: the best)")
    parser.add_argument("--repeats", type=int, default=15, help="pairs per figure (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for every figure")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    options = parse_arguments()
    if not cpu.available():
        raise SystemExit(f"{cpu.describe()} There is nothing to time.")
    report: dict[str, Any] = {
        "hardware": describe_hardware(),
        "versions": environment(),
        "kernels": cpu.describe(),
        "rows": [],
    }
    threads = options.threads or sorted({torch.get_num_threads(), 1}, reverse=True)
    for isa in options.isas.split(",") if options.isas else cpu.runnable_isas()[-1:]:
        with cpu.select_isa(isa):
            for count in threads:
                torch.set_num_threads(count)
                for shape in options.shapes.split(","):
                    rows, columns = map(int, shape.split("x"))
                    for bits in options.bits:
                        generator = torch.Generator().manual_seed(bits)
                        codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
                        check(codes, bits)
                        for row in measure(codes, bits, options.repeats):
                            report["rows"].append({"isa": isa, "threads": count, **row})
    if options.json:
        write_json(options.json, report, sort_keys=False)
    show(report)


if __name__ == "__main__":
    main()
