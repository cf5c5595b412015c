"""Which linears read the same tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from cloq_export.models.blocks import find_blocks
from cloq_export.models.shared_inputs import shared_inputs
from cloq_export.models.stream import BlockStream

GROUPS = {
    "llama": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ],
    "phi": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"],
        ["self_attn.dense"],
        ["mlp.fc2"],
    ],
    "opt": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.out_proj"],
        ["fc1"],
        ["fc2"],
    ],
    "phi3": [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
}


@pytest.mark.parametrize("family", GROUPS)
def test_groups_of_a_decoder_block(family: str, build_model: Callable[[str], Any], token_windows: torch.Tensor) -> None:
    model = build_model(family)
    blocks = find_blocks(model)
    stream = BlockStream(model, blocks, token_windows, device="cpu", batch=2)
    found = shared_inputs(blocks.modules[1], lambda: stream.forward_block(1, stream.hidden), blocks.prefix(1))
    assert found == [[f"{blocks.prefix(1)}.{name}" for name in group] for group in GROUPS[family]]


def test_experts_of_one_token_set_share_and_unreached_ones_stand_alone_in_their_place(
    build_model: Callable[[str], Any], token_windows: torch.Tensor
) -> None:
    model = build_model("plain-moe")
    mixture = model.model.layers[0].mlp
    mixture.gate.weight.data.zero_()
    groups = shared_inputs(mixture, lambda: mixture(torch.randn(2, 5, 64)))
    chosen = {name.split(".")[1] for group in groups for name in group if len(group) == 2 and "experts" in name}
    assert len(chosen) == 1
    assert ["shared_expert.gate_proj", "shared_expert.up_proj"] in groups
    assert sorted(name for group in groups for name in group) == sorted(
        name for name, module in mixture.named_modules() if isinstance(module, nn.Linear) and name[-4:] != "gate"
    )
    # The shared expert runs first; those without a token stand among the others as they would be executed.
    assert [group[0].split(".")[0] for group in groups[:2]] == ["shared_expert"] * 2
    experts = [group[0] for group in groups[2:]]
    assert len(experts) == 4 * 3 - 1
    assert experts == sorted(experts, key=lambda name: int(name.split(".")[1]))


class Wired(nn.Module):
    def __init__(self, wiring: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.wiring = wiring


def change_in_place(block: Any, x: torch.Tensor) -> None:
    block.a(x)
    x += 1
    block.b(x)


@pytest.mark.parametrize(
    ("wiring", "expected"),
    [
        (lambda block, x: (block.b(x), block.a(x)), [["b", "a"]]),
        (lambda block, x: (block.a(x), block.b(x.clone())), [["a"], ["b"]]),
        (lambda block, x: (block.a(x.view(4, 4)), block.b(x.view(4, 4))), [["a", "b"]]),
        (lambda block, x: (block.a(x), block.b(x[:1])), [["a"], ["b"]]),
        (lambda block, x: block.b(block.a(x)), [["a"], ["b"]]),
        (lambda block, x: (block.a(x), block.b(x), block.b(x + 1)), [["a"], ["b"]]),
        (change_in_place, [["a"], ["b"]]),
        (lambda block, x: [block.a(x + 1), block.b(x + 2)], [["a"], ["b"]]),
        (lambda block, x: None, [["a"], ["b"]]),
    ],
)
def test_identity_counts_and_not_equality(wiring: Callable[..., Any], expected: list[list[str]]) -> None:
    block = Wired(wiring)
    with torch.no_grad():
        assert shared_inputs(block, lambda: wiring(block, torch.ones(2, 2, 4))) == expected


def test_hooks_are_removed_even_after_an_error() -> None:
    def fail(block: Any, x: torch.Tensor) -> None:
        raise RuntimeError

    block = Wired(fail)
    with pytest.raises(RuntimeError):
        shared_inputs(block, lambda: fail(block, torch.ones(1)))
    assert not block.a._forward_pre_hooks
