"""Run GPTQModel on a job, with EoRA where a rank is asked for; this file runs in GPTQModel's own environment."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

from peak_memory import PeakMemory


def main() -> None:
    """Read the job, quantize, and write where the checkpoint and the adapter are."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    _do_without_torchvision()
    from gptqmodel import GPTQModel, QuantizeConfig

    options: dict[str, Any] = {"bits": job["bits"], "group_size": job["group_size"], "sym": False}
    adapter = None
    if job["rank"]:
        _pack_without_the_parents_lock()
        from gptqmodel.adapter.adapter import Lora

        adapter = Lora(path=str(Path(job["out"]) / "eora"), rank=job["rank"])
        options["adapter"] = adapter
    config = QuantizeConfig(**options, format="gptq_v2", offload_to_disk=False, wait_for_submodule_finalizers=True)
    model = GPTQModel.load(job["model"], config, trust_remote_code=False)
    calibration = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job["windows"]]
    memory = PeakMemory()
    started = time.perf_counter()
    model.quantize(calibration, batch_size=1)
    seconds = time.perf_counter() - started
    checkpoint = Path(job["out"]) / "checkpoint"
    model.save(str(checkpoint))
    report = {
        "checkpoint": str(checkpoint),
        "seconds": seconds,
        "memory_beyond_model_bytes": memory.beyond(),
        "versions": {name: importlib.metadata.version(name) for name in ("gptqmodel", "torch", "transformers")},
    }
    if adapter is not None:
        adapters = sorted(path.parent for path in Path(job["out"]).rglob("adapter_config.json"))
        report["adapter"] = str(adapters[0])
    Path(sys.argv[2]).write_text(json.dumps(report), encoding="utf-8")


def _do_without_torchvision() -> None:
    """Let GPTQModel be imported without torchvision, which it does not require but imports for one vision model."""
    try:
        import torchvision  # noqa: F401
    except Exception:  # a build for another torch may raise anything
        stand_in = types.ModuleType("gptqmodel.models.definitions.internvl_chat")
        stand_in.InternVLChatQModel = type("InternVLChatQModel", (), {})  # type: ignore[attr-defined]
        sys.modules[stand_in.__name__] = stand_in


def _pack_without_the_parents_lock() -> None:
    """Keep two threads of GPTQModel 7.3.2 from waiting for each other forever, as they do with EoRA.

    One packs a layer while it holds the lock of the layer's parent and waits for the processor's; the other restores a
    layer's weight while it holds the processor's and waits for the parent's. Packing does not need the parent's: the
    processor's guards the same.
    """
    from gptqmodel.looper import gptq_processor

    gptq_processor.parent_module_lock = lambda _: contextlib.nullcontext()


if __name__ == "__main__":
    main()
