"""Write the golden file of the ONNX blocks with plain integers that follow SPEC.md.

Pure Python: it shares no line with the codec. Run `python generate.py` to write the file again beside this script.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

# name -> style, bits, group size (None for one group per output channel), outputs, inputs, container bits, block size.
CASES = {
    "w3_channel_matmulnbits": ("matmulnbits", 3, None, 3, 40, 4, 64),
    "w2_g64_compact": ("matmulnbits", 2, 64, 3, 192, 2, 64),
    "w4_g48_matmulnbits": ("matmulnbits", 4, 48, 2, 96, 4, 16),
    "w2_g32_qdq_exact": ("qdq", 2, 32, 3, 64, 4, 32),
    "w2_g32_qdq_compact": ("qdq", 2, 32, 3, 64, 2, 32),
    "w8_g24_qdq": ("qdq", 8, 24, 3, 48, 8, 24),
}


def packed(codes: list[int], bits: int) -> bytes:
    """Return codes as a bit stream, the first in the lowest bits of the first byte."""
    stream = sum(code << (place * bits) for place, code in enumerate(codes))
    return stream.to_bytes((len(codes) * bits + 7) // 8, "little")


def make_case(case: tuple[str, int, int | None, int, int, int, int]) -> dict[str, object]:
    """Return one layer, and what its blocks hold as hexadecimal text; see `CASES` for what a case is made of."""
    style, bits, group, outputs, inputs, container, block = case
    state = 99

    def drawn(limit: int) -> int:
        nonlocal state
        state = (1103515245 * state + 12345) % 2**31
        return (state >> 12) % limit

    span = group or inputs
    codes = [[drawn(2**bits) for _ in range(inputs)] for _ in range(outputs)]
    zeros = [[drawn(2**bits) for _ in range(inputs // span)] for _ in range(outputs)]
    scales = [[(1 + drawn(1000)) / 1024 for _ in range(inputs // span)] for _ in range(outputs)]
    blocks = -(-inputs // block)
    of_block = [number * block // span for number in range(blocks)]
    if style == "matmulnbits":
        rows = [row + [0] * (blocks * block - inputs) for row in codes]
        code_bytes = b"".join(packed(row, container) for row in rows)
        zero_bytes = b"".join(packed([row[place] for place in of_block], container) for row in zeros)
        values = [row[place] for row in scales for place in of_block]
    else:
        code_bytes = packed([row[place] for place in range(inputs) for row in codes], container)
        zero_bytes = packed([row[place] for place in of_block for row in zeros], container)
        values = [row[place] for place in of_block for row in scales]
    return {
        "style": style,
        "bits": bits,
        "group_size": group or -1,
        "container_bits": container,
        "block_size": block,
        "layer": {"codes": codes, "zeros": zeros, "scales": scales},
        "stored": {
            "codes": code_bytes.hex(),
            "zeros": zero_bytes.hex(),
            "scales": struct.pack(f"<{len(values)}f", *values).hex(),
        },
    }


def main() -> None:
    """Write the file."""
    content = {name: make_case(case) for name, case in CASES.items()}
    path = Path(__file__).with_name("blocks.json")
    path.write_text(json.dumps(content, separators=(",", ":"), sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
