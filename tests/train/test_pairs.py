"""LoRA pairs that begin a training, and those that come out of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from cloq_export.errors import NonFiniteError
from cloq_export.train.pairs import place_pairs, trained_pairs, zero_pairs
from cloq_export.types import LoraPair

SHAPES, RANKS = {"a": (6, 4), "b": (6, 400)}, {"a": 64, "b": 64}


class Wrapped(nn.Module):
    """A linear as PEFT wraps it, under the name "default"."""

    def __init__(self, pair: LoraPair) -> None:
        super().__init__()
        rank, in_features = pair.lora_A.shape
        self.lora_A = nn.ModuleDict({"default": nn.Linear(in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, pair.lora_B.shape[0], bias=False)})


def test_zero_pairs_change_nothing_and_depend_on_the_seed() -> None:
    pairs = zero_pairs(SHAPES, RANKS, 0)
    assert pairs["a"].rank == 4
    assert pairs["b"].product().abs().max() == 0
    # Uniform within 1/sqrt(in), so its standard deviation is that over sqrt(3); drawn 24,000 times, to 1%.
    assert pairs["b"].lora_A.abs().max() <= 0.05
    assert float(pairs["b"].lora_A.std()) == pytest.approx(0.05 / math.sqrt(3), rel=0.02)
    assert torch.equal(pairs["b"].lora_A, zero_pairs(SHAPES, RANKS, 0)["b"].lora_A)
    assert not torch.equal(pairs["b"].lora_A, zero_pairs(SHAPES, RANKS, 1)["b"].lora_A)


def test_what_is_placed_comes_out_again() -> None:
    pairs = {name: LoraPair(torch.randn(3, 5), torch.randn(7, 3), 6.0) for name in ("a", "b")}
    model: Any = nn.ModuleDict({name: Wrapped(pair) for name, pair in pairs.items()})
    place_pairs(model, pairs)
    back = trained_pairs(model, {"a": 6.0, "b": 6.0}, torch.float32)
    for name, pair in pairs.items():
        assert torch.equal(back[name].product(), pair.product())
        assert back[name].alpha == 6.0
    model["b"].lora_B["default"].weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError):
        trained_pairs(model, {"a": 6.0, "b": 6.0}, torch.float32)
