"""What cannot be quantized is refused before anything is computed."""

from __future__ import annotations

import pytest
from torch import nn

from cloq_export.compress.plan import make_plan, plan_for_codes
from cloq_export.errors import UnsupportedModelError
from cloq_export.models.blocks import BlockList
from cloq_export.recipe import Recipe
from cloq_export.types import QuantSpec


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(64, 64, bias=False)
        self.down_proj = nn.Linear(64, 64, bias=False)


def shared_parameter() -> nn.ModuleList:
    blocks = nn.ModuleList([Block(), Block()])
    blocks[1].up_proj.weight = blocks[0].up_proj.weight
    return blocks


def shared_module() -> nn.ModuleList:
    blocks = nn.ModuleList([Block(), Block()])
    blocks[1].up_proj = blocks[0].up_proj
    return blocks


@pytest.mark.parametrize("make", [shared_parameter, shared_module])
def test_a_weight_that_blocks_share_is_refused_or_stays_float(make) -> None:
    blocks = BlockList("layers", list(make()))
    recipe = Recipe(group_size=32, rank=4)
    message = r"layers\.0\.up_proj and layers\.1\.up_proj share one weight.*--override 'layers\.0\.up_proj:skip=true'"
    with pytest.raises(UnsupportedModelError, match=message):
        make_plan(blocks, recipe)
    with pytest.raises(UnsupportedModelError, match="share one weight"):
        plan_for_codes(blocks, {"layers.1.up_proj": QuantSpec(4, 32)}, recipe)
    kept = {f"layers.{number}.up_proj": {"skip": True} for number in (0, 1)}
    assert set(make_plan(blocks, recipe.changed({"overrides": kept})).modules) == {
        "layers.0.down_proj",
        "layers.1.down_proj",
    }
