"""Options that belong together, by name."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # The published setting: MagR before OPTQ, layers independent, one float pass.
    "paper": {
        "method": "magr",
        "grid": "minmax",
        "magr_alpha": 1e-3,
        "damping": 0.01,
        "sweeps": 0,
        "refit": False,
        "split": "paper",
        "error_aware": 0.0,
        "token_weighting": "none",
        "low_rank_rounds": 0,
        "refine": "none",
    },
}

# What --demo sets: a small real model and a calibration that two cores finish in minutes.
DEMO: dict[str, Any] = {"model": "smollm2-demo", "bits": 2, "samples": 40, "seqlen": 1024}

# What --demo --finetune sets beside it: WikiText-2's validation split is what the demo is calibrated on too.
DEMO_FINETUNE: dict[str, Any] = {
    "data": "wikitext2:validation",
    "steps": 60,
    "batch_size": 4,
    "seqlen": 256,
    "eval_every": 20,
    "eval_samples": 16,
}
