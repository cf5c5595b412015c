"""The blocks in which ONNX Runtime stores a weight: which ones carry a layer's integers, and the packing; see SPEC.md.

Knows no onnx package: a layer goes in, tensors come out, and back.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from cloq_export.errors import FormatError, ShapeError
from cloq_export.kernels.bitpack import pack_rows, unpack_rows
from cloq_export.types import QuantizedLayer, QuantSpec

Style = Literal["matmulnbits", "qdq"]
TwoBit = Literal["exact", "compact"]
STYLES: tuple[Style, ...] = ("matmulnbits", "qdq")
TWO_BIT: tuple[TwoBit, ...] = ("exact", "compact")

EXACT, INT8 = 1, 4
"""Values of MatMulNBits' accuracy_level: activations in float32, or rounded to int8 block by block."""

# What the operator's CPU kernel takes; a DequantizeLinear with another block is computed apart from its MatMul.
_BLOCK_SIZES = (16, 32, 64, 128, 256)
# Other blocks of native 2-bit codes miss the fast kernel and are computed forty times slower than plain floats.
_COMPACT_BLOCK_SIZES = (32, 64, 128)
_CONTAINER_BITS = {2: 4, 3: 4, 4: 4, 8: 8}


@dataclasses.dataclass(frozen=True)
class BlockGrid:
    """How one layer lies in the graph.

    Args:
        style: "matmulnbits" (one operator of ONNX Runtime) or "qdq" (DequantizeLinear and MatMul).
        bits: width of the container that holds a code: 2, 4 or 8.
        block_size: input channels that share a stored scale and zero.
        blocks: of one output channel; the last one may be partly filled.
        accuracy_level: `EXACT` or `INT8`; what the operator does, or what the session has to be told for "qdq".
    """

    style: Style
    bits: int
    block_size: int
    blocks: int
    accuracy_level: int

    @property
    def fused(self) -> bool:
        """Return whether ONNX Runtime computes from the codes; otherwise it makes the float weight at every call."""
        return self.style == "matmulnbits" or self.block_size in _BLOCK_SIZES


def choose_blocks(
    spec: QuantSpec, in_features: int, *, style: Style, two_bit: TwoBit = "exact", name: str = "layer"
) -> BlockGrid:
    """Return the blocks that carry a layer's integers unchanged.

    A block lies within one group. Where groups are longer than a legal block, or are as long as the row, their scale
    and zero are repeated; of the sizes that fit a row-long group the one is taken that is stored in the fewest bytes.

    Args:
        spec: the grid of the layer.
        in_features: its inputs.
        style: of the graph.
        two_bit: "exact" puts 2-bit codes into 4-bit containers; "compact" keeps them and rounds activations to int8.
        name: the layer, for messages.

    Raises:
        ShapeError: no legal block lies within the groups; the message says what would fit.
    """
    compact = spec.bits == 2 and two_bit == "compact"
    bits = 2 if compact else _CONTAINER_BITS[spec.bits]
    level = INT8 if compact else EXACT
    span = spec.columns_per_group(in_features)
    legal = _COMPACT_BLOCK_SIZES if compact else _BLOCK_SIZES
    if span == in_features:

        def stored(size: int) -> tuple[int, int]:
            # Codes, a float32 scale and a zero for each block; of equal ones the larger.
            return -(-in_features // size) * (size * bits + 32 + bits), -size

        size = min(legal, key=stored)
    else:
        fitting = [size for size in legal if span % size == 0]
        if not fitting and (compact or style == "matmulnbits"):
            if not compact:
                remedy = "`style=qdq`, which takes any group and is slow for this one"
            else:
                exact = style == "qdq" or span % _BLOCK_SIZES[0] == 0
                remedy = "`two_bit=exact`" if exact else "`two_bit=exact` `style=qdq`"
            raise ShapeError(
                f"{name} has groups of {span} inputs, into which no block of {_listed(legal)} fits; export it with "
                f"{remedy}, or quantize with `group_size=32`, 64 or 128."
            )
        size = max(fitting, default=span)
    return BlockGrid(style, bits, size, -(-in_features // size), level)


def pack_blocks(layer: QuantizedLayer, grid: BlockGrid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, scales and zeros of a layer as its blocks store them.

    Args:
        layer: codes (out, in), scales and zeros (out, groups).
        grid: from `choose_blocks` for this layer.

    Returns:
        tuple: for "matmulnbits" codes (out, blocks, block_size * bits / 8) uint8, scales (out, blocks) float32 and
        zeros (out, ceil(blocks * bits / 8)) uint8; for "qdq" the bytes of codes (in, out) and of zeros (blocks, out),
        and scales (blocks, out) float32 between them. Codes beyond the last input are zero.
    """
    out_features, in_features = layer.out_features, layer.in_features
    index = _group_of_block(grid, layer.spec, in_features)
    scales = layer.scales[:, index].to(torch.float32)
    zeros = layer.zeros[:, index]
    if grid.style == "qdq":
        codes = _stream(layer.codes.T.contiguous(), grid.bits)
        return codes, scales.T.contiguous(), _stream(zeros.T.contiguous(), grid.bits)
    padding = grid.blocks * grid.block_size - in_features
    codes = torch.nn.functional.pad(layer.codes, (0, padding))
    packed = _bytes(pack_rows(codes.contiguous(), grid.bits)).view(out_features, grid.blocks, -1)
    packed_zeros = _bytes(pack_rows(zeros.contiguous(), grid.bits))[:, : -(-grid.blocks * grid.bits // 8)]
    return packed, scales.contiguous(), packed_zeros.contiguous()


def unpack_blocks(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    grid: BlockGrid,
    spec: QuantSpec,
    shape: tuple[int, int],
    *,
    name: str = "layer",
) -> QuantizedLayer:
    """Return the layer that blocks hold; the inverse of `pack_blocks`, which trusts nothing.

    Args:
        tensors: codes, scales and zeros of the blocks, as `pack_blocks` gives them.
        grid: how they are stored.
        spec: the grid of the layer.
        shape: (out, in) of the layer.
        name: the layer, for messages.

    Raises:
        FormatError: a scale is no float16 number, blocks of one group differ, a code or a zero does not fit the
            width, or padding is not zero.
    """
    codes, scales, zeros = tensors
    out_features, in_features = shape
    if grid.style == "qdq":
        integers = _unstream(codes, grid.bits, (in_features, out_features)).T
        found_zeros = _unstream(zeros, grid.bits, (grid.blocks, out_features)).T
        scales = scales.T
    else:
        wide = unpack_rows(_words(codes.reshape(out_features, -1)), grid.bits)
        integers = wide[:, :in_features]
        if bool(wide[:, in_features:].any()):
            raise FormatError(f"{name}: the padding behind the last input is not zero; the graph was edited.")
        found_zeros = unpack_rows(_words(zeros), grid.bits, grid.blocks)
    index = _group_of_block(grid, spec, in_features)
    first = torch.searchsorted(index, torch.arange(spec.group_count(in_features)))
    group_scales, group_zeros = scales[:, first], found_zeros[:, first]
    same = torch.equal(group_scales[:, index], scales) and torch.equal(group_zeros[:, index], found_zeros)
    half = group_scales.to(torch.float16)
    if not same or not torch.equal(half.to(torch.float32), group_scales):
        raise FormatError(
            f"{name}: blocks of one group differ in scale or zero, or a scale is no float16 number; the graph was "
            "edited."
        )
    try:
        return QuantizedLayer(integers.contiguous(), half.contiguous(), group_zeros.contiguous(), spec)
    except Exception as error:
        raise FormatError(f"{name}: {error}") from None


def _group_of_block(grid: BlockGrid, spec: QuantSpec, in_features: int) -> torch.Tensor:
    """Return the group in which each block of a row lies, (blocks,) int64."""
    return torch.arange(grid.blocks) * grid.block_size // spec.columns_per_group(in_features)


def _stream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the bytes of a matrix of codes, packed without a gap between rows."""
    return _bytes(pack_rows(codes.reshape(1, -1), bits))[0, : -(-codes.numel() * bits // 8)].contiguous()


def _unstream(stream: torch.Tensor, bits: int, shape: tuple[int, int]) -> torch.Tensor:
    count = shape[0] * shape[1]
    return unpack_rows(_words(stream.reshape(1, -1)), bits, count).view(shape)


def _bytes(words: torch.Tensor) -> torch.Tensor:
    return words.view(torch.uint8)


def _words(rows: torch.Tensor) -> torch.Tensor:
    """Return rows of bytes as rows of 32-bit words, filled up with zeros."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 4))
    return padded.contiguous().view(torch.int32)


def _listed(sizes: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, sizes[:-1]))} or {sizes[-1]}"
