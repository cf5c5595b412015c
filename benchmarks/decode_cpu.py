"""Time decoding on the CPU, end to end: tokens per second of a whole model, packed and in float, with adapters.

One sequence per adapter is decoded greedily by transformers' `generate`, in bfloat16, and the time of the prompt is
taken off by running it with two lengths of answer. Models: a real one, and a Llama in the shape of one with a billion
parameters whose weights are random (speed does not ask what they are). Each model is quantized by rounding to nearest,
which takes seconds, and served from files as any export is. Adapters are random, of rank 64, and each has sequences of
its own in the batch.

    python benchmarks/decode_cpu.py --json benchmarks/results/decode_cpu.json
    python benchmarks/decode_cpu.py --model PATH --bits 2,4 --adapters 0,1,8
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from environment import describe_hardware, hardware_line, model_folder

PROMPT = 32
SHORT, LONG = 4, 36
RANK = 64


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-demo", help="as `cloq run` takes it (default: %(default)s)")
    parser.add_argument("--synthetic-layers", type=int, default=16, help="0 leaves the synthetic model out")
    parser.add_argument("--bits", default="2,4", help="(default: %(default)s)")
    parser.add_argument("--adapters", default="0,1,8", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for every figure")
    return parser.parse_args()


def synthetic_model(layers: int) -> Any:
    """Return a Llama of one billion parameters with random weights, in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def quantized_folder(model: Any, bits: int, folder: Path) -> Path:
    """Write a model rounded to nearest, group 64, as a checkpoint; return its folder."""
    import torch
    from torch import nn

    from cloq_export.runtimes.checkpoint_writer import FloatPart, LayerSource, export_checkpoint
    from cloq_export.types import QuantizedLayer, QuantSpec

    spec = QuantSpec(bits, 64)
    layers: dict[str, QuantizedLayer] = {}
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear) or ".layers." not in name:
            continue
        weight = linear.weight.detach().to(torch.float32)
        groups = weight.view(weight.shape[0], -1, 64)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = ((high - low) / spec.max_code).to(torch.float16).clamp(min=1e-4)
        steps = scales.to(torch.float32)
        zeros = (-low / steps).round().clamp(0, spec.max_code)
        codes = ((groups / steps.unsqueeze(-1)).round() + zeros.unsqueeze(-1)).clamp(0, spec.max_code)
        layers[name] = QuantizedLayer(
            codes.to(torch.uint8).view(weight.shape), scales, zeros.to(torch.uint8), dataclasses.replace(spec)
        )
    source = LayerSource.of_mapping(layers)
    export_checkpoint(folder, source, FloatPart.of_model(model, source))
    return folder


def add_adapters(model: Any, count: int) -> list[str]:
    """Attach random adapters of every quantized linear; return their names."""
    import torch
    from peft import LoraConfig

    from cloq_export.runtimes.packed_linear import PackedLinear
    from cloq_export.runtimes.packed_lora import PackedLoraLinear

    names = [f"adapter{index}" for index in range(count)]
    targets = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    for name in names:
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights=False)
        config._register_custom_module({PackedLinear: PackedLoraLinear})
        model.add_adapter(config, name)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, PackedLoraLinear):
                for pairs in (module.lora_A, module.lora_B):
                    for linear in pairs.values():
                        # float32 that float16 holds, as stored adapters are.
                        linear.weight.data = linear.weight.data.to(torch.float16).to(torch.float32)
    if names:
        model.set_adapter(names[0])
    model.requires_grad_(False)
    return names


def seconds_per_token(model: Any, rows: int, names: list[str], rounds: int) -> float:
    """Return the time of one step of decoding `rows` sequences, each with its adapter; the median over rounds."""
    import torch
    from peft.tuners.lora import LoraLayer

    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(model.config.vocab_size, (rows, PROMPT), generator=generator)
    hooks = []
    if len(names) > 1:
        hooks = [
            module.register_forward_pre_hook(
                lambda module, inputs, options: (inputs, options | {"adapter_names": names}), with_kwargs=True
            )
            for module in model.modules()
            if isinstance(module, LoraLayer)
        ]

    def run(length: int) -> float:
        started = time.perf_counter()
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=length,
                max_new_tokens=length,
                pad_token_id=0,
            )
        return time.perf_counter() - started

    try:
        run(SHORT)
        found = []
        for _ in range(rounds):
            short = run(SHORT)
            found.append((run(LONG) - short) / (LONG - SHORT))
        return statistics.median(found)
    finally:
        for hook in hooks:
            hook.remove()


def measure(name: str, source: Any, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Return the rows of one model: float first, then every width with every count of adapters."""
    import torch

    from cloq_export.runtimes.hf import load

    rows: list[dict[str, Any]] = []

    def note(engine: str, bits: int | None, adapters: int, batch: int, seconds: float) -> None:
        row = {"model": name, "engine": engine, "bits": bits, "adapters": adapters, "sequences": batch}
        rows.append(row | {"seconds": seconds, "tokens_per_second": batch / seconds})

    counts = [int(count) for count in options.adapters.split(",")]
    batches = sorted({max(1, count) for count in counts})
    source = source.to(torch.bfloat16)
    for batch in batches:
        note("transformers", None, 0, batch, seconds_per_token(source, batch, [], options.rounds))
    for bits in (int(width) for width in options.bits.split(",")):
        served = quantized_folder(source, bits, folder / f"{name}-{bits}")
        for count in counts:
            model = load(served, dtype=torch.bfloat16)
            names = add_adapters(model, count)
            note("cloq", bits, count, max(1, count), seconds_per_token(model, max(1, count), names, options.rounds))
            if count > 1:
                bare = load(served, dtype=torch.bfloat16)
                note("cloq", bits, 0, count, seconds_per_token(bare, count, [], options.rounds))
    return rows


def main() -> None:
    """Run the benchmark."""
    import torch
    from transformers import AutoModelForCausalLM

    from cloq_export.kernels import cpu
    from cloq_export.run.atomic import write_json
    from cloq_export.run.versions import environment

    options = parse_arguments()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="cloq-decode-") as folder:
        source = AutoModelForCausalLM.from_pretrained(model_folder(options.model, Path(folder) / "source")).eval()
        rows += measure(Path(options.model).name, source, options, Path(folder))
        del source
        if options.synthetic_layers:
            rows += measure("synthetic Llama 1B", synthetic_model(options.synthetic_layers), options, Path(folder))
    report = {
        "hardware": describe_hardware(),
        "versions": environment(),
        "kernels": cpu.describe(),
        "threads": torch.get_num_threads(),
        "options": {"rank": RANK, "prompt": PROMPT, "rounds": options.rounds, "dtype": "bfloat16", "group_size": 64},
        "rows": rows,
    }
    if options.json:
        write_json(options.json, report, sort_keys=False)
    print(hardware_line(report["hardware"]))
    print(f"{'model':20} {'engine':14} {'bits':>4} {'adapters':>8} {'sequences':>9} {'ms/step':>8} {'tokens/s':>8}")
    for row in rows:
        print(
            f"{row['model'][:20]:20} {row['engine']:14} {row['bits'] or '':>4} {row['adapters']:>8} "
            f"{row['sequences']:>9} {row['seconds'] * 1e3:>8.1f} {row['tokens_per_second']:>8.1f}"
        )


if __name__ == "__main__":
    sys.exit(main())
