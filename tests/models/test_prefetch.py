"""Blocks lent to a device come back as they were, or as the borrower left them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cloq_export.models.blocks import BlockList
from cloq_export.models.prefetch import BlockMover


@pytest.fixture
def blocks() -> BlockList:
    torch.manual_seed(0)
    return BlockList("layers", nn.ModuleList([nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(2)]))


def test_a_block_that_was_left_alone_gets_its_own_tensors_back(blocks):
    mover = BlockMover(blocks, torch.device("cpu"))
    before = {name: tensor.data_ptr() for name, tensor in blocks.modules[1].state_dict().items()}
    values = {name: tensor.clone() for name, tensor in blocks.modules[1].state_dict().items()}
    with mover.lent(1):
        lent = blocks.modules[1].state_dict()
        assert all(lent[name].data_ptr() != place for name, place in before.items())
        assert all(torch.equal(lent[name], value) for name, value in values.items())
    assert {name: tensor.data_ptr() for name, tensor in blocks.modules[1].state_dict().items()} == before


@pytest.mark.parametrize("in_place", [False, True])
def test_what_the_borrower_changed_comes_back(blocks, in_place):
    mover = BlockMover(blocks, torch.device("cpu"))
    linear = blocks.modules[0][0]
    bias = linear.bias.data_ptr()
    with mover.lent(0), torch.no_grad():
        if in_place:
            linear.weight.fill_(7.0)
        else:
            linear.weight.data = torch.full((3, 3), 7.0)
    assert torch.equal(linear.weight, torch.full((3, 3), 7.0))
    assert linear.bias.data_ptr() == bias


def test_a_block_comes_back_when_the_borrower_fails(blocks):
    mover = BlockMover(blocks, torch.device("cpu"))
    place = blocks.modules[0][0].weight.data_ptr()
    with pytest.raises(RuntimeError, match="no more"), mover.lent(0):
        raise RuntimeError("no more")
    assert blocks.modules[0][0].weight.data_ptr() == place
