"""Time the Triton kernels against torch, correctness first, on shapes of a 7B model.

Every kernel is compared with a float64 (or torch) reference before it is timed, and its error stands beside its time.
Times are medians of device events over graph replays; operands take turns, so that no cache holds the weights.
"share" is the part of the measured copy bandwidth at which the least possible bytes pass: packed weights, scales,
zeros, activations and results, each once. "speedup" is against torch in float16 (linears), bfloat16 (dequantize:
copying as many bytes) or the torch code that the kernel stands in for.

    python benchmarks/kernels_gpu.py --json benchmarks/results/kernels_gpu.json

Without a GPU, `--device cpu --shapes 64x96 --smoke` shows that the script works; Triton's interpreter computes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if "--smoke" in sys.argv:
    # Read by Triton when kernels are declared.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from gpu_clock import describe_device, device_of, measure_ceilings, median_seconds, release, ring

from cloq_export import kernels
from cloq_export.files.atomic import write_json
from cloq_export.kernels import dispatch, operators
from cloq_export.kernels.reference import linear as reference
from cloq_export.kernels.reference.lora import compute_packed_lora_linear

Row = dict[str, Any]
Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def random_layer(out: int, columns: int, bits: int, group: int, device: torch.device, seed: int) -> Layer:
    """Return qweight, qzeros and scales with random bits."""
    generator = torch.Generator(device=device).manual_seed(seed)
    groups = columns // group

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator, device=device).to(torch.int32)

    scales = (torch.rand(groups, out, generator=generator, device=device) + 0.1) / 100
    return words(columns * bits // 32, out), words(groups, out * bits // 32), scales.to(torch.float16)


def bytes_of(*tensors: torch.Tensor) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Return `||found - truth|| / ||truth||`; NaN and unwritten numbers never pass for small."""
    return float((found.to(torch.float64) - truth.to(torch.float64)).norm() / truth.to(torch.float64).norm())


def checked(name: str, error: float, allowed: float) -> float:
    """Return the error, or end the run: nothing wrong is timed."""
    if not error <= allowed:
        raise SystemExit(f"{name}: relative error {error:.3g} is above {allowed:g}; nothing was timed after it.")
    return error


def linear_rows(shape: tuple[int, int], bits: int, options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Yield decode linears without and with an adapter, beside torch in float16."""
    out, columns = shape
    layers = ring(
        lambda seed: random_layer(out, columns, bits, options.group, device, seed), out * columns * bits // 8, device
    )
    weight = reference.dequantize(*layers[0], bits)
    dense = ring(lambda seed: weight.to(torch.float16) + 0 * seed, out * columns * 2, device)
    rank = min(64, out, columns)
    a, b = (torch.randn(size, device=device).to(torch.float16) / 30 for size in ((1, rank, columns), (1, out, rank)))
    one = torch.ones(1, device=device)
    for tokens in options.tokens:
        x = torch.randn(tokens, columns, device=device).to(torch.float16)
        truth = x.to(torch.float64) @ weight.to(torch.float64).t()
        name = f"linear {out}x{columns} INT{bits} tokens {tokens}"
        error = checked(name, relative_error(kernels.packed_linear(x, *layers[0], bits), truth), 2e-3)
        half = median_seconds([_call(torch.nn.functional.linear, x, each) for each in dense], device, options.repeats)
        mine = [_call(kernels.packed_linear, x, *each, bits) for each in layers]
        seconds = median_seconds(mine, device, options.repeats)
        moved = bytes_of(*layers[0]) + tokens * (columns + out) * 2
        yield {
            "kernel": name,
            "error": error,
            "seconds": seconds,
            "torch_seconds": half,
            "speedup": half / seconds,
            "bytes": moved,
        }
        adapted = compute_packed_lora_linear(x, layers[0], bits, None, (a, b, one))
        call = [_call(kernels.packed_lora_linear, x, each, bits, None, kernels.Adapters(a, b, one)) for each in layers]
        error = checked(f"{name} rank {rank}", relative_error(call[0](), adapted), 2e-3)
        with_adapter = median_seconds(call, device, options.repeats)
        yield {
            "kernel": f"{name} rank {rank}",
            "error": error,
            "seconds": with_adapter,
            "over_plain": with_adapter / seconds,
            "bytes": moved + bytes_of(a, b),
        }


def dequantize_rows(
    shape: tuple[int, int], bits: int, options: argparse.Namespace, device: torch.device
) -> Iterator[Row]:
    """Yield dequantization to bfloat16, as prefill and training use it."""
    from cloq_export.kernels.triton.dequantize import dequantize

    out, columns = shape
    layers = ring(lambda seed: random_layer(out, columns, bits, options.group, device, seed), out * columns * 2, device)
    expected = reference.dequantize(*layers[0], bits).to(torch.bfloat16)
    name = f"dequantize {out}x{columns} INT{bits}"
    result = dequantize(*layers[0], bits, torch.bfloat16)
    # Exact on a GPU; Triton's interpreter cuts bfloat16 off instead of rounding it.
    error = checked(name, relative_error(result, expected), 0.0 if device.type == "cuda" else 1e-2)
    calls = [_call(dequantize, *each, bits, torch.bfloat16) for each in layers]
    yield {
        "kernel": name,
        "error": error,
        "seconds": median_seconds(calls, device, options.repeats),
        "bytes": bytes_of(*layers[0], expected),
    }


def solve_rows(shape: tuple[int, int], options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Yield the kernels of calibration and quantization beside the torch code that they stand in for."""
    from cloq_export.calibrate.gram import GramAccumulator
    from cloq_export.quantize import grid, magr, optq
    from cloq_export.types import QuantSpec

    out, columns = shape
    weight = torch.randn(out, columns, device=device)
    spec = QuantSpec(2, options.group)
    tokens = 64 if options.smoke else 8192
    x = torch.randn(tokens, columns, device=device).to(torch.bfloat16)
    gram = x.to(torch.float64).t() @ x.to(torch.float64)

    def accumulate() -> torch.Tensor:
        accumulator = GramAccumulator(columns, device=device)
        accumulator.add(x)
        return accumulator.stats().gram

    levels = torch.zeros(weight.numel() // options.group, 1, device=device)
    scales = torch.full_like(weight, 0.7)
    zeros = torch.ones_like(weight)
    gram.diagonal().add_(0.01 * float(gram.diagonal().mean()))
    cases: list[tuple[str, Any, float, int, int]] = [
        (f"gram {tokens}x{columns}", accumulate, 1e-2, tokens * columns**2, columns**2 * 2),
        (f"grid search {out}x{columns}", lambda: grid.fit_grid(weight, spec)[0], 1e-3, 0, weight.numel() * 4),
        (
            f"proximal map {out}x{columns}",
            lambda: magr.shrink_infinity_norm(weight.view(-1, options.group), 0.5, levels.clone()),
            1e-4,
            0,
            weight.numel() * 8,
        ),
        (
            f"column walk {out}x{columns}",
            lambda: optq.optq_codes(weight, scales, zeros, 3, gram),
            1e-2,
            out * columns**2,
            weight.numel() * 5,
        ),
    ]
    for name, call, allowed, operations, moved in cases:
        found = call()
        # These ask the device for numbers on their way.
        seconds = median_seconds([call], device, max(3, options.repeats // 5), graphed=False)
        kept, dispatch.TRITON_DEVICES = dispatch.TRITON_DEVICES, set()
        try:
            truth = call()
            plain = median_seconds([call], device, 3, graphed=False)
        finally:
            dispatch.TRITON_DEVICES = kept
        yield {
            "kernel": name,
            "error": checked(name, relative_error(found, truth), allowed),
            "seconds": seconds,
            "torch_seconds": plain,
            "speedup": plain / seconds,
            "bytes": moved,
            "operations": operations,
        }


def _call(function: Any, *arguments: Any) -> Any:
    return lambda: function(*arguments)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x11008,11008x4096,4096x4096", help="OUTxIN, comma-separated")
    parser.add_argument("--bits", default="2,3,4")
    parser.add_argument("--tokens", default="1,16,64")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--smoke", action="store_true", help="let Triton's interpreter compute on the CPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.tokens = [int(tokens) for tokens in options.tokens.split(",")]
    device = device_of(options.device)
    if options.smoke:
        dispatch.TRITON_DEVICES = {"cpu"}
        kernels.packed_linear_op.register_kernel("cpu", operators.packed_linear_on_gpu)
        kernels.packed_lora_linear_op.register_kernel("cpu", operators.packed_lora_linear_on_gpu)
    ceilings = measure_ceilings(device)
    rows: list[Row] = []
    result = {"device": describe_device(device), "ceilings": ceilings, "group": options.group, "rows": rows}
    print(f"{describe_device(device)['name']}: copy {ceilings['copy_bytes'] / 1e9:.0f} GB/s")
    shapes = [tuple(int(side) for side in shape.split("x")) for shape in options.shapes.split(",")]
    with torch.no_grad():
        # Few shapes to compile; of the linears there are hundreds, and time may run out among them.
        for row in solve_rows(shapes[0], options, device):  # type: ignore[arg-type]
            _report(row, result, options.json)
        release(device)
        for shape in shapes:
            for bits in (int(bits) for bits in options.bits.split(",")):
                for measured in (linear_rows, dequantize_rows):
                    for row in measured(shape, bits, options, device):  # type: ignore[arg-type]
                        _report(row, result, options.json)
                    release(device)


def _report(row: Row, result: dict[str, Any], path: Path | None) -> None:
    """Print a row, and write it at once: what was measured is not lost where time runs out."""
    row["share"] = row["bytes"] / row["seconds"] / result["ceilings"]["copy_bytes"]
    extra = "".join(f"  {name} {row[name]:.2f}" for name in ("speedup", "over_plain") if name in row)
    figures = f"{row['seconds'] * 1e6:>10.1f} us  share {row['share']:.2f}  error {row['error']:.1e}"
    print(f"{row['kernel']:<48} {figures}{extra}", flush=True)
    result["rows"].append(row)
    if path:
        write_json(path, result, sort_keys=False)


if __name__ == "__main__":
    main()
