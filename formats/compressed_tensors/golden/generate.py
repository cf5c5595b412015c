"""Write the golden files of the compressed-tensors layout with a packer that follows SPEC.md bit by bit.

Pure Python: it shares no line with the codec, so the two can only agree by both following the specification. The
tests also use its functions as their oracle. Run `python generate.py` to write the files again beside this script.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

# name -> (bits, group size, symmetric, out, in); group size -1 is one group per output channel.
CASES = {
    "w2_g32": (2, 32, False, 18, 64),
    "w3_g32": (3, 32, False, 20, 64),
    "w3_channel": (3, -1, False, 12, 50),
    "w4_channel_symmetric": (4, -1, True, 6, 22),
    "w8_g8": (8, 8, False, 5, 16),
}


def pack_dense(codes: list[int], bits: int) -> list[int]:
    """Return the 32-bit words of a run of codes: bit j of code i is bit `i * bits + j` of the stream."""
    words = [0] * ((len(codes) * bits + 31) // 32)
    for i, code in enumerate(codes):
        for j in range(bits):
            position = i * bits + j
            words[position // 32] |= ((code >> j) & 1) << (position % 32)
    return words


def pack_padded(codes: list[int], bits: int) -> list[int]:
    """Return the 32-bit words of a run of codes, each word with as many whole codes as it holds."""
    per_word = 32 // bits
    words = []
    for start in range(0, len(codes), per_word):
        words.append(sum(code << (place * bits) for place, code in enumerate(codes[start : start + per_word])))
    return words


def signed(word: int) -> int:
    """Return the int32 that has the bits of a 32-bit word."""
    return word - 2**32 if word >= 2**31 else word


def pack_weight(codes: list[list[int]], bits: int, padded: bool) -> list[list[int]]:
    """Return weight_packed[out][word] of codes[out][in]."""
    pack = pack_padded if padded else pack_dense
    return [[signed(word) for word in pack(row, bits)] for row in codes]


def pack_zeros(zeros: list[list[int]], bits: int, padded: bool) -> list[list[int]]:
    """Return weight_zero_point[word][group] of zeros[out][group]."""
    pack = pack_padded if padded else pack_dense
    columns = [pack([row[group] for row in zeros], bits) for group in range(len(zeros[0]))]
    return [[signed(column[word]) for column in columns] for word in range(len(columns[0]))]


def make_case(
    bits: int, group_size: int, symmetric: bool, out: int, columns: int
) -> tuple[list[list[int]], list[list[float]], list[list[int]]]:
    """Return codes[out][in], scales[out][group] and zeros[out][group] from a fixed congruential generator."""
    state = 54321

    def draw(below: int) -> int:
        nonlocal state
        state = (state * 1103515245 + 12345) % 2**31
        return (state >> 16) % below

    groups = 1 if group_size == -1 else columns // group_size
    codes = [[draw(2**bits) for _ in range(columns)] for _ in range(out)]
    scales = [[(1 + draw(1023)) / 4096 for _ in range(groups)] for _ in range(out)]
    middle = 2 ** (bits - 1)
    zeros = [[middle if symmetric else draw(2**bits) for _ in range(groups)] for _ in range(out)]
    return codes, scales, zeros


def safetensors_bytes(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """Return a safetensors file of name -> (dtype code, shape, little-endian bytes)."""
    width = {"I64": 8, "I32": 4, "F16": 2, "U8": 1}
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
    """Return the golden file of a case: the canonical tensors and everything that the layout makes of them."""
    bits, group_size, symmetric, out, columns = CASES[case]
    codes, scales, zeros = make_case(bits, group_size, symmetric, out, columns)
    tensors = {
        "codes": _matrix("U8", codes),
        "scales": _matrix("F16", scales),
        "zeros": _matrix("U8", zeros),
        "packed.weight_scale": _matrix("F16", scales),
        "packed.weight_shape": ("I64", [2], struct.pack("<2q", out, columns)),
    }
    for form, padded in (("dense", False), ("padded", True)):
        tensors[f"packed.weight_packed.{form}"] = _matrix("I32", pack_weight(codes, bits, padded))
        if not symmetric:
            tensors[f"packed.weight_zero_point.{form}"] = _matrix("I32", pack_zeros(zeros, bits, padded))
    return safetensors_bytes(tensors)


if __name__ == "__main__":
    for case_name in CASES:
        (Path(__file__).parent / f"{case_name}.safetensors").write_bytes(golden_bytes(case_name))
