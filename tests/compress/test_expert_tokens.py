"""Experts that saw too few tokens are given some of their block's, as they would meet them."""

from __future__ import annotations

import pytest
import torch
from tiny_mixtures import EXPERTS, INNER, WIDTH, build_mixture
from torch import nn

from cloq_export.calibrate.gram import GramAccumulator
from cloq_export.compress.expert_tokens import ExpertTokens
from cloq_export.models.experts import SplitExperts, split_experts
from cloq_export.types import LayerStats

NAME = "model.layers.0.mlp.experts"


@pytest.fixture
def block() -> nn.Module:
    model = build_mixture("mixtral")
    split_experts(model)
    return model.model.layers[0]  # type: ignore[no-any-return]


def gram_of(tokens: torch.Tensor) -> LayerStats:
    accumulator = GramAccumulator(tokens.shape[1])
    accumulator.add(tokens)
    return accumulator.stats()


def batches(count: int, tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(tokens, WIDTH, generator=generator) for _ in range(count)]


def filled(block: nn.Module, inputs: list[torch.Tensor]) -> ExpertTokens:
    tokens = ExpertTokens(block, "model.layers.0", len(inputs))
    for batch in inputs:
        tokens.keep(NAME, batch)
    return tokens


@pytest.mark.parametrize("own", [0, 10])
@pytest.mark.parametrize(("projection", "width"), [("gate_proj", WIDTH), ("down_proj", INNER)])
def test_what_is_lent_fills_up_to_the_width(block: nn.Module, projection: str, width: int, own: int) -> None:
    inputs = batches(2, 16)  # fewer in all than the width: all are kept
    expert = block.mlp.experts[2]
    every = torch.cat(inputs)
    mine = torch.randn(own, width, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        met = every if projection == "gate_proj" else expert.activated(every)
    stats = filled(block, inputs).completed(f"{NAME}.2.{projection}", gram_of(mine), lambda: GramAccumulator(width))
    assert (stats.tokens, stats.lent_tokens) == (own, width - own)
    expected = mine.T @ mine + (met.T @ met) * ((width - own) / len(every))
    torch.testing.assert_close(stats.gram, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_who_saw_enough_or_is_no_expert_is_lent_nothing(block: nn.Module) -> None:
    tokens = filled(block, batches(2, 16))
    enough = gram_of(torch.randn(WIDTH, WIDTH))
    assert tokens.completed(f"{NAME}.2.gate_proj", enough, lambda: GramAccumulator(WIDTH)) is enough
    few = gram_of(torch.randn(3, WIDTH))
    assert tokens.completed("model.layers.0.self_attn.q_proj", few, lambda: GramAccumulator(WIDTH)) is few


def test_a_sample_is_spread_over_all_batches(block: nn.Module) -> None:
    tokens = ExpertTokens(block, "model.layers.0", 4)
    seen: list[int] = []
    mixture = tokens.mixtures[NAME]
    with tokens.watching():
        for number, batch in enumerate(batches(4, 100)):
            marked = torch.cat([torch.full((100, 1), float(number)), batch[:, 1:]], 1)
            mixture(marked, torch.zeros(100, 1, dtype=torch.int64), torch.ones(100, 1))
    mixture[1].gate_proj.register_forward_pre_hook(lambda _, args: seen.extend(args[0][:, 0].int().tolist()))
    tokens.completed(f"{NAME}.1.down_proj", gram_of(torch.zeros(0, INNER)), lambda: GramAccumulator(INNER))
    assert seen == sorted([*range(4)] * (WIDTH // 4))


def test_tokens_of_llama4_are_lent_as_its_experts_meet_them() -> None:
    model = build_mixture("llama4")
    split_experts(model)
    layer = model.model.layers[1]
    tokens = ExpertTokens(layer, "model.layers.1", 1)
    with tokens.watching(), torch.no_grad():
        layer.feed_forward(torch.randn(1, 20, WIDTH, generator=torch.Generator().manual_seed(1)))
    name = "model.layers.1.feed_forward.experts"
    whole = tokens.completed(f"{name}.0.gate_proj", gram_of(torch.zeros(0, WIDTH)), lambda: GramAccumulator(WIDTH))
    routed = torch.zeros(WIDTH, WIDTH)
    for expert in range(EXPERTS):
        mixture: SplitExperts = tokens.mixtures[name]
        rows: list[torch.Tensor] = []
        handle = mixture[expert].gate_proj.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0]))
        with torch.no_grad():
            layer.feed_forward(torch.randn(1, 20, WIDTH, generator=torch.Generator().manual_seed(1)))
        handle.remove()
        routed += sum((x.T @ x for x in rows), torch.zeros(WIDTH, WIDTH))
    torch.testing.assert_close(whole.gram, routed * (WIDTH / 20), rtol=1e-4, atol=1e-4 * float(routed.abs().max()))
