"""Embeddings that look rows up in packed codes."""

from __future__ import annotations

import copy

import pytest
import torch
from random_layers import make_layer
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from cloq_export.engines.packed_embedding import PackedRows, pack_embedding
from cloq_export.errors import ShapeError
from cloq_export.types import QuantSpec

IDS = torch.tensor([[3, 0, 3], [16, 7, 0]])


def packed(
    spec: QuantSpec, rows: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[PackedRows, torch.Tensor]:
    layer = make_layer(spec, rows, width)
    # The number of a token for padding is above the number of rows of a lookup.
    embedding = nn.Embedding(rows, width, padding_idx=rows - 1)
    return pack_embedding(embedding, layer, dtype), layer.dequantize()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "width", "group"), [(17, 64, 32), (32, 40, -1), (17, 24, 8)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_are_those_of_the_dequantized_table(bits: int, rows: int, width: int, group: int, symmetric: bool) -> None:
    embedding, table = packed(QuantSpec(bits, group, symmetric), rows, width)
    assert torch.equal(embedding(IDS % rows), table[IDS % rows])
    assert torch.equal(embedding.dequantize(), table)
    assert torch.equal(embedding.weight @ torch.ones(width), table @ torch.ones(width))
    assert (embedding.weight.shape, embedding.weight.dtype) == (table.shape, torch.float32)
    assert not list(embedding.parameters())


def test_no_token_is_looked_up_as_no_row() -> None:
    embedding, _ = packed(QuantSpec(4, 32, symmetric=True), 17, 64)
    assert embedding(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 64)


def test_what_the_class_does_beside_stays_its_own() -> None:
    layer = make_layer(QuantSpec(8, 32, symmetric=True), 17, 64)
    family = Gemma3TextScaledWordEmbedding(17, 64, 0, embed_scale=8.0)
    expected = copy.deepcopy(family)
    expected.weight = nn.Parameter(layer.dequantize())
    embedding = pack_embedding(family, layer, torch.float32)
    assert isinstance(embedding, Gemma3TextScaledWordEmbedding)
    assert torch.equal(embedding(IDS), expected(IDS))


def test_a_cast_changes_what_is_given_and_not_the_scales() -> None:
    embedding, table = packed(QuantSpec(4, 32, symmetric=True), 17, 64)
    embedding = embedding.to(torch.bfloat16)
    assert embedding.row_scales.dtype == torch.float16
    assert torch.equal(embedding(IDS), table[IDS].to(torch.bfloat16))
    assert embedding.weight.dtype == torch.bfloat16


def test_only_the_rows_that_are_asked_for_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    embedding, _ = packed(QuantSpec(8, 32, symmetric=True), 1000, 64)
    asked = []
    rows = PackedRows.rows
    monkeypatch.setattr(PackedRows, "rows", lambda self, tokens: asked.append(len(tokens)) or rows(self, tokens))
    embedding(IDS)
    assert asked == [4]


def test_nothing_can_be_written_into_codes() -> None:
    embedding, _ = packed(QuantSpec(8, 32, symmetric=True), 17, 64)
    with pytest.raises(ShapeError, match="cannot be changed or merged into"):
        embedding.weight.add_(1.0)
