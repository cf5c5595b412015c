"""Time LoRA training steps of a 1B-shaped model over a packed base, beside a float base and NF4.

All three have the same adapters (every linear of the blocks, rank 64) attached by PEFT, the same tokens, AdamW over the
adapters and no gradient checkpointing; the weights are random. A step is forward, backward and update; the figure is
the median over steps, each between device events, and the peak of device memory is the allocator's. NF4 needs
bitsandbytes; where it is missing, its row says so.

    python benchmarks/train_gpu.py --json benchmarks/results/train_gpu.json

Without a GPU, `--shape tiny --device cpu --steps 2` shows that the script works.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from gpu_clock import describe_device, device_of, release, synchronize
from gpu_init import SHAPES
from torch import nn

from cloq_export.engines.packed_linear import PackedLinear
from cloq_export.files.atomic import write_json

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_VOCABULARY = 32000


def make_base(name: str, kind: str, bits: int, device: torch.device) -> Any:
    """Return a model whose blocks' linears are packed, float or NF4; everything else is the same."""
    import transformers

    shape = SHAPES[name]
    config = transformers.LlamaConfig(
        vocab_size=97 if name == "tiny" else _VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=True,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).to(dtype)
    if kind == "float":
        return model
    for path, linear in [item for item in model.named_modules() if item[0].rpartition(".")[2] in LINEARS]:
        parent = model.get_submodule(path.rpartition(".")[0])
        setattr(parent, path.rpartition(".")[2], _narrow(linear, kind, bits, dtype, device))
    release(device)
    return model


def _narrow(linear: nn.Linear, kind: str, bits: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    out, columns = linear.weight.shape
    if kind == "nf4":
        import bitsandbytes

        narrow = bitsandbytes.nn.Linear4bit(columns, out, bias=False, compute_dtype=dtype, quant_type="nf4")
        narrow.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        return narrow.to(device)
    groups = columns // 32 if columns % 64 else columns // 64

    def words(*size: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, size, device=device).to(torch.int32)

    scales = torch.full((groups, out), 0.02 / (1 << bits), dtype=torch.float16, device=device)
    return PackedLinear(
        words(columns * bits // 32, out), words(groups, out * bits // 32), scales, bits=bits, dtype=dtype
    )


def measure(name: str, kind: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Train a few steps; return the median time of one and the memory that it took."""
    import peft

    release(device)
    model = make_base(name, kind, options.bits, device)
    rank = 4 if name == "tiny" else 64
    model = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEARS))
    model.train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-4)
    vocabulary = model.get_input_embeddings().num_embeddings
    length = 16 if name == "tiny" else options.seqlen
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (options.batch, length), generator=generator).to(device)
    base_bytes = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds: list[float] = []
    losses: list[float] = []
    for _ in range(options.steps + 2):  # two to warm up
        synchronize(device)
        started = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
        losses.append(float(loss.detach()))
    if not losses[-1] < losses[0]:
        raise SystemExit(f"{kind}: the loss went from {losses[0]:.4f} to {losses[-1]:.4f}; a step that learns nothing.")
    return {
        "base": kind,
        "shape": name,
        "bits": options.bits if kind == "packed" else None,
        "tokens_per_step": tokens.numel(),
        "seconds": statistics.median(seconds[2:]),
        "losses": [losses[0], losses[-1]],
        "base_device_bytes": base_bytes,
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1b", choices=[*SHAPES])
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = device_of(options.device)
    rows: list[dict[str, Any]] = []
    for kind in ("float", "packed", "nf4"):
        row = _row(kind, options, device, rows)
        rows.append(row)
        print(f"{kind}: {row.get('not_measured') or _line(row)}", flush=True)
        if options.json:
            write_json(options.json, {"device": describe_device(device), "rows": rows}, sort_keys=False)


def _row(kind: str, options: argparse.Namespace, device: torch.device, before: list[dict[str, Any]]) -> dict[str, Any]:
    if kind == "nf4" and (importlib.util.find_spec("bitsandbytes") is None or device.type != "cuda"):
        return {"base": kind, "not_measured": "bitsandbytes is not installed, or there is no GPU"}
    row = measure(options.shape, kind, options, device)
    return {**row, "over_float": row["seconds"] / (before[0] if before else row)["seconds"]}


def _line(row: dict[str, Any]) -> str:
    peak = "" if row["peak_device_bytes"] is None else f", {row['peak_device_bytes'] / 1e9:.2f} GB"
    return f"{row['seconds'] * 1e3:.1f} ms a step, {row['over_float']:.2f}x float{peak}"


if __name__ == "__main__":
    main()
