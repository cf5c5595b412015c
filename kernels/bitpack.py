"""Dense bit packing: bit j of code i is bit `i * bits + j` of a little-endian stream of 32-bit words.

This is the stream of the GPTQ layout and of every other one that packs densely. `pack_rows` lets it run along a row,
`pack_columns` down a column, which is the order of GPTQ's qweight, without a transposition in between. On the CPU the
native library does the work at the speed of memory; elsewhere, and without a library, torch does.
"""

from __future__ import annotations

import math

import torch

from cloq_export.kernels.dispatch import native_library

WIDTHS = (2, 3, 4, 8)
WORD_BITS = 32


def pack_rows(codes: torch.Tensor, bits: int, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Pack each row of codes into a bit stream of its own.

    Args:
        codes: (rows, columns) uint8, each below `2**bits`.
        bits: 2, 3, 4 or 8.
        out: where to write, contiguous and on the codes' device; None makes a new tensor.

    Returns:
        torch.Tensor: (rows, ceil(columns * bits / 32)) int32; the rest of a row's last word is zero.

    Raises:
        TypeError: codes are not uint8.
        ValueError: bits is not allowed, codes are not a matrix, a code does not fit, or `out` is of another kind.
    """
    _check_codes(codes, bits)
    rows, columns = codes.shape
    words = _output(out, (rows, -(-columns * bits // WORD_BITS)), torch.int32, codes)
    native = native_library(codes, words)
    if native is None:
        _check_range(codes, bits)
        return words.copy_(_pack_rows_torch(codes, bits))
    codes = codes.contiguous()
    too_large = native.cloq_pack_rows(codes.data_ptr(), rows, columns, bits, words.data_ptr(), torch.get_num_threads())
    if too_large:
        _check_range(codes, bits)
    return words


def unpack_rows(
    words: torch.Tensor, bits: int, columns: int | None = None, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the codes that `pack_rows` packed.

    Args:
        words: (rows, words) int32.
        bits: 2, 3, 4 or 8.
        columns: codes in a row; None means as many as the words hold.
        out: where to write, contiguous and on the words' device; None makes a new tensor.

    Returns:
        torch.Tensor: (rows, columns) uint8, contiguous.

    Raises:
        TypeError: words are not int32.
        ValueError: bits is not allowed, words are not a matrix, the words do not hold that many codes, or `out` is of
            another kind.
    """
    _check_words(words, bits)
    rows, count = words.shape
    most = count * WORD_BITS // bits
    columns = most if columns is None else columns
    if not 0 <= columns <= most:
        raise ValueError(f"{count} words hold {most} codes of {bits} bits; {columns} were asked for.")
    codes = _output(out, (rows, columns), torch.uint8, words)
    native = native_library(words, codes)
    if native is None:
        return _unpack_rows_torch(words, bits, codes)
    words = words.contiguous()
    native.cloq_unpack_rows(words.data_ptr(), rows, count, columns, bits, codes.data_ptr(), torch.get_num_threads())
    return codes


def pack_columns(codes: torch.Tensor, bits: int, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Pack each row of codes into a column of words: the order of GPTQ's qweight.

    Args:
        codes: (out, in) uint8, each below `2**bits`; `in * bits` is a multiple of 32.
        bits: 2, 3, 4 or 8.
        out: where to write, contiguous and on the codes' device; None makes a new tensor.

    Returns:
        torch.Tensor: (in * bits / 32, out) int32, contiguous.

    Raises:
        TypeError: codes are not uint8.
        ValueError: bits is not allowed, codes are not a matrix, a row does not fill whole words, a code does not fit,
            or `out` is of another kind.
    """
    _check_codes(codes, bits)
    rows, columns = codes.shape
    if columns * bits % WORD_BITS:
        raise ValueError(
            f"{columns} codes of {bits} bits do not fill whole 32-bit words; allowed is a multiple of "
            f"{WORD_BITS // math.gcd(WORD_BITS, bits)}."
        )
    words = _output(out, (columns * bits // WORD_BITS, rows), torch.int32, codes)
    native = native_library(codes, words)
    if native is None:
        _check_range(codes, bits)
        return words.copy_(_pack_rows_torch(codes, bits).t())
    codes = codes.contiguous()
    too_large = native.cloq_pack_columns(
        codes.data_ptr(), rows, columns, bits, words.data_ptr(), torch.get_num_threads()
    )
    if too_large:
        _check_range(codes, bits)
    return words


def unpack_columns(words: torch.Tensor, bits: int, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return the codes that `pack_columns` packed.

    Args:
        words: (in * bits / 32, out) int32.
        bits: 2, 3, 4 or 8.
        out: where to write, contiguous and on the words' device; None makes a new tensor.

    Returns:
        torch.Tensor: (out, in) uint8, contiguous.

    Raises:
        TypeError: words are not int32.
        ValueError: bits is not allowed, words are not a matrix, they do not hold whole codes, or `out` is of another
            kind.
    """
    _check_words(words, bits)
    count, rows = words.shape
    columns, rest = divmod(count * WORD_BITS, bits)
    if rest:
        raise ValueError(f"{count} words do not hold whole codes of {bits} bits; allowed is a multiple of {bits}.")
    codes = _output(out, (rows, columns), torch.uint8, words)
    native = native_library(words, codes)
    if native is None:
        return _unpack_rows_torch(words.t(), bits, codes)
    words = words.contiguous()
    native.cloq_unpack_columns(words.data_ptr(), rows, columns, bits, codes.data_ptr(), torch.get_num_threads())
    return codes


def _check_width(bits: int) -> None:
    if bits not in WIDTHS:
        raise ValueError(f"bits is {bits}; allowed are 2, 3, 4 and 8.")


def _check_codes(codes: torch.Tensor, bits: int) -> None:
    _check_width(bits)
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be torch.uint8; got {codes.dtype}.")
    if codes.ndim != 2:
        raise ValueError(f"codes must be a matrix; got shape {tuple(codes.shape)}.")


def _check_words(words: torch.Tensor, bits: int) -> None:
    _check_width(bits)
    if words.dtype != torch.int32:
        raise TypeError(f"packed words must be torch.int32; got {words.dtype}.")
    if words.ndim != 2:
        raise ValueError(f"packed words must be a matrix; got shape {tuple(words.shape)}.")


def _check_range(codes: torch.Tensor, bits: int) -> None:
    largest = int(codes.max()) if codes.numel() else 0
    if largest >= 1 << bits:
        raise ValueError(f"the largest code is {largest}; {bits} bits hold 0..{(1 << bits) - 1}.")


def _output(out: torch.Tensor | None, shape: tuple[int, int], dtype: torch.dtype, source: torch.Tensor) -> torch.Tensor:
    if out is None:
        return torch.empty(shape, dtype=dtype, device=source.device)
    if tuple(out.shape) != shape or out.dtype != dtype or out.device != source.device or not out.is_contiguous():
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype} on {out.device}"
            f"{'' if out.is_contiguous() else ', not contiguous'}; allowed is a contiguous {shape} {dtype} on "
            f"{source.device}."
        )
    return out


def _step(bits: int) -> tuple[int, int]:
    """Return (codes, bytes) of the shortest run of codes that fills whole bytes."""
    common = math.gcd(8, bits)
    return 8 // common, bits // common


def _pack_rows_torch(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack on any device; a little-endian view of bytes makes the words, and nothing larger than the codes is made."""
    codes_per_step, bytes_per_step = _step(bits)
    rows, columns = codes.shape
    steps = -(-columns // codes_per_step)
    words = torch.zeros(rows, -(-columns * bits // WORD_BITS), dtype=torch.int32, device=codes.device)
    packed = words.view(torch.uint8)
    for index in range(codes_per_step):
        byte, shift = divmod(index * bits, 8)
        part = codes[:, index::codes_per_step]
        # The last step may be cut short: codes that it lacks are zero, and so are their bytes already.
        here = packed[:, byte : steps * bytes_per_step : bytes_per_step][:, : part.shape[1]]
        here |= part[:, : here.shape[1]] << shift
        if shift + bits > 8:
            above = packed[:, byte + 1 : steps * bytes_per_step : bytes_per_step][:, : part.shape[1]]
            above |= part[:, : above.shape[1]] >> (8 - shift)
    return words


def _unpack_rows_torch(words: torch.Tensor, bits: int, codes: torch.Tensor) -> torch.Tensor:
    """Unpack on any device into codes (rows, columns), and return them."""
    codes_per_step, bytes_per_step = _step(bits)
    if not codes.numel():
        return codes
    # Through one dimension: a matrix of one column counts as contiguous with any stride, and then has no byte view.
    stream = words.reshape(-1).view(torch.uint8).view(words.shape[0], -1)
    mask = (1 << bits) - 1
    for index in range(codes_per_step):
        byte, shift = divmod(index * bits, 8)
        part = codes[:, index::codes_per_step]
        low = stream[:, byte::bytes_per_step][:, : part.shape[1]]
        code = low >> shift
        if shift + bits > 8:
            code = code | (stream[:, byte + 1 :: bytes_per_step][:, : part.shape[1]] << (8 - shift))
        part.copy_(code & mask)
    return codes
