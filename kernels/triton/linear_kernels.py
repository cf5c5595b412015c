"""The GPU kernels of packed linears for few tokens; `linear` says how they work together."""

from __future__ import annotations

import triton
import triton.language as tl

from cloq_export.kernels.triton.tuning import tuned
from cloq_export.kernels.triton.unpack import as_fraction, load_codes, load_word, load_zeros

_VECTOR_SPACE = [
    {"UNITS": units, "COLUMNS": columns, "num_warps": warps, "num_stages": stages}
    for units, columns, warps, stages in (
        (8, 32, 4, 2),
        (16, 16, 4, 2),
        (16, 32, 4, 2),
        (16, 32, 8, 2),
        (32, 32, 8, 2),
        (8, 64, 4, 2),
        (16, 64, 8, 2),
        (4, 128, 4, 2),
        (8, 128, 8, 2),
    )
]
_MATRIX_SPACE = [
    {"COLUMNS": columns, "num_warps": warps, "num_stages": stages}
    for columns, warps, stages in ((32, 4, 3), (64, 4, 3), (64, 8, 3), (128, 4, 3), (128, 8, 3), (64, 4, 4), (32, 4, 5))
]


@triton.jit
def _shrink(
    program,
    x,
    lora_a,
    index,
    inner,
    tokens,
    in_features,
    adapters,
    rank,
    rank_tiles,
    shrink_splits,
    HAS_INDEX: tl.constexpr,
    RANK_TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write one tile of `inner` (splits, tokens, rank): a part of the inputs of one token times a part of A."""
    token = program // (rank_tiles * shrink_splits)
    rest = program % (rank_tiles * shrink_splits)
    split = rest // rank_tiles
    row = (rest % rank_tiles) * RANK_TILE + tl.arange(0, RANK_TILE)
    if HAS_INDEX:
        adapter = tl.load(index + token).to(tl.int64)
    else:
        adapter = 0
    share = tl.cdiv(tl.cdiv(in_features, shrink_splits), COLUMNS) * COLUMNS
    total = tl.zeros((RANK_TILE, COLUMNS), dtype=tl.float32)
    # An index that names no adapter must not become an address.
    if (adapter >= 0) & (adapter < adapters):
        matrix = lora_a + adapter * rank * in_features
        for first in range(split * share, min(split * share + share, in_features), COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            given = tl.load(x + token.to(tl.int64) * in_features + column, mask=column < in_features, other=0.0)
            a = tl.load(
                matrix + row[:, None] * in_features + column[None, :],
                mask=(row < rank)[:, None] & (column < in_features)[None, :],
                other=0.0,
            )
            total += a.to(tl.float32) * given.to(tl.float32)[None, :]
    place = (split * tokens + token) * rank + row
    tl.store(inner + place, tl.sum(total, axis=1), mask=row < rank)


@tuned(_VECTOR_SPACE, ["out_features", "units", "group_units", "splits", "rank", "BITS"])
@triton.jit
def vector_product(
    x,
    qweight,
    qzeros,
    scales,
    bias,
    y,
    lora_a,
    index,
    inner,
    out_features,
    units,
    group_units,
    splits,
    adapters,
    rank,
    rank_tiles,
    shrink_splits,
    one,
    top_mask,
    BITS: tl.constexpr,
    PARTIAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LORA: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    RANK_TILE: tl.constexpr,
    CENTRED: tl.constexpr,
    RUN: tl.constexpr,
    WINDOW: tl.constexpr,
    WINDOWS: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Multiply one token; with PARTIAL, `y` is (splits, out) float32 and gets sums over a part of the inputs.

    Integer instructions are its limit, so a code takes few of them. It is not shifted down and converted: with the
    exponent of one before it, it is the fraction of a float32, `1 + code / 2**k`. Neighbouring codes (a run) need no
    shift either, each with a k of its own. The ones and the zeros are subtracted after each unit. That costs some bits
    of float32, which float16 and bfloat16 activations do not have; CENTRED spares them for float32.

    A window is a word of whole codes. `one` (the bits of 1.0) and `top_mask` (a code below the exponent) come as
    arguments because the compiler makes two instructions of one where it knows both.
    """
    tiles = tl.cdiv(out_features, COLUMNS)
    program = tl.program_id(0)
    if program < tiles * splits:
        split = program // tiles
        column = (program % tiles) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < out_features
        share = tl.cdiv(units, splits)
        last = min(split * share + share, units)
        total = tl.zeros((UNITS, COLUMNS), dtype=tl.float32)
        for first in range(split * share, last, UNITS):
            unit = first + tl.arange(0, UNITS)
            known = unit < last
            mask = known[:, None] & inside[None, :]
            group = (unit // group_units)[:, None]
            scale = tl.load(scales + group * out_features + column[None, :], mask=mask, other=0.0).to(tl.float32)
            zeros = load_zeros(qzeros, group, column[None, :], mask, out_features, BITS)
            origin = as_fraction(zeros, BITS)
            if CENTRED:
                part = tl.zeros((UNITS, COLUMNS), dtype=tl.float32)
                for code in tl.static_range(32):
                    given = tl.load(x + unit * 32 + code, mask=known, other=0.0).to(tl.float32)
                    # A code of three bits may begin in one word and end in the next.
                    row = unit * BITS + code * BITS // 32
                    words = load_word(qweight, row, column, mask, out_features) >> (code * BITS % 32)
                    if code * BITS % 32 + BITS > 32:
                        above = load_word(qweight, row + 1, column, mask, out_features)
                        words = words | (above << (32 - code * BITS % 32))
                    part += (as_fraction(words & ((1 << BITS) - 1), BITS) - origin) * given[:, None]
            else:
                # The sums of the codes that lie first, second ... in a run, and of their activations.
                part_0 = tl.zeros((UNITS, COLUMNS), dtype=tl.float32)
                part_1, part_2, part_3 = part_0, part_0, part_0
                plain_0 = tl.zeros((UNITS,), dtype=tl.float32)
                plain_1, plain_2, plain_3 = plain_0, plain_0, plain_0
                for window in tl.static_range(WINDOWS):
                    if BITS == 3:
                        if window == 0:
                            word_0 = load_word(qweight, unit * 3, column, mask, out_features)
                            word_1 = load_word(qweight, unit * 3 + 1, column, mask, out_features)
                            word_2 = load_word(qweight, unit * 3 + 2, column, mask, out_features)
                            words = word_0
                        elif window == 1:
                            words = (word_0 >> 30) | (word_1 << 2)
                        elif window == 2:
                            words = (word_1 >> 28) | (word_2 << 4)
                        else:
                            words = word_2 >> 26
                    else:
                        words = load_word(qweight, unit * BITS + window, column, mask, out_features)
                    for code in tl.static_range(WINDOW):
                        if window * WINDOW + code < 32:
                            given = tl.load(x + unit * 32 + (window * WINDOW + code), mask=known, other=0.0)
                            given = given.to(tl.float32)
                            # Moves the run's last code to the top of the mantissa.
                            if code // RUN * RUN * BITS <= 23 - RUN * BITS:
                                moved = words << (23 - RUN * BITS - code // RUN * RUN * BITS)
                            else:
                                moved = words >> (code // RUN * RUN * BITS - 23 + RUN * BITS)
                            if code % RUN == 0:
                                step = (moved & (top_mask >> (RUN * BITS - BITS))) | one
                                part_0 += step.to(tl.float32, bitcast=True) * given[:, None]
                                plain_0 += given
                            elif code % RUN == 1:
                                step = (moved & (top_mask >> (RUN * BITS - 2 * BITS))) | one
                                part_1 += step.to(tl.float32, bitcast=True) * given[:, None]
                                plain_1 += given
                            elif code % RUN == 2:
                                step = (moved & (top_mask >> (RUN * BITS - 3 * BITS))) | one
                                part_2 += step.to(tl.float32, bitcast=True) * given[:, None]
                                plain_2 += given
                            else:
                                step = (moved & top_mask) | one
                                part_3 += step.to(tl.float32, bitcast=True) * given[:, None]
                                plain_3 += given
                # A code `below` places under the top of the mantissa counts 2**(BITS * below) times as much. The ones
                # before the point and the zeros are subtracted.
                part = part_0 * (1 << (RUN * BITS - BITS)) + part_3
                ones = plain_0 * (1 << (RUN * BITS - BITS)) + plain_3
                if RUN > 1:
                    part += part_1 * (1 << (RUN * BITS - 2 * BITS))
                    ones += plain_1 * (1 << (RUN * BITS - 2 * BITS))
                if RUN > 2:
                    part += part_2 * (1 << (RUN * BITS - 3 * BITS))
                    ones += plain_2 * (1 << (RUN * BITS - 3 * BITS))
                plain = plain_0 + plain_1 + plain_2 + plain_3
                part -= ones[:, None] + (origin - 1.0) * plain[:, None]
            total += part * (scale * (1 << BITS))
        result = tl.sum(total, axis=0)
        if PARTIAL:
            tl.store(y + split * out_features + column, result, mask=inside)
        else:
            if HAS_BIAS:
                result += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(y + column, result.to(y.dtype.element_ty), mask=inside)
    else:
        if HAS_LORA:
            _shrink(
                program - tiles * splits,
                x,
                lora_a,
                index,
                inner,
                1,
                units * 32,
                adapters,
                rank,
                rank_tiles,
                shrink_splits,
                HAS_INDEX,
                RANK_TILE,
                128,
            )


@tuned(_MATRIX_SPACE, ["out_features", "units", "group_units", "splits", "rank", "BITS", "TOKENS"])
@triton.jit
def matrix_product(
    x,
    qweight,
    qzeros,
    scales,
    bias,
    y,
    lora_a,
    index,
    inner,
    tokens,
    out_features,
    units,
    group_units,
    splits,
    adapters,
    rank,
    rank_tiles,
    shrink_splits,
    BITS: tl.constexpr,
    PARTIAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LORA: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    RANK_TILE: tl.constexpr,
    OPERAND: tl.constexpr,
    TOKENS: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Multiply up to TOKENS tokens; with PARTIAL, `y` is (splits, tokens, out) float32, see `vector_product`."""
    tiles = tl.cdiv(out_features, COLUMNS)
    program = tl.program_id(0)
    if program < tiles * splits:
        split = program // tiles
        column = (program % tiles) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < out_features
        token = tl.arange(0, TOKENS)
        known = token < tokens
        in_features = units * 32
        share = tl.cdiv(tl.cdiv(units, splits), UNITS) * UNITS
        total = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
        for first in range(split * share, min(split * share + share, units), UNITS):
            channel = first * 32 + tl.arange(0, UNITS * 32)
            given = tl.load(x + token[:, None] * in_features + channel[None, :], mask=known[:, None], other=0.0)
            codes = load_codes(qweight, first, column, inside, out_features, BITS, UNITS)
            group = first // group_units
            zeros = load_zeros(qzeros, group, column, inside, out_features, BITS)
            scale = tl.load(scales + group * out_features + column, mask=inside, other=0.0).to(tl.float32)
            steps = (as_fraction(codes, BITS) - as_fraction(zeros, BITS)[None, :]).to(OPERAND)
            product = tl.dot(given.to(OPERAND), steps, input_precision="ieee")
            total += product * (scale * (1 << BITS))[None, :]
        mask = known[:, None] & inside[None, :]
        place = token[:, None] * out_features + column[None, :]
        if PARTIAL:
            tl.store(y + split.to(tl.int64) * tokens * out_features + place, total, mask=mask)
        else:
            if HAS_BIAS:
                total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            tl.store(y + place, total.to(y.dtype.element_ty), mask=mask)
    else:
        if HAS_LORA:
            _shrink(
                program - tiles * splits,
                x,
                lora_a,
                index,
                inner,
                tokens,
                units * 32,
                adapters,
                rank,
                rank_tiles,
                shrink_splits,
                HAS_INDEX,
                RANK_TILE,
                128,
            )


@triton.jit
def add_partial_sums(
    partial,
    bias,
    y,
    lora_b,
    scaling,
    index,
    inner,
    tokens,
    out_features,
    splits,
    rank,
    adapters,
    shrink_splits,
    HAS_BIAS: tl.constexpr,
    HAS_LORA: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    TOKENS: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add the partial sums of a tile in order, the bias, and `scaling_i (x A_i^T) B_i^T`; round once."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < out_features
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    known = token < tokens
    mask = known[:, None] & inside[None, :]
    place = token[:, None] * out_features + column[None, :]
    total = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for split in range(splits):
        total += tl.load(partial + split * tokens * out_features + place, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if HAS_LORA:
        step = tl.arange(0, RANK)
        low = tl.zeros((TOKENS, RANK), dtype=tl.float32)
        for split in range(shrink_splits):
            low += tl.load(
                inner + (split * tokens + token)[:, None] * rank + step[None, :],
                mask=known[:, None] & (step < rank)[None, :],
                other=0.0,
            )
        which = tl.zeros((TOKENS,), dtype=tl.int32)
        if HAS_INDEX:
            which = tl.load(index + token, mask=known, other=-1)
        for adapter in range(adapters):
            chosen = which == adapter
            # Adapters that no token of the tile asks for are not read.
            if tl.sum(chosen.to(tl.int32), axis=0) > 0:
                b = tl.load(
                    lora_b + (adapter * out_features + column.to(tl.int64))[:, None] * rank + step[None, :],
                    mask=inside[:, None] & (step < rank)[None, :],
                    other=0.0,
                ).to(tl.float32)
                mine = tl.where(chosen[:, None], low, 0.0) * tl.load(scaling + adapter)
                if TOKENS == 1:
                    total += tl.sum(b[None, :, :] * mine[:, None, :], axis=2)
                else:
                    total += tl.dot(mine, tl.trans(b), input_precision="ieee")
    tl.store(y + place, total.to(y.dtype.element_ty), mask=mask)
