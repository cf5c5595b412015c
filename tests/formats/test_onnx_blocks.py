"""Blocks of MatMulNBits: golden bytes, every grid, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
import torch
from onnx_graphs import FOLDER, random_layer

from cloq_export.errors import FormatError, ShapeError
from cloq_export.formats.onnx.blocks import BlockGrid, choose_blocks, pack_blocks, unpack_blocks
from cloq_export.types import QuantizedLayer, QuantSpec

GOLDEN = json.loads((FOLDER / "golden" / "blocks.json").read_text())


def golden_layer(case: dict[str, Any]) -> QuantizedLayer:
    layer = case["layer"]
    return QuantizedLayer(
        torch.tensor(layer["codes"], dtype=torch.uint8),
        torch.tensor(layer["scales"], dtype=torch.float16),
        torch.tensor(layer["zeros"], dtype=torch.uint8),
        QuantSpec(case["bits"], case["group_size"]),
    )


def test_the_golden_file_is_what_its_script_makes() -> None:
    spec = importlib.util.spec_from_file_location("generate", FOLDER / "golden" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert {name: generate.make_case(case) for name, case in generate.CASES.items()} == GOLDEN


@pytest.mark.parametrize("name", list(GOLDEN))
def test_blocks_are_the_golden_bytes_and_come_back(name: str) -> None:
    case = GOLDEN[name]
    layer = golden_layer(case)
    grid = choose_blocks(
        layer.spec, layer.in_features, style=case["style"], two_bit="compact" if "compact" in name else "exact"
    )
    assert (grid.bits, grid.block_size) == (case["container_bits"], case["block_size"])
    parts = dict(zip(("codes", "scales", "zeros"), pack_blocks(layer, grid), strict=True))
    assert {part: tensor.numpy().tobytes().hex() for part, tensor in parts.items()} == case["stored"]
    read = unpack_blocks(tuple(parts.values()), grid, layer.spec, (layer.out_features, layer.in_features))
    assert read.spec == layer.spec
    for field in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(read, field), getattr(layer, field))


@pytest.mark.parametrize("style", ["matmulnbits", "qdq"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 16, 32, 48, 512, 1536])
def test_every_grid_comes_back(style: Any, bits: int, group_size: int) -> None:
    layer = random_layer(QuantSpec(bits, group_size), 5, 1536, 0)
    grid = choose_blocks(layer.spec, 1536, style=style)
    read = unpack_blocks(pack_blocks(layer, grid), grid, layer.spec, (5, 1536))
    assert torch.equal(read.codes, layer.codes)
    assert torch.equal(read.scales, layer.scales)
    assert torch.equal(read.zeros, layer.zeros)


def test_a_row_long_group_takes_the_block_that_is_stored_in_fewest_bytes() -> None:
    def chosen(in_features: int) -> tuple[int, int]:
        grid = choose_blocks(QuantSpec(4, -1), in_features, style="matmulnbits")
        return grid.block_size, grid.blocks

    assert [chosen(width) for width in (576, 1536, 1000, 24)] == [(64, 9), (256, 6), (256, 4), (32, 1)]


@pytest.mark.parametrize(
    ("bits", "group_size", "style", "two_bit", "message"),
    [
        (4, 24, "matmulnbits", "exact", r"groups of 24 inputs, .* 16, 32, 64, 128 or 256 fits; .*`style=qdq`"),
        (2, 16, "matmulnbits", "compact", r"groups of 16 inputs, .* 32, 64 or 128 fits; .*`two_bit=exact`"),
        (2, 24, "matmulnbits", "compact", r"`two_bit=exact` `style=qdq`"),
        (2, 16, "qdq", "compact", r"`two_bit=exact`, or"),
    ],
)
def test_groups_without_a_block_are_refused(bits: int, group_size: int, style: Any, two_bit: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        choose_blocks(QuantSpec(bits, group_size), 192, style=style, two_bit=two_bit)


def test_blocks_that_were_tampered_with_are_refused() -> None:
    layer = random_layer(QuantSpec(3, 64), 4, 128, 0)
    grid = choose_blocks(QuantSpec(3, -1), 104, style="matmulnbits")
    short = random_layer(QuantSpec(3, -1), 4, 104, 0)
    codes, scales, zeros = pack_blocks(short, grid)
    codes[0, -1, -1] = 1
    with pytest.raises(FormatError, match="the padding behind the last input is not zero"):
        unpack_blocks((codes, scales, zeros), grid, short.spec, (4, 104))
    narrow = BlockGrid("matmulnbits", 4, 32, 4, 1)
    codes, scales, zeros = pack_blocks(layer, narrow)
    for change in (1.5, 1 + 2**-12):
        other = scales.clone()
        other[1, 1] *= change
        with pytest.raises(FormatError, match="differ in scale or zero, or a scale is no float16 number"):
            unpack_blocks((codes, other, zeros), narrow, layer.spec, (4, 128))
    codes[0, 0, 0] |= 8
    with pytest.raises(FormatError, match=r"the largest code is .*; 3 bits hold"):
        unpack_blocks((codes, scales, zeros), narrow, layer.spec, (4, 128))
