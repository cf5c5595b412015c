"""Finding blocks and linear layers."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from cloq_export.errors import UnsupportedModelError
from cloq_export.models.blocks import BlockList, find_blocks, find_linears

NAMES = {
    "llama": "model.layers",
    "qwen3": "model.layers",
    "gpt-neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
    "falcon": "transformer.h",
    "gpt2": "transformer.h",
    "plain-moe": "model.layers",
}


@pytest.mark.parametrize("family", NAMES)
def test_blocks_are_found(family: str, build_model: Callable[[str], Any]) -> None:
    model = build_model(family)
    blocks = find_blocks(model)
    assert blocks.name == NAMES[family]
    assert len(blocks) == model.config.num_hidden_layers
    assert [model.get_submodule(blocks.prefix(index)) for index in range(len(blocks))] == list(blocks)


def test_a_named_list_is_taken(build_model: Callable[[str], Any]) -> None:
    assert len(find_blocks(build_model("llama"), "model.layers")) == 3


@pytest.mark.parametrize("path", ["model.blocks", "model.norm", "lm_head.weight", "model"])
def test_a_wrong_name_lists_the_candidates(path: str, build_model: Callable[[str], Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"model\.layers \(3 blocks\).* `blocks`"):
        find_blocks(build_model("llama"), path)


class TwoTowers(nn.Module):
    def __init__(self, one: int, other: int, layers: int) -> None:
        super().__init__()
        self.image = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(one)])
        self.text = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(other)])
        self.config = types.SimpleNamespace(num_hidden_layers=layers)


def test_the_configured_length_decides_between_lists() -> None:
    assert find_blocks(TwoTowers(5, 3, 3)).name == "text"


def test_the_decoder_that_a_model_names_decides_between_lists_of_one_length() -> None:
    model = TwoTowers(3, 3, 3)
    model.language = nn.Module()
    model.language.layers = model.text
    del model.text
    model.get_decoder = lambda: model.language
    assert find_blocks(model).name == "language.layers"


def test_lists_that_cannot_be_told_apart_are_refused_with_the_option_to_use() -> None:
    with pytest.raises(
        UnsupportedModelError,
        match=r"decoder blocks of TwoTowers were not recognised; .*image \(3 blocks\), text \(3 blocks\).*"
        r"`blocks=model\.layers",
    ):
        find_blocks(TwoTowers(3, 3, 3))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no list of modules with linear layers exists"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))


def test_encoder_decoders_are_refused() -> None:
    model = TwoTowers(3, 3, 3)
    model.config = types.SimpleNamespace(is_encoder_decoder=True)
    with pytest.raises(UnsupportedModelError, match="TwoTowers is an encoder-decoder"):
        find_blocks(model)


@pytest.mark.parametrize("family", ["llama-tied", "opt", "gpt-neox", "phi3"])
def test_linears_carry_full_names_and_exclude_embeddings_and_head(
    family: str, build_model: Callable[[str], Any]
) -> None:
    model = build_model(family)
    blocks = find_blocks(model)
    found = {
        name: module
        for index, block in enumerate(blocks)
        for name, module in find_linears(block, blocks.prefix(index)).items()
    }
    outside = {"lm_head", "embed_out", "model.decoder.project_in", "model.decoder.project_out"}
    expected = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in outside]
    assert list(found) == expected
    assert all(model.get_submodule(name) is module for name, module in found.items())


def test_routers_stay_float(build_model: Callable[[str], Any]) -> None:
    block = find_blocks(build_model("plain-moe")).modules[1]
    names = {name.removeprefix("model.layers.1.mlp.") for name in find_linears(block, "model.layers.1")}
    assert not names & {"gate", "shared_expert_gate"}
    assert {"experts.0.gate_proj", "experts.3.down_proj", "shared_expert.up_proj"} <= names


def test_a_router_inside_a_module_is_found_by_name_or_by_its_width() -> None:
    block = nn.Module()
    block.experts = nn.ModuleList([nn.Linear(8, 16) for _ in range(4)])
    block.router = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    block.selector = nn.Linear(8, 4)
    block.project = nn.Linear(8, 8)
    assert list(find_linears(block, "b")) == ["b.experts.0", "b.experts.1", "b.experts.2", "b.experts.3", "b.project"]


def test_experts_stacked_in_a_matrix_are_refused_by_name() -> None:
    block = nn.Module()
    block.linear = nn.Linear(4, 4)
    block.experts = nn.Module()
    block.experts.mlp = nn.Module()
    block.experts.mlp.w1 = nn.Parameter(torch.zeros(32, 8))
    message = r"b\.experts\.mlp \(Module\) holds all experts in one tensor, .*: its class holds w1, and gate_up_proj or"
    with pytest.raises(UnsupportedModelError, match=message):
        find_linears(block, "b")


class _Turned(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight


class _Written(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight.T + self.bias


def test_a_class_that_uses_its_weight_otherwise_stays_float() -> None:
    block = nn.ModuleDict({"turned": _Turned(8, 8), "written": _Written(8, 8), "routing": _Turned(8, 4)})
    assert list(find_linears(block, "b")) == ["b.written"]


def test_convolutions_are_no_experts() -> None:
    block = nn.Module()
    block.conv = nn.Conv1d(4, 4, 3)
    block.linear = nn.Linear(4, 4)
    assert list(find_linears(block, "b")) == ["b.linear"]


def test_gpt2_is_refused_by_name(build_model: Callable[[str], Any]) -> None:
    block = find_blocks(build_model("gpt2")).modules[0]
    with pytest.raises(UnsupportedModelError, match=r"transformer\.h\.0\.attn\.c_attn is a transformers Conv1D"):
        find_linears(block, "transformer.h.0")


def test_a_block_without_linears_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"x\.0 \(LayerNorm\) holds no torch\.nn\.Linear"):
        find_linears(nn.LayerNorm(4), "x.0")


def test_block_list_is_a_sized_iterable() -> None:
    blocks = BlockList("h", [nn.Linear(2, 2), nn.Linear(2, 2)])
    assert len(blocks) == len(list(blocks)) == 2
    assert blocks.prefix(1) == "h.1"
