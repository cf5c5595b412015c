"""Fused experts as linear layers: the same function in every family, and refused by name where it would be another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_mixtures import EXPERTS, INNER, MIXTURES, WIDTH, build_mixture
from torch import nn

from cloq_export.errors import UnsupportedModelError
from cloq_export.models.blocks import find_blocks, find_linears
from cloq_export.models.experts import (
    Calls,
    SplitExperts,
    calling_experts,
    fused_experts,
    holds_fused_experts,
    split_experts,
    split_fault,
)

families = pytest.mark.parametrize("family", MIXTURES)
# Sums over an expert's tokens come in another order; of logits with a spread of about one.
TOLERANCE = 2e-5


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


def mixtures_of(model: nn.Module) -> dict[str, SplitExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SplitExperts)}


@families
def test_split_experts_compute_what_their_family_computes(family: str) -> None:
    model = build_mixture(family)
    expected, before = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    split_experts(model)
    assert mixtures_of(model)
    assert not any(holds_fused_experts(module) for module in model.modules())
    calls: tuple[Calls, ...] = ("routed", "visited", "all")
    for called in calls:
        with calling_experts(model, called):
            assert (logits(model) - expected).abs().max() <= TOLERANCE * expected.std(), called
    with fused_experts(model):
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert (logits(model) - expected).abs().max() <= TOLERANCE * expected.std()
    assert mixtures_of(model), "the experts are split again afterwards"


@families
def test_linears_of_experts_are_those_of_a_block_and_routers_are_not(family: str) -> None:
    model = build_mixture(family)
    split_experts(model)
    blocks = find_blocks(model)
    found = {
        name: linear
        for index, block in enumerate(blocks)
        for name, linear in find_linears(block, blocks.prefix(index)).items()
    }
    for name, mixture in mixtures_of(model).items():
        parts = [part for parts in mixture.parts.values() for part in parts]
        for number in range(EXPERTS):
            shapes = {part: tuple(found[f"{name}.{number}.{part}"].weight.shape) for part in parts}
            assert shapes == {part: (WIDTH, INNER) if part == "down_proj" else (INNER, WIDTH) for part in parts}
    assert not [name for name in found if name.endswith((".gate", ".router", "shared_expert_gate"))]


def test_concatenated_weights_are_cut_without_a_copy() -> None:
    model = build_mixture("mixtral")
    places = {name: tensor.data_ptr() for name, tensor in model.named_parameters() if "gate_up_proj" in name}
    split_experts(model)
    for name, place in places.items():
        mixture = model.get_submodule(name.rpartition(".")[0])
        assert mixture[0].gate_proj.weight.data_ptr() == place


@pytest.mark.parametrize(
    ("calls", "tokens"),
    [("routed", {1: 2, 3: 2}), ("visited", {0: 0, 1: 2, 2: 0, 3: 2}), ("all", dict.fromkeys(range(4), 2))],
)
def test_which_experts_are_called(calls: Calls, tokens: dict[int, int]) -> None:
    model = build_mixture("mixtral")
    split_experts(model)
    mixture = mixtures_of(model)["model.layers.0.mlp.experts"]
    called: dict[int, int] = {}
    for number, expert in enumerate(mixture):
        expert.gate_proj.register_forward_pre_hook(
            lambda _, args, number=number: called.__setitem__(number, len(args[0]))
        )
    with calling_experts(model, calls):
        mixture(torch.randn(2, WIDTH), torch.tensor([[1, 3], [3, 1]]), torch.full((2, 2), 0.5))
    assert called == tokens
    assert mixture.calls == "routed"


def test_llama4_counts_the_tokens_of_each_expert_alone() -> None:
    model = build_mixture("llama4")
    split_experts(model)
    seen: dict[str, int] = {}
    name, mixture = next(iter(mixtures_of(model).items()))
    for number, expert in enumerate(mixture):
        expert.up_proj.register_forward_pre_hook(
            lambda _, args, number=number: seen.__setitem__(str(number), len(args[0]))
        )
    logits(model)
    assert name == "model.layers.1.feed_forward.experts"
    assert sum(seen.values()) == 2 * 12


class _Odd(nn.Module):
    """Experts whose class computes something of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER))
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return x.clone()


class _Wide(_Odd):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER + 1))


class _More(_Odd):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(EXPERTS))


class _Uncalled(_Odd):
    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, more: Any) -> torch.Tensor:
        return x


def _cases() -> Iterator[Any]:
    yield pytest.param(
        _Odd, r"as linear layers they compute something else, \S+ apart where 0\.0001 is allowed", id="odd"
    )
    yield pytest.param(
        _Wide, r"gate_up_proj of shape \(4, 64, 64\) does not fit down_proj of shape \(4, 64, 33\)", id="wide"
    )
    yield pytest.param(_More, r"its class holds gate_up_proj, down_proj, scale, and gate_up_proj or up_proj", id="more")
    yield pytest.param(_Uncalled, r"not called with tokens, chosen experts and weights \(TypeError\)", id="uncalled")


@pytest.mark.parametrize(("kind", "reason"), list(_cases()))
def test_what_cannot_be_split_stays_and_is_refused_with_the_reason(kind: type[nn.Module], reason: str) -> None:
    block = nn.Module()
    block.experts = kind()
    block.linear = nn.Linear(4, 4)
    split_experts(block)
    assert type(block.experts) is kind
    assert split_fault(block.experts) is not None
    with pytest.raises(UnsupportedModelError, match=rf"b\.experts \({kind.__name__}\) holds all experts .*{reason}"):
        find_linears(block, "b")
