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
        "range_shrink": 1.0,
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

# What MagR's authors shrink a range to (beta): per channel by width, and in groups by their size, below 4 bits.
_CHANNEL_SHRINKS = {2: 0.8, 3: 0.9}
_GROUP_SHRINKS = {128: 0.95}
# Passes of coordinate descent over the codes of whole channels, COMQ's, which they add to OPTQ there.
_CHANNEL_SWEEPS = 30
_WHOLE_CHANNEL = -1


def magr_options(bits: int, group_size: int) -> dict[str, Any]:
    """Return the options with which MagR's authors run it on a grid (arXiv 2406.00800, and their code).

    Args:
        bits: width of a code.
        group_size: inputs that share a scale; -1 is a whole channel.
    """
    if group_size == _WHOLE_CHANNEL:
        shrink = _CHANNEL_SHRINKS.get(bits, 1.0)
        return {"magr_alpha": 1e-3, "range_shrink": shrink, "sweeps": _CHANNEL_SWEEPS}
    return {"magr_alpha": 1e-4, "range_shrink": _GROUP_SHRINKS.get(group_size, 1.0) if bits < 4 else 1.0}


def preset_options(preset: str, bits: int, group_size: int) -> dict[str, Any]:
    """Return the settings of a preset for a grid: the paper's takes what MagR's authors do with whole channels.

    Args:
        preset: a name in PRESETS.
        bits: width of a code.
        group_size: inputs that share a scale; -1 is a whole channel.
    """
    own = magr_options(bits, group_size) if preset == "paper" and group_size == _WHOLE_CHANNEL else {}
    return {**PRESETS[preset], **own}


# What --demo sets: a small real model and a calibration that two cores finish in minutes.
DEMO: dict[str, Any] = {"model": "smollm2-demo", "bits": 2, "samples": 40, "seqlen": 1024}

# What --demo --finetune sets as well: WikiText-2's validation split is what the demo is calibrated on too, all but
# what the training holds out at its end: 16 sequences, and one that may not be full.
DEMO_RESERVE = 17 * 256
DEMO_FINETUNE: dict[str, Any] = {
    "data": "wikitext2:validation",
    "steps": 60,
    "batch_size": 4,
    "seqlen": 256,
    "eval_every": 20,
    "eval_samples": 16,
}
