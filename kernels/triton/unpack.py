"""Device functions that read packed codes and zeros in the GPTQ order.

A unit is 32 consecutive input channels of one output channel: `bits` whole words, for every width. Neighbouring
threads read neighbouring output channels, which lie side by side in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

UNIT = 32


@triton.jit
def load_zeros(qzeros, group, column, mask, out_features, BITS: tl.constexpr):
    """Return zeros as uint32, of the shape of `column`; they are a bitstream along the outputs."""
    bit = column * BITS
    place = group * (out_features * BITS // 32) + bit // 32
    shift = (bit % 32).to(tl.uint32)
    zeros = tl.load(qzeros + place, mask=mask, other=0).to(tl.uint32, bitcast=True) >> shift
    if BITS == 3:
        # A zero may begin in one word and end in the next.
        split = shift > 29
        above = tl.load(qzeros + place + 1, mask=mask & split, other=0).to(tl.uint32, bitcast=True)
        zeros = tl.where(split, zeros | (above << ((32 - shift) & 31)), zeros)
    return zeros & ((1 << BITS) - 1)


@triton.jit
def load_word(qweight, row, column, mask, out_features):
    """Return words as uint32: (rows, columns) from vectors of row and column numbers."""
    place = row[:, None] * out_features + column[None, :]
    return tl.load(qweight + place, mask=mask, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def load_codes(qweight, first_unit, column, mask, out_features, BITS: tl.constexpr, UNITS: tl.constexpr):
    """Return codes as uint32, (UNITS * 32, columns), of the units from `first_unit` on; `mask` is per column."""
    if BITS == 3:
        row = (first_unit + tl.arange(0, UNITS)) * 3
        word_0 = load_word(qweight, row, column, mask[None, :], out_features)
        word_1 = load_word(qweight, row + 1, column, mask[None, :], out_features)
        word_2 = load_word(qweight, row + 2, column, mask[None, :], out_features)
        # Four windows of the 96 bits, each with up to ten whole codes.
        window_1 = (word_0 >> 30) | (word_1 << 2)
        window_2 = (word_1 >> 28) | (word_2 << 4)
        window_3 = word_2 >> 26
        code = tl.arange(0, 32)[None, :, None]
        upper = tl.where(code < 30, window_2[:, None, :], window_3[:, None, :])
        lower = tl.where(code < 10, word_0[:, None, :], window_1[:, None, :])
        codes = tl.where(code < 20, lower, upper) >> ((code % 10) * 3).to(tl.uint32)
    else:
        row = first_unit * BITS + tl.arange(0, UNITS * BITS)
        words = load_word(qweight, row, column, mask[None, :], out_features)
        codes = words[:, None, :] >> (tl.arange(0, 32 // BITS) * BITS).to(tl.uint32)[None, :, None]
    return tl.reshape(codes & ((1 << BITS) - 1), (UNITS * 32, column.shape[0]))


@triton.jit
def as_fraction(codes, BITS: tl.constexpr):
    """Return `1 + codes / 2**BITS` as float32, exactly: the codes become the upper bits of a mantissa.

    One bitwise operation instead of a conversion, which runs at a fraction of the speed.
    """
    return ((codes << (23 - BITS)) | 0x3F800000).to(tl.float32, bitcast=True)
