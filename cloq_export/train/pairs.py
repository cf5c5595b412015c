"""Put LoRA pairs into a model that trains, and take them out of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from cloq_export.adapt import stored_pair
from cloq_export.types import LoraPair


def zero_pairs(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], seed: int) -> dict[str, LoraPair]:
    """Return pairs that change nothing yet: A uniform in `+-1/sqrt(in)` as PEFT draws it, B zero, scaling 1.

    Args:
        shapes: full module name -> (out, in).
        ranks: full module name -> rank.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, (out_features, in_features) in shapes.items():
        rank = min(ranks[name], out_features, in_features)
        # Kaiming's uniform distribution with a = sqrt(5).
        lora_a = (2 * torch.rand(rank, in_features, generator=generator) - 1) / math.sqrt(in_features)
        pairs[name] = LoraPair(lora_a, torch.zeros(out_features, rank), float(rank))
    return pairs


def trained_pairs(model: nn.Module, alphas: Mapping[str, float], dtype: torch.dtype) -> dict[str, LoraPair]:
    """Return the pairs of a model that PEFT wrapped under the name "default".

    Args:
        model: with its adapter.
        alphas: full module name -> alpha.
        dtype: in which the pairs are stored, see `stored_pair`.

    Raises:
        NonFiniteError: an entry is NaN or Inf.
    """
    pairs = {}
    for name, alpha in alphas.items():
        layer: Any = model.get_submodule(name)
        lora_a, lora_b = (side["default"].weight.detach().to("cpu") for side in (layer.lora_A, layer.lora_B))
        pairs[name] = stored_pair(lora_a, lora_b, dtype, alpha=alpha)
    return pairs


def place_pairs(model: nn.Module, pairs: Mapping[str, LoraPair]) -> None:
    """Put pairs, as they are stored, into a model that PEFT wrapped under the name "default".

    Args:
        model: with its adapter.
        pairs: full module name -> pair.
    """
    with torch.no_grad():
        for name, pair in pairs.items():
            layer: Any = model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(pair.lora_A)
            layer.lora_B["default"].weight.copy_(pair.lora_B)
