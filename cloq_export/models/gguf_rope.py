"""How a GGUF file scales rotary embeddings, put into the config that transformers reads.

llama.cpp divides the frequency of each rotation by a factor of its own where a file holds a tensor of them (Llama 3.1
and later: its converter computes the factors from the llama3 rule and keeps only these), and scales all of them where
the header names a type. transformers reads neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cloq_export.errors import UnsupportedModelError
from cloq_export.models.gguf_file import REMEDY, ROPE_FACTORS, GgufFile

# (low_freq_factor, high_freq_factor, original_max_position_embeddings) of every Llama 3.
_LLAMA3 = (1.0, 4.0, 8192)
# Factors of models with the llama3 rule, where no wavelength of a file is long enough to show its own.
_LLAMA3_FACTORS = (8.0, 32.0, 16.0, 4.0, 2.0)
# The rule in float64 against a rule in float32 that was written with 24 bits.
_SAME = 3e-6
# Of llama.cpp, where the header is silent.
_YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}


def read_rope_scaling(file: GgufFile, config: Any) -> None:
    """Let a config say how a GGUF file scales its rotary embeddings.

    Args:
        file: the file.
        config: as transformers made it of the header; it is changed.

    Raises:
        UnsupportedModelError: the file has factors for rotations that the config has no place for.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    factors = file.rope_factors()
    # Configs with several ropes, or with a scaling that transformers made itself, are only checked (`gguf_header`).
    plain = "rope_theta" in rope and rope.get("rope_type", "default") == "default"
    if factors is None:
        scaling = _header_scaling(file.own) if plain else {}
    elif not plain or factors.ndim != 1 or 2 * len(factors) != _rotated(text, rope):
        raise UnsupportedModelError(
            f"{file.name} holds 1 tensor of factors for rotations ({ROPE_FACTORS}) of shape {factors.shape}, and "
            "the config that transformers makes of its header has no place for it: it would compute something else. "
            f"{REMEDY}."
        )
    else:
        scaling = _factor_scaling(factors.astype(np.float64), rope["rope_theta"], text.max_position_embeddings)
    if scaling:
        text.rope_parameters = {**rope, **scaling}


def _header_scaling(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scaling of a header's type and factor; none where the header has no such type or scales by one."""
    # Both defaults are llama.cpp's.
    kind = own.get("rope.scaling.type", "linear")
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 0.0)) or 1.0
    if factor == 1.0 or kind not in ("linear", "yarn"):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    original = own.get("rope.scaling.original_context_length") or own.get("context_length")
    betas = {name: own.get(f"rope.scaling.yarn_{name}", default) for name, default in _YARN_BETAS.items()}
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **betas}


def _factor_scaling(factors: np.ndarray, theta: float, context: int) -> dict[str, Any]:
    """Return the scaling that divides each frequency by its factor: the llama3 rule if it does, else a list of them."""
    wavelengths = 2 * math.pi * theta ** (np.arange(len(factors)) / len(factors))
    for factor, low, high, original in _llama3_candidates(factors, wavelengths):
        if np.allclose(_llama3_factors(wavelengths, factor, low, high, original), factors, rtol=_SAME, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    # Below and above the original context alike, and no other scale of attention.
    listed = factors.tolist()
    return {
        "rope_type": "longrope",
        "short_factor": listed,
        "long_factor": listed,
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }


def _llama3_candidates(
    factors: np.ndarray, wavelengths: np.ndarray
) -> Iterator[tuple[float, float, float, int | float]]:
    """Yield (factor, low_freq_factor, high_freq_factor, original context) that factors may have been made from."""
    largest = float(factors.max())
    # A factor such as 8 was stored in 32 bits, and is whole.
    largest = float(round(largest)) if math.isclose(largest, round(largest), rel_tol=_SAME) else largest
    for factor in (largest, *_LLAMA3_FACTORS):
        yield factor, *_LLAMA3
    between = (factors > 1 + _SAME) & (factors < largest * (1 - _SAME))
    if largest <= 1 or between.sum() < 2:
        return
    # The share s of the unscaled frequency is linear in 1/wavelength: s = (original/wavelength - low) / (high - low).
    # Only the ratios of original, low and high count, so low is one.
    share = (1 / factors[between] - 1 / largest) / (1 - 1 / largest)
    slope, intercept = np.polyfit(1 / wavelengths[between], share, 1).tolist()
    if intercept >= 0 or slope <= 0:
        return
    high = 1 - 1 / intercept
    original = slope * (high - 1)
    yield largest, 1.0, round(high, 3), round(original)
    yield largest, 1.0, high, original


def _llama3_factors(wavelengths: np.ndarray, factor: float, low: float, high: float, original: float) -> np.ndarray:
    """Return what the llama3 rule divides each frequency by.

    With s = (original/wavelength - low) / (high - low), it is 1 / ((1 - s) / factor + s) for s between 0 and 1, else 1
    or `factor` (transformers, `_compute_llama3_parameters`).
    """
    share = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return 1 / ((1 - share) / factor + share)


def _rotated(text: Any, rope: Mapping[str, Any]) -> int:
    """Return how many dimensions of a head are rotated."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(head * rope.get("partial_rotary_factor", 1.0))
