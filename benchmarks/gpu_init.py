"""Time the initialisation of Llama-shaped models on a GPU: calibrate, quantize and adapt, stage by stage.

The weights are random, made on the device block by block and kept in host memory, from which the walk over the blocks
streams them: nothing is downloaded, and a model larger than the device runs too. The norms' gains are log-normal, so
that activations have the uneven directions of a trained model; with equal ones no truncated SVD would settle. The
tokens are random as well. So the times are those of real work, and the errors in the certificates mean nothing.

    python benchmarks/gpu_init.py --shapes 1b,7b --presets paper,default --json benchmarks/results/gpu_init.json

Beside the times stands the arithmetic floor: operations and bytes counted in `count_work`, over the rates that the
same run measures on the device. `--seconds` ends a walk at the first block after that time and projects the rest from
the blocks done ("projected": true). Without a GPU, `--shapes tiny --device cpu` shows that the script works.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from gpu_clock import describe_device, device_of, measure_ceilings, release, synchronize
from rich.console import Console

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.compress.job import CalibrationWindows, CompressJob
from cloq_export.compress.plan import make_plan
from cloq_export.compress.strategies import strategy_of
from cloq_export.compress.walk import BlockWalk
from cloq_export.errors import CloqError
from cloq_export.files.atomic import write_json
from cloq_export.models.blocks import find_blocks
from cloq_export.models.devices import limited
from cloq_export.recipe import Recipe, bytes_of_size


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-like model."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int


SHAPES = {
    "7b": Shape(4096, 11008, 32, 32, 32),
    "1b": Shape(2048, 8192, 16, 32, 8),
    "tiny": Shape(64, 96, 2, 4, 2),
}
_VOCABULARY = 32000


class _OutOfTime(Exception):
    """Ends a walk between two blocks."""


def make_model(shape: Shape, device: torch.device, vocabulary: int, length: int) -> Any:
    """Return a causal language model with random weights, in host memory, made a block at a time on the device."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device=device).manual_seed(0)

    def fill(module: torch.nn.Module) -> None:
        module.to_empty(device=device)
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.data.normal_(0.0, 1.0, generator=generator).exp_()
        module.to(device="cpu", dtype=dtype)
        if device.type == "cuda":
            for parameter in module.parameters():
                parameter.data = parameter.data.pin_memory()

    for block in model.model.layers:
        fill(block)
    fill(model.model.embed_tokens)
    fill(model.model.norm)
    model.lm_head.weight = model.model.embed_tokens.weight
    # Buffers (the rotary table) are computed, not stored: made again where they were left empty.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def count_work(shape: Shape, recipe: Recipe, tokens: int) -> dict[str, dict[str, float]]:
    """Return the least operations and bytes of every stage for one block.

    Forward: two operations per weight and token, and causal attention; the error-aware mode runs every token through
    the compressed stream and `float_share` of them through the float one. Statistics: half of X^T X for each of the
    four inputs (q/k/v, o, gate/up, down), and all of the drift. Solve, in float64: two Cholesky factorisations of each
    H and R dW^T; in float32: the columns' errors handed on. Bytes: the weights from the host, once for each stream.
    """
    kv = shape.hidden * shape.kv_heads // shape.heads
    inputs = {
        "qkv": (shape.hidden, shape.hidden + 2 * kv),
        "o": (shape.hidden, shape.hidden),
        "gate_up": (shape.hidden, 2 * shape.inner),
        "down": (shape.inner, shape.hidden),
    }
    weights = sum(width * out for width, out in inputs.values())
    streams = 1.0 + (recipe.float_share if recipe.error_aware else 0.0)
    attention = 2.0 * tokens * recipe.seqlen * shape.hidden
    gram = sum(tokens * width**2 for width, _ in inputs.values())
    drift = 2 * gram * recipe.float_share if recipe.error_aware else 0.0
    return {
        "forward": {"bfloat16": streams * (2.0 * weights * tokens + attention)},
        "statistics": {"bfloat16": float(gram), "float32": drift},
        "solve": {
            "float64": sum(2 * width**3 / 3 + width**2 * out for width, out in inputs.values()),
            "float32": float(sum(width**2 * out for width, out in inputs.values())),
        },
        "bytes": {"host_to_device": 2.0 * weights},
    }


def floor_seconds(work: dict[str, dict[str, float]], ceilings: dict[str, float]) -> dict[str, float]:
    """Return the least time of every stage of one block on this device."""
    found = {
        stage: sum(amount / ceilings[f"{kind}_operations"] for kind, amount in kinds.items())
        for stage, kinds in work.items()
        if stage != "bytes"
    }
    if "host_to_device_bytes" in ceilings:
        found["weights from the host"] = work["bytes"]["host_to_device"] / ceilings["host_to_device_bytes"]
    return found


def measure(
    name: str, preset: str, options: argparse.Namespace, device: torch.device, ceilings: dict[str, float]
) -> dict[str, Any]:
    """Walk through one model; return its times, its peak of device memory and its floor."""
    shape = SHAPES[name]
    small = name == "tiny"
    samples, seqlen = (4, 32) if small else (options.samples, options.seqlen)
    recipe = Recipe.from_mapping(
        {
            "model": name,
            "bits": options.bits,
            "group_size": 32 if small else 64,
            "rank": 4 if small else 64,
            "samples": samples,
            "seqlen": seqlen,
            "device": str(device),
            "device_memory": options.memory,
        },
        preset=preset,
    )
    vocabulary = 97 if small else _VOCABULARY
    started = time.perf_counter()
    model = make_model(shape, device, vocabulary, seqlen)
    made = time.perf_counter() - started
    windows = torch.randint(0, vocabulary, (samples, seqlen), generator=torch.Generator().manual_seed(0))
    blocks = find_blocks(model, "")
    plan = make_plan(blocks, recipe)
    release(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    done: list[float] = []

    class TimedWalk(BlockWalk):
        def _walk_block(self, index: int, streams: Any) -> Any:
            if done and options.seconds and time.perf_counter() - began > options.seconds:
                raise _OutOfTime
            after = super()._walk_block(index, streams)
            synchronize(device)
            done.append(time.perf_counter() - began)
            return after

    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory.create_or_resume(Path(folder) / "run", recipe.to_mapping(), "0" * 64, {})
        with directory, limited(device, bytes_of_size(options.memory)):
            console = Console(file=io.StringIO())
            began = time.perf_counter()
            # Random windows of a model without a tokenizer stand where those of a text would.
            drawn = cast(CalibrationWindows, SimpleNamespace(solving=windows))
            job = CompressJob(model, plan, recipe, directory, drawn, strategy_of(recipe), device, compute=None)
            walk = TimedWalk(job, console)
            parked = walk._stream.parks_waiting
            embedded = time.perf_counter() - began
            with contextlib.suppress(_OutOfTime):
                walk.run()
            certificates = directory.certificates()
    blocks_done, layers = len(done), shape.layers
    total = done[-1] - walk.seconds.write
    first = done[0]
    if blocks_done < layers and blocks_done > 1:
        # The first block finds the groups and compiles kernels; the others are alike.
        total = first + (done[-1] - first) / (blocks_done - 1) * (layers - 1)
    work = count_work(shape, recipe, samples * seqlen)
    floor = floor_seconds(work, ceilings)
    return {
        "shape": name,
        "preset": preset,
        "bits": options.bits,
        "tokens": samples * seqlen,
        "blocks": blocks_done,
        "of_blocks": layers,
        "projected": blocks_done < layers,
        "seconds": total,
        "stages_of_the_blocks_done": {"embed": embedded, **dataclasses.asdict(walk.seconds)},
        "first_block_seconds": first,
        "making_weights_seconds": made,
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "work_per_block": work,
        "floor_seconds": {stage: seconds * layers for stage, seconds in floor.items()},
        "over_floor": total / (layers * sum(floor.values())),
        "memory_limit": options.memory,
        "batches_wait_in_host_memory": parked,
        "windows_per_batch": walk.windows_per_batch,
        "notes": sorted({note for certificate in certificates for note in certificate.notes}),
        "full_svds": sum("full one was taken" in note for item in certificates for note in item.notes),
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1b,7b")
    parser.add_argument("--presets", default="paper,default")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=0.0, help="end each walk at a block after so long; 0: never")
    parser.add_argument("--memory", default="", help="most of the device's memory, e.g. 8GB")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = device_of(options.device)
    ceilings = measure_ceilings(device)
    rows = []
    for name in options.shapes.split(","):
        for preset in options.presets.split(","):
            try:
                row = measure(name, preset, options, device, ceilings)
            except (CloqError, torch.OutOfMemoryError) as error:
                row = {"shape": name, "preset": preset, "failed": f"{type(error).__name__}: {error}"}
            rows.append(row)
            if options.json:
                write_json(
                    options.json,
                    {"device": describe_device(device), "ceilings": ceilings, "rows": rows},
                    sort_keys=False,
                )
            release(device)
            if "failed" in row:
                print(f"{name} {preset}: {row['failed']}", flush=True)
                continue
            peak = row["peak_device_bytes"]
            memory = "" if peak is None else f", {peak / 1e9:.1f} GB"
            print(
                f"{name} {preset}: {row['seconds']:.1f} s for {row['of_blocks']} blocks"
                f"{' (projected)' if row['projected'] else ''}{memory}, {row['over_floor']:.1f}x the floor",
                flush=True,
            )
    if any("failed" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
