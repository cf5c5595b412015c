"""Write the golden file of the merged layout with exact rational arithmetic that follows SPEC.md.

Pure Python: it shares no line with the codec. Run `python generate.py` to write the file again beside this script.
"""

from __future__ import annotations

import json
import struct
from fractions import Fraction
from pathlib import Path

# Mantissa bits behind the point and the exponent of the smallest normal number.
DTYPES = {"bfloat16": (7, -126), "float16": (10, -14)}
OUT, COLUMNS, GROUP, BITS, RANK, ALPHA = 3, 16, 8, 3, 2, 3


def float16(value: float) -> Fraction:
    """Return the float16 nearest to a number, exactly."""
    return Fraction(struct.unpack("<e", struct.pack("<e", value))[0])


def rounded(value: Fraction, dtype: str) -> Fraction:
    """Return the number of a dtype that is nearest, ties to even."""
    if value == 0:
        return value
    mantissa, smallest = DTYPES[dtype]
    exponent = max(smallest, (abs(value).numerator.bit_length() - abs(value).denominator.bit_length()) - 1)
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    step = Fraction(2) ** (exponent - mantissa)
    return round(value / step) * step


def make_case() -> dict[str, object]:
    """Return one layer, one pair, and the merged weight in each dtype, all as exact decimal floats."""
    state = 2024

    def drawn(limit: int) -> int:
        nonlocal state
        state = (state * 1103515245 + 12345) % 2**31
        return (state >> 8) % limit

    groups = COLUMNS // GROUP
    codes = [[drawn(2**BITS) for _ in range(COLUMNS)] for _ in range(OUT)]
    zeros = [[drawn(2**BITS) for _ in range(groups)] for _ in range(OUT)]
    scales = [[float16((1 + drawn(1000)) / 3000) for _ in range(groups)] for _ in range(OUT)]
    lora_a = [[float16((drawn(2000) - 1000) / 700) for _ in range(COLUMNS)] for _ in range(RANK)]
    lora_b = [[float16((drawn(2000) - 1000) / 900) for _ in range(RANK)] for _ in range(OUT)]
    exact = [
        [
            scales[o][i // GROUP] * (codes[o][i] - zeros[o][i // GROUP])
            + Fraction(ALPHA, RANK) * sum(lora_b[o][r] * lora_a[r][i] for r in range(RANK))
            for i in range(COLUMNS)
        ]
        for o in range(OUT)
    ]
    plain = {"scales": scales, "lora_A": lora_a, "lora_B": lora_b}
    return {
        "bits": BITS,
        "group_size": GROUP,
        "alpha": ALPHA,
        "codes": codes,
        "zeros": zeros,
        **{name: [[float(value) for value in row] for row in matrix] for name, matrix in plain.items()},
        **{dtype: [[float(rounded(value, dtype)) for value in row] for row in exact] for dtype in DTYPES},
    }


def main() -> None:
    """Write the golden file."""
    path = Path(__file__).with_name("w3_rank2.json")
    path.write_text(json.dumps(make_case(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
