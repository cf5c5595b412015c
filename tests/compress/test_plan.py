"""What cannot be quantized is refused before anything is computed."""

from __future__ import annotations

import re

import pytest
from torch import nn

from cloq_export.compress.left_float import describe_left_float
from cloq_export.compress.plan import make_plan, plan_for_codes
from cloq_export.errors import ShapeError, UnsupportedModelError
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
def test_a_weight_that_blocks_share_is_planned_once_and_gets_no_adapter(make) -> None:
    blocks = BlockList("layers", list(make()))
    recipe = Recipe(group_size=32, rank=4)
    plan = make_plan(blocks, recipe)
    assert list(plan.modules) == ["layers.0.up_proj", "layers.0.down_proj", "layers.1.down_proj"]
    assert plan.copies == {"layers.1.up_proj": "layers.0.up_proj"}
    assert plan.unadapted == {"layers.0.up_proj": "several blocks share its weight"}
    assert [planned.rank for planned in plan.modules.values()] == [0, 4, 4]
    assert plan_for_codes(blocks, {"layers.0.up_proj": QuantSpec(4, 32)}, recipe).copies == plan.copies


def test_a_weight_that_one_block_has_twice_is_refused() -> None:
    block = Block()
    block.down_proj.weight = block.up_proj.weight
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.up_proj and layers\.0\.down_proj share one weight"):
        make_plan(BlockList("layers", [block]), Recipe(group_size=32, rank=4))


def of_gates(hidden_size: int, model_type: str = "") -> BlockList:
    block = nn.Module()
    block.in_proj = nn.Linear(hidden_size, hidden_size, bias=False)
    block.in_proj_a = nn.Linear(hidden_size, 4, bias=False)
    block.dt_proj = nn.Linear(32, hidden_size, bias=False)
    block.odd = nn.Linear(hidden_size, 28, bias=False)
    block.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
    return BlockList("layers", [block], hidden_size, model_type)


def test_gates_and_layers_that_do_not_fit_stay_float_by_themselves_with_a_reason() -> None:
    plan = make_plan(of_gates(256), Recipe(group_size=32, rank=16))
    assert set(plan.modules) == {"layers.0.in_proj", "layers.0.out_proj"}
    assert plan.spared == {
        "layers.0.in_proj_a": "a gate of 4 outputs",
        "layers.0.dt_proj": "its weight is multiplied without the layer being called",
        "layers.0.odd": "28 outputs; the GPTQ layout stores 4-bit codes in whole 32-bit words, so outputs must "
        "be a multiple of 8",
    }
    said = describe_left_float(plan)
    assert len(said) == 1
    assert re.match(r"3 of 5 linear layers stay float by themselves, 11\.11% of their weights: in_proj_a \(", said[0])


def test_a_grid_that_was_asked_for_a_layer_is_not_taken_back() -> None:
    blocks = of_gates(256)
    recipe = Recipe(group_size=32, rank=4, overrides={"*.odd": {"bits": 4}})
    with pytest.raises(ShapeError, match=r"layers\.0\.odd has 28 outputs"):
        make_plan(blocks, recipe)
    asked = Recipe(group_size=32, rank=4, overrides={"*.in_proj_a": {"bits": 8}})
    assert asked.override_for("layers.0.in_proj_a")
    assert "layers.0.in_proj_a" in make_plan(blocks, asked).modules


def test_layers_that_peft_refuses_get_no_adapter() -> None:
    plan = make_plan(of_gates(256, "mamba2"), Recipe(group_size=32, rank=16))
    assert plan.modules["layers.0.out_proj"].rank == 0
    assert plan.modules["layers.0.in_proj"].rank == 16
    assert "out_proj (PEFT refuses it in models of the type mamba2)" in describe_left_float(plan)[1]


def test_a_small_layer_gets_a_smaller_rank() -> None:
    block = nn.Module()
    block.up_proj = nn.Linear(256, 256, bias=False)
    block.small = nn.Linear(64, 32, bias=False)
    plan = make_plan(BlockList("layers", [block], 256), Recipe(group_size=32, rank=64))
    assert [planned.rank for planned in plan.modules.values()] == [64, 32]
