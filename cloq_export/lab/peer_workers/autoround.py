"""Run AutoRound on a job, with its default iterations; this file runs in AutoRound's own environment."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

from peak_memory import PeakMemory


def main() -> None:
    """Read the job, quantize, and write where the checkpoint is."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"], trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, trust_remote_code=False)
    windows = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row))} for row in job["windows"]]
    memory = PeakMemory()
    started = time.perf_counter()
    rounding = AutoRound(
        model,
        tokenizer,
        bits=job["bits"],
        group_size=job["group_size"],
        sym=False,
        dataset=windows,
        nsamples=len(windows),
        seqlen=len(job["windows"][0]),
        seed=job["seed"],
        device_map="cuda" if torch.cuda.is_available() else "cpu",
    )
    rounding.quantize()
    seconds = time.perf_counter() - started
    # Its own format: what it writes as auto_gptq cannot hold a zero of 0.
    rounding.save_quantized(job["out"], format="auto_round", inplace=True)
    written = sorted(path.parent for path in Path(job["out"]).rglob("config.json"))
    report = {
        "checkpoint": str(written[0]),
        "seconds": seconds,
        "memory_beyond_model_bytes": memory.beyond(),
        "versions": {name: importlib.metadata.version(name) for name in ("auto-round", "torch", "transformers")},
    }
    Path(sys.argv[2]).write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main()
