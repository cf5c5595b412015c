"""AutoRound's layouts: its own bytes, round trips, refusals, and its config as written and as AutoRound has it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_layers import assert_same, make_layer
from safetensors.torch import load_file

import cloq_export.formats.auto_round as auto_round
import cloq_export.formats.gptq as gptq
from cloq_export.errors import FormatError, ShapeError
from cloq_export.formats.auto_round import AUTO_ROUND, AUTO_ROUND_GPTQ, AutoRoundLayout, parse_quantization_config
from cloq_export.types import QuantizedLayer, QuantSpec

GOLDEN = Path(auto_round.__file__).parent / "golden"
FINGERPRINT = "sha256:" + "0" * 64
SPECS = {
    "model.layers.0.self_attn.q_proj": QuantSpec(2, 64),
    "model.layers.0.mlp.down_proj": QuantSpec(4, 128),
    "model.layers.1.self_attn.q_proj": QuantSpec(2, 64),
    "model.layers.1.mlp.down-proj": QuantSpec(8, -1, symmetric=True),
    "lm_head": QuantSpec(2, 64),
}
THEIRS: dict[str, Any] = {
    "quant_method": "auto-round",
    "packing_format": "auto_round",
    "data_type": "int",
    "bits": 2,
    "group_size": 64,
    "sym": False,
}


@pytest.mark.parametrize("case", json.loads((GOLDEN / "cases.json").read_text()))
def test_golden_files_of_autoround_itself(case: str) -> None:
    grid = json.loads((GOLDEN / "cases.json").read_text())[case]
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    canonical = {name: tensors.pop(f"canonical.{name}") for name in ("codes", "scales", "zeros")}
    layer = QuantizedLayer(**canonical, spec=QuantSpec(grid["bits"], grid["group_size"], grid["symmetric"]))
    layout = AUTO_ROUND if grid["packing"] == "auto_round" else AUTO_ROUND_GPTQ
    packed = layout.pack_layer(layer)
    assert packed.keys() == tensors.keys()
    assert all(torch.equal(packed[part], tensors[part]) for part in tensors)
    assert_same(layout.unpack_layer(tensors, layer.spec), layer)


def test_words_worked_out_by_hand() -> None:
    codes = torch.tensor([[0, 1, 2, 3] * 8] * 32, dtype=torch.uint8)
    zeros = torch.full((32, 1), 2, dtype=torch.uint8)
    layer = QuantizedLayer(codes, torch.ones(32, 1).half(), zeros, QuantSpec(2, -1, symmetric=True))
    for layout, word in ((AUTO_ROUND, 0xAAAAAAAA), (AUTO_ROUND_GPTQ, 0x55555555)):
        packed = layout.pack_layer(layer)
        assert [value & 0xFFFFFFFF for value in packed["qweight"][:, 0].tolist()] == [0xE4E4E4E4] * 2
        assert [value & 0xFFFFFFFF for value in packed["qzeros"][0].tolist()] == [word] * 2


@st.composite
def layers(draw) -> tuple[AutoRoundLayout, QuantizedLayer]:
    layout = draw(st.sampled_from([AUTO_ROUND, AUTO_ROUND_GPTQ]))
    symmetric = layout is AUTO_ROUND_GPTQ or draw(st.booleans())
    spec = QuantSpec(draw(st.sampled_from([2, 3, 4, 8])), draw(st.sampled_from([32, 64, -1])), symmetric)
    columns = max(32, spec.group_size) * draw(st.integers(1, 3))
    return layout, make_layer(spec, 32 * draw(st.integers(1, 3)), columns, draw(st.integers(0, 2**31)))


@settings(max_examples=40, deadline=None)
@given(layers())
def test_layers_come_back_from_the_words_of_gptq(case: tuple[AutoRoundLayout, QuantizedLayer]) -> None:
    layout, layer = case
    packed = layout.pack_layer(layer)
    with_index = gptq.pack_layer(layer, version=layout.version)
    assert {*packed, "g_idx"} == set(with_index)
    assert all(torch.equal(packed[part], with_index[part]) for part in packed)
    assert_same(layout.unpack_layer(packed, layer.spec), layer)
    assert set(layout.headers(*layer.codes.shape, layer.spec)) == set(layout.parts(layer.spec)) == set(packed)


def test_an_index_that_a_file_has_all_the_same_is_looked_at() -> None:
    layer = make_layer(QuantSpec(4, 32), 32, 64)
    packed = gptq.pack_layer(layer)
    assert_same(AUTO_ROUND.unpack_layer(packed, layer.spec), layer)
    packed["g_idx"] = packed["g_idx"].flip(0)
    with pytest.raises(FormatError, match="g_idx is not sequential"):
        AUTO_ROUND.unpack_layer(packed, layer.spec)


@pytest.mark.parametrize(("out", "columns", "side"), [(32, 48, "48 inputs"), (16, 32, "16 outputs")])
def test_sides_that_its_reader_has_no_whole_rows_for_are_refused(out: int, columns: int, side: str) -> None:
    layer = make_layer(QuantSpec(2, -1), out, columns)
    with pytest.raises(ShapeError, match=rf"m has {side}; AutoRound's layout has .* multiples of 32\. .*gptq_v2"):
        AUTO_ROUND.pack_layer(layer, name="m")
    gptq.GPTQ_V2.pack_layer(layer)


def test_zeros_less_one_are_written_for_symmetric_layers_alone() -> None:
    layer = make_layer(QuantSpec(4, 32), 32, 64, least_zero=1)
    message = r"a is asymmetric, and the layout auto_round_gptq is for symmetric .* write it as auto_round \(`format="
    with pytest.raises(FormatError, match=message):
        AUTO_ROUND_GPTQ.pack_layer(layer, name="a")
    with pytest.raises(FormatError, match=message):
        AUTO_ROUND_GPTQ.quantization_config({"a": layer.spec}, base_fingerprint=FINGERPRINT)
    # A file of others is read as it is labelled.
    packed = gptq.pack_layer(layer, version=1)
    del packed["g_idx"]
    assert_same(AUTO_ROUND_GPTQ.unpack_layer(packed, layer.spec), layer)


def test_config_as_written() -> None:
    config = AUTO_ROUND.quantization_config(
        SPECS, base_fingerprint=FINGERPRINT, skipped=["model.layers.2.mlp.gate", "vision.0.fc"], producer="x:1"
    )
    assert config == {
        "quant_method": "auto-round",
        "packing_format": "auto_round",
        "bits": 2,
        "group_size": 64,
        "sym": False,
        "data_type": "int",
        "block_name_to_quantize": "model.layers",
        "extra_config": {
            "lm_head": {"bits": 2, "group_size": 64, "sym": False, "data_type": "int"},
            "model.layers.0.mlp.down_proj": {"bits": 4, "group_size": 128, "sym": False, "data_type": "int"},
            "model.layers.1.mlp.down-proj": {"bits": 8, "group_size": -1, "sym": True, "data_type": "int"},
            "model.layers.2.mlp.gate": {"bits": 16},
            "vision.0.fc": {"bits": 16},
        },
        "cloq": {
            "format_version": 1,
            "layout": "auto_round",
            "base_fingerprint": FINGERPRINT,
            "modules": sorted(SPECS),
        },
    }
    grids = parse_quantization_config(config)
    assert {module: grids.spec_for(module) for module in SPECS} == SPECS
    assert grids.spec_for("model.layers.2.mlp.gate") is None
    assert (grids.modules, grids.base_fingerprint) == (tuple(sorted(SPECS)), FINGERPRINT)
    symmetric = {"h.0.a": QuantSpec(4, 128, symmetric=True)}
    plain = AUTO_ROUND_GPTQ.quantization_config(symmetric, base_fingerprint=FINGERPRINT)
    assert (plain["packing_format"], plain["block_name_to_quantize"]) == ("auto_round:auto_gptq", "h")
    assert "extra_config" not in plain
    assert parse_quantization_config(plain).layout is AUTO_ROUND_GPTQ


def test_names_that_readers_would_take_for_patterns_are_not_written() -> None:
    with pytest.raises(FormatError, match=r"the module name 'a\+b' holds characters other than letters"):
        AUTO_ROUND.quantization_config({"a+b": QuantSpec(4, 32)}, base_fingerprint=FINGERPRINT)
    with pytest.raises(FormatError, match="needs at least one quantized module"):
        AUTO_ROUND.quantization_config({}, base_fingerprint=FINGERPRINT)


@pytest.mark.parametrize(
    ("packing", "layout"),
    [
        ("auto_round", AUTO_ROUND),
        ("auto_round:gptqmodel", AUTO_ROUND),
        ("auto_round:auto_gptq", AUTO_ROUND_GPTQ),
        ("auto_round:gptq", AUTO_ROUND_GPTQ),
        (None, AUTO_ROUND_GPTQ),
    ],
)
def test_packing_formats_tell_the_zeros(packing: str | None, layout: AutoRoundLayout) -> None:
    config = {key: value for key, value in THEIRS.items() if key != "packing_format"}
    grids = parse_quantization_config(config if packing is None else {**config, "packing_format": packing})
    assert grids.layout is layout
    assert layout.in_version(layout.version) is layout


def test_layers_that_differ_are_named() -> None:
    extra = {"a.b": {"bits": 4, "group_size": 32}, "a.c": {"bits": 16}}
    grids = parse_quantization_config({**THEIRS, "extra_config": extra})
    assert grids.spec_for("a.b") == QuantSpec(4, 32)
    assert grids.spec_for("a.c") is None
    assert grids.spec_for("a.d") == QuantSpec(2, 64)


def test_keys_that_name_no_layer_are_searched_for() -> None:
    extra = {"a.down": {"bits": 8}, ".*down.*": {"bits": 2}, "gate": {"bits": 16}}
    coded = {f"{module}.qweight": ("I32", (4, 8)) for module in ("a.down", "b.down", "c.up")}
    headers = coded | {"c.gate_proj.weight": ("F16", (4, 4))}
    grids = parse_quantization_config({**THEIRS, "extra_config": extra}, headers)
    assert grids.spec_for("a.down") == QuantSpec(8, 64)
    assert grids.spec_for("b.down") == QuantSpec(2, 64)
    assert grids.spec_for("c.up") == QuantSpec(2, 64)
    assert grids.spec_for("c.gate_proj") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'; this reader knows 'auto-round'"),
        ({"packing_format": "auto_round:auto_awq"}, "packing_format is 'auto_round:auto_awq'; of AutoRound's"),
        ({"packing_format": ["auto_round"]}, "packing_format is ['auto_round']; of AutoRound's"),
        ({"packing_format": "auto_round:auto_gptq", "checkpoint_format": "gptq_v2"}, "but checkpoint_format is 'gptq"),
        ({"data_type": "mx_fp"}, "data_type is 'mx_fp'; only 'int' is read"),
        ({"method": "gptq"}, "quant_method is 'auto-round' but method is 'gptq'; one of them is wrong"),
        ({"rotation_config": {"a": 1}}, "which changes what the layers compute"),
        ({"extra_config": {".*down(": {"bits": 4}}}, "the pattern '.*down(' is not read (a group is not closed)"),
        ({"extra_config": {"a": 4}}, "extra_config maps 'a' to a int; expected an object of options"),
        ({"extra_config": {"a": {"data_type": "fp"}}}, "extra_config gives 'a' the data_type 'fp'"),
        ({"extra_config": [1]}, "extra_config is a list"),
        ({"desc_act": True}, "desc_act is true in a file of AutoRound's"),
        ({"bits": "2"}, "bits '2'"),
        (
            {"cloq": {"format_version": 1, "layout": "gptq_v2", "modules": [], "base_fingerprint": "f"}},
            "cloq.layout is 'gptq_v2' but packing_format is that of 'auto_round'",
        ),
    ],
)
def test_other_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=re.escape(message)):
        parse_quantization_config({**THEIRS, **changes})


def test_an_empty_extra_config_says_nothing() -> None:
    assert not parse_quantization_config({**THEIRS, "extra_config": []}).overrides
