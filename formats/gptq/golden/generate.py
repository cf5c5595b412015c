"""Write the golden files of the GPTQ layout with a packer that follows SPEC.md bit by bit.

Pure Python: it shares no line with the codec, so the two can only agree by both following the specification. The
tests also use its functions as their oracle. Run `python generate.py` to write the files again beside this script.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

# name -> (bits, group size, symmetric, out, in); group size -1 is one group per output channel.
CASES = {
    "w2_g32": (2, 32, False, 16, 64),
    "w3_g32": (3, 32, False, 32, 64),
    "w4_channel_symmetric": (4, -1, True, 8, 24),
    "w8_g8": (8, 8, False, 4, 16),
}


def pack_stream(codes: list[int], bits: int) -> list[int]:
    """Return the 32-bit words of a run of codes: bit j of code i is bit `i * bits + j` of the stream."""
    words = [0] * (len(codes) * bits // 32)
    for i, code in enumerate(codes):
        for j in range(bits):
            position = i * bits + j
            words[position // 32] |= ((code >> j) & 1) << (position % 32)
    return words


def signed(word: int) -> int:
    """Return the int32 that has the bits of a 32-bit word."""
    return word - 2**32 if word >= 2**31 else word


def pack_qweight(codes: list[list[int]], bits: int) -> list[list[int]]:
    """Return qweight[word][out] of codes[out][in]."""
    columns = [pack_stream(row, bits) for row in codes]
    return [[signed(column[word]) for column in columns] for word in range(len(columns[0]))]


def pack_qzeros(zeros: list[list[int]], bits: int, version: int) -> list[list[int]]:
    """Return qzeros[group][word] of zeros[out][group]; version 1 stores zero - 1."""
    less = 1 if version == 1 else 0
    groups = range(len(zeros[0]))
    return [[signed(word) for word in pack_stream([row[g] - less for row in zeros], bits)] for g in groups]


def group_index(columns: int, group_size: int) -> list[int]:
    """Return the group of each input channel."""
    return [0 if group_size == -1 else column // group_size for column in range(columns)]


def make_case(
    bits: int, group_size: int, symmetric: bool, out: int, columns: int
) -> tuple[list[list[int]], list[list[float]], list[list[int]]]:
    """Return codes[out][in], scales[out][group] and zeros[out][group] from a fixed congruential generator."""
    state = 12345

    def draw(below: int) -> int:
        nonlocal state
        state = (state * 1103515245 + 12345) % 2**31
        return (state >> 16) % below

    groups = 1 if group_size == -1 else columns // group_size
    codes = [[draw(2**bits) for _ in range(columns)] for _ in range(out)]
    scales = [[(1 + draw(1023)) / 4096 for _ in range(groups)] for _ in range(out)]
    middle = 2 ** (bits - 1)
    zeros = [[middle if symmetric else 1 + draw(2**bits - 1) for _ in range(groups)] for _ in range(out)]
    return codes, scales, zeros


def safetensors_bytes(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """Return a safetensors file of name -> (dtype code, shape, little-endian bytes)."""
    width = {"I32": 4, "F16": 2, "U8": 1}
    header = {}
    body = b""
    for name in sorted(tensors, key=lambda key: (-width[tensors[key][0]], key)):
        dtype, shape, data = tensors[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def _matrix(dtype: str, rows: list[list[int]] | list[list[float]]) -> tuple[str, list[int], bytes]:
    letter = {"I32": "i", "F16": "e", "U8": "B"}[dtype]
    flat = [value for row in rows for value in row]
    return dtype, [len(rows), len(rows[0])], struct.pack(f"<{len(flat)}{letter}", *flat)


def golden_bytes(case: str) -> bytes:
    """Return the golden file of a case: the canonical tensors and everything that both versions make of them."""
    bits, group_size, symmetric, out, columns = CASES[case]
    codes, scales, zeros = make_case(bits, group_size, symmetric, out, columns)
    index = group_index(columns, group_size)
    by_group = [[row[group] for row in scales] for group in range(len(scales[0]))]
    return safetensors_bytes(
        {
            "codes": _matrix("U8", codes),
            "scales": _matrix("F16", scales),
            "zeros": _matrix("U8", zeros),
            "packed.qweight": _matrix("I32", pack_qweight(codes, bits)),
            "packed.qzeros.v1": _matrix("I32", pack_qzeros(zeros, bits, 1)),
            "packed.qzeros.v2": _matrix("I32", pack_qzeros(zeros, bits, 2)),
            "packed.scales": _matrix("F16", by_group),
            "packed.g_idx": ("I32", [columns], struct.pack(f"<{columns}i", *index)),
        }
    )


if __name__ == "__main__":
    for case_name in CASES:
        (Path(__file__).parent / f"{case_name}.safetensors").write_bytes(golden_bytes(case_name))
