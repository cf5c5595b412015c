"""Time and memory of a LoRA training step on the CPU: over packed codes, and over the float model in bfloat16.

Both take the same tokens, adapters and loss, in processes of their own, which alternate; every process gives the
median of its steps, and the table the medians over processes. The run must hold an adapter.

    cloq run --demo --out RUN
    python benchmarks/train_cpu.py RUN --threads 2 --json benchmarks/results/train_cpu.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from environment import describe_hardware, hardware_line

from cloq_export.files.atomic import write_json

SIDES = ("packed", "bfloat16")


def one_side(side: str, run: str, threads: int, batch: int, seqlen: int, steps: int) -> dict[str, Any]:
    """Return the median step time, and the memory of the process, of one side."""
    import torch

    import cloq_export
    from cloq_export.artifact.run_directory import RunDirectory
    from cloq_export.formats.peft import read_adapter
    from cloq_export.lab.trainers import attach_pairs
    from cloq_export.models.source import open_model
    from cloq_export.process.host_memory import MemoryWatch
    from cloq_export.train.loss import next_token_loss

    torch.set_num_threads(threads)
    directory = RunDirectory.open(run)
    name = directory.adapters.names[0]
    if side == "packed":
        model: Any = cloq_export.load(run, adapter=name, trainable=True, dtype=torch.bfloat16)
    else:
        model = open_model(directory.recipe.model, dtype=torch.float32).model.to(torch.bfloat16)
        attach_pairs(model, read_adapter(directory.adapter_path(name)).pairs)
    model.loss_function = next_token_loss
    model.train()
    model.config.use_cache = False
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    ids = torch.randint(1000, 10000, (batch, seqlen), generator=torch.Generator().manual_seed(0))
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))

    def step() -> float:
        started = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    step()
    watch = MemoryWatch()
    seconds = [step() for _ in range(steps)]
    return {"seconds": statistics.median(seconds), "peak_bytes": watch.stop().peak, "model_bytes": held}


def main() -> None:
    """Alternate the sides, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sizes = (options.threads, options.batch, options.seqlen, options.steps)
    if options.side:
        print(json.dumps(one_side(options.side, options.run, *sizes)))
        return
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            words = [sys.executable, __file__, options.run, "--side", side]
            for name in ("threads", "batch", "seqlen", "steps"):
                words += [f"--{name}", str(getattr(options, name))]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        side: {key: statistics.median(entry[key] for entry in entries) for key in entries[0]}
        for side, entries in found.items()
    }
    print(hardware_line(describe_hardware()))
    print(f"{options.batch} x {options.seqlen} tokens, {options.threads} threads, {options.rounds} x {options.steps}")
    for side, entry in medians.items():
        print(
            f"{side:10} {entry['seconds']:.3f} s a step, peak {entry['peak_bytes'] / 1e6:.0f} MB, "
            f"model with adapters {entry['model_bytes'] / 1e6:.0f} MB"
        )
    print(f"packed over bfloat16: {medians['packed']['seconds'] / medians['bfloat16']['seconds']:.3f} of the time")
    if options.json:
        named = {"threads": options.threads, "batch": options.batch, "seqlen": options.seqlen, "steps": options.steps}
        content = {"hardware": describe_hardware(), "options": named}
        write_json(options.json, content | {"rounds": found, "medians": medians}, sort_keys=False)


if __name__ == "__main__":
    main()
