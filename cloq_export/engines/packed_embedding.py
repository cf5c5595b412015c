"""Embeddings that hold packed codes instead of a table of floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cloq_export.engines.packed_linear import PackedWeight
from cloq_export.kernels.bitpack import pack_columns, unpack_columns
from cloq_export.types import QuantizedLayer

# A row is padded to whole words of every width of a code.
_ROW = 32
_CLASSES: dict[Any, type[PackedRows]] = {}


class PackedRows(nn.Embedding):
    """What a packed embedding does in the place of the class that it is mixed into.

    Only rows that are asked for are dequantized. What the class does with them beside stays its own, such as Gemma's
    factor.
    """

    packed_codes: torch.Tensor
    row_scales: torch.Tensor
    row_zeros: torch.Tensor
    bits: int
    compute_dtype: torch.dtype
    _looked_up: torch.Tensor | None

    @property
    def out_features(self) -> int:
        """Return the number of rows, by the name that packed layers have for it."""
        return self.num_embeddings

    @property
    def in_features(self) -> int:
        """Return the width of a row, by the name that packed layers have for it."""
        return self.embedding_dim

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """Return the rows of this lookup, and otherwise Q, whose numbers are made when something computes with it."""
        return PackedWeight(self) if self._looked_up is None else self._looked_up  # type: ignore[arg-type]

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return rows of Q, `scales * (codes - zeros)`, (tokens, width) float32.

        Args:
            tokens: numbers of the rows, (tokens) int64.
        """
        codes = unpack_columns(self.packed_codes[tokens].t().contiguous(), self.bits)[:, : self.embedding_dim]
        scales, zeros = self.row_scales[tokens].to(torch.float32), self.row_zeros[tokens].to(torch.float32)
        groups = scales.shape[1]
        grouped = codes.reshape(len(tokens), groups, self.embedding_dim // groups).to(torch.float32)
        return (scales[..., None] * (grouped - zeros[..., None])).reshape(len(tokens), self.embedding_dim)

    def dequantize(self) -> torch.Tensor:
        """Return Q, (rows, width) float32, newly computed."""
        return self.rows(torch.arange(self.num_embeddings, device=self.packed_codes.device))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return what the class makes of the rows of some tokens.

        Args:
            input: token ids of any shape.
        """
        distinct, places = torch.unique(input, return_inverse=True)
        self._looked_up = self.rows(distinct).to(self.compute_dtype)
        try:
            return super().forward(places)
        finally:
            self._looked_up = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedRows:
        scales = self.row_scales
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=scales.device))
        super()._apply(fn, recurse)
        self.compute_dtype = probe.dtype
        # float16 scales rounded to bfloat16 would be another base.
        if self.row_scales.dtype != scales.dtype:
            self.row_scales = scales.to(probe.device)
        return self


def pack_embedding(embedding: nn.Embedding, layer: QuantizedLayer, dtype: torch.dtype) -> PackedRows:
    """Turn an embedding without numbers into one that holds codes; what its class keeps beside the table stays.

    Args:
        embedding: of any class that looks rows up as `nn.Embedding` does.
        layer: the codes of its rows, (rows, width).
        dtype: of the rows that it gives.

    Returns:
        PackedRows: the same module.
    """
    del embedding._parameters["weight"]
    packed: Any = embedding
    packed.__class__ = _packed_class(type(embedding))
    # Which rows get no gradient is no matter where none do, and rows are numbered anew in each lookup.
    packed.padding_idx = None
    packed.bits, packed.compute_dtype, packed._looked_up = layer.spec.bits, dtype, None
    codes = nn.functional.pad(layer.codes, (0, -layer.in_features % _ROW))
    packed.register_buffer("packed_codes", pack_columns(codes, layer.spec.bits).t().contiguous())
    packed.register_buffer("row_scales", layer.scales.contiguous())
    packed.register_buffer("row_zeros", layer.zeros.contiguous())
    return packed  # type: ignore[no-any-return]


def _packed_class(family: type[nn.Embedding]) -> type[PackedRows]:
    """Return the packed class of a family, the same in every call."""
    if family not in _CLASSES:
        bases = (PackedRows,) if family is nn.Embedding else (PackedRows, family)
        _CLASSES[family] = type(f"Packed{family.__name__}", bases, {})
    return _CLASSES[family]
