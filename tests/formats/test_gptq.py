"""The GPTQ layout: bytes against a packer that shares no code, round trips, refusals, config."""

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cloq_export.formats.gptq as gptq
from cloq_export.errors import FormatError, ShapeError
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.formats.gptq import (
    GPTQ_V1,
    pack_layer,
    parse_quantization_config,
    quantization_config,
    unpack_layer,
)
from cloq_export.types import QuantizedLayer, QuantSpec

GOLDEN = Path(gptq.__file__).parent / "golden"
FINGERPRINT = "sha256:" + "0" * 64


def load_generator():
    spec = importlib.util.spec_from_file_location("gptq_golden_generate", GOLDEN / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = load_generator()


def make_layer(spec: QuantSpec, out: int, columns: int, seed: int = 0, least_zero: int = 0) -> QuantizedLayer:
    generator = torch.Generator().manual_seed(seed)
    groups = spec.group_count(columns)
    zeros = torch.randint(least_zero, spec.max_code + 1, (out, groups), dtype=torch.uint8, generator=generator)
    if spec.symmetric:
        zeros = torch.full_like(zeros, 2 ** (spec.bits - 1))
    return QuantizedLayer(
        codes=torch.randint(0, spec.max_code + 1, (out, columns), dtype=torch.uint8, generator=generator),
        scales=(torch.rand(out, groups, generator=generator) + 0.01).half(),
        zeros=zeros,
        spec=spec,
    )


def assert_same(left: QuantizedLayer, right: QuantizedLayer) -> None:
    assert left.spec == right.spec
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name


# The smallest legal number of channels for a width: what fills whole 32-bit words.
STEP = {2: 16, 3: 32, 4: 8, 8: 4}


@st.composite
def layers(draw, least_zero: int = 0) -> QuantizedLayer:
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    group_size = draw(st.sampled_from([32, 64, 128, -1]))
    symmetric = draw(st.booleans())
    out = STEP[bits] * draw(st.integers(1, 5))
    if group_size == -1:
        columns = STEP[bits] * draw(st.integers(1, 9))
    else:
        columns = group_size * draw(st.integers(1, 3))
    spec = QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric)
    return make_layer(spec, out, columns, draw(st.integers(0, 2**31)), least_zero)


@settings(max_examples=60, deadline=None)
@given(layers())
def test_round_trip_v2(layer: QuantizedLayer) -> None:
    packed = pack_layer(layer, version=2)
    assert_same(unpack_layer(packed, layer.spec, version=2), layer)


@settings(max_examples=30, deadline=None)
@given(layers(least_zero=1))
def test_round_trip_v1(layer: QuantizedLayer) -> None:
    packed = pack_layer(layer, version=1)
    assert_same(unpack_layer(packed, layer.spec, version=1), layer)


@settings(max_examples=40, deadline=None)
@given(layers(least_zero=1), st.sampled_from([1, 2]))
def test_bytes_equal_the_bit_by_bit_packer(layer: QuantizedLayer, version: int) -> None:
    packed = pack_layer(layer, version=version)
    bits = layer.spec.bits
    rows, columns = layer.codes.shape
    assert packed["qweight"].tolist() == oracle.pack_qweight(layer.codes.tolist(), bits)
    assert packed["qzeros"].tolist() == oracle.pack_qzeros(layer.zeros.tolist(), bits, version)
    assert torch.equal(packed["scales"], layer.scales.t())
    assert packed["g_idx"].tolist() == oracle.group_index(columns, layer.spec.group_size)
    groups = layer.scales.shape[1]
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in packed.items()} == {
        "qweight": (torch.int32, (columns * bits // 32, rows)),
        "qzeros": (torch.int32, (groups, rows * bits // 32)),
        "scales": (torch.float16, (groups, rows)),
        "g_idx": (torch.int32, (columns,)),
    }
    assert all(tensor.is_contiguous() for tensor in packed.values())


def test_words_worked_out_by_hand() -> None:
    codes = (torch.arange(32, dtype=torch.uint8) % 8).repeat(32, 1)
    zeros = torch.full((32, 1), 5, dtype=torch.uint8)
    layer = QuantizedLayer(codes, torch.ones(32, 1).half(), zeros, QuantSpec(bits=3, group_size=-1))
    words = pack_layer(layer)["qweight"][:, 0].tolist()
    assert [word & 0xFFFFFFFF for word in words] == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]
    # 5 is 101 and 4 is 001, least significant bit first, and a word starts where the last one stopped in the pattern.
    stored = pack_layer(layer, version=2)["qzeros"][0].tolist()
    assert [word & 0xFFFFFFFF for word in stored] == [0x6DB6DB6D, 0xDB6DB6DB, 0xB6DB6DB6]
    stored = pack_layer(layer, version=1)["qzeros"][0].tolist()
    assert [word & 0xFFFFFFFF for word in stored] == [0x24924924, 0x49249249, 0x92492492]

    codes = torch.tensor([[0, 1, 2, 3] * 4] * 16, dtype=torch.uint8)
    zeros = torch.ones(16, 1, dtype=torch.uint8)
    layer = QuantizedLayer(codes, torch.ones(16, 1).half(), zeros, QuantSpec(bits=2, group_size=-1))
    assert pack_layer(layer)["qweight"][0, 0].item() & 0xFFFFFFFF == 0xE4E4E4E4
    assert pack_layer(layer, version=2)["qzeros"].item() == 0x55555555
    assert pack_layer(layer, version=1)["qzeros"].item() == 0

    codes = torch.arange(8, 16, dtype=torch.uint8).repeat(8, 1)
    zeros = torch.full((8, 1), 8, dtype=torch.uint8)
    layer = QuantizedLayer(codes, torch.ones(8, 1).half(), zeros, QuantSpec(bits=4, group_size=-1, symmetric=True))
    assert pack_layer(layer)["qweight"][0, 0].item() & 0xFFFFFFFF == 0xFEDCBA98
    assert pack_layer(layer, version=1)["qzeros"].item() == 0x77777777


@pytest.mark.parametrize("case", list(oracle.CASES))
def test_golden_files(case: str) -> None:
    path = GOLDEN / f"{case}.safetensors"
    assert path.read_bytes() == oracle.golden_bytes(case), "the golden file is not what its script makes"
    tensors, _ = read_safetensors(path)
    bits, group_size, symmetric, _, _ = oracle.CASES[case]
    layer = QuantizedLayer(
        tensors["codes"], tensors["scales"], tensors["zeros"], QuantSpec(bits, group_size, symmetric)
    )
    for version in (1, 2):
        golden = {
            "qweight": tensors["packed.qweight"],
            "qzeros": tensors[f"packed.qzeros.v{version}"],
            "scales": tensors["packed.scales"],
            "g_idx": tensors["packed.g_idx"],
        }
        packed = pack_layer(layer, version=version)
        assert all(torch.equal(packed[name], golden[name]) for name in golden)
        assert_same(unpack_layer(golden, layer.spec, version=version), layer)


def test_every_golden_file_has_a_case() -> None:
    assert {path.stem for path in GOLDEN.glob("*.safetensors")} == set(oracle.CASES)


def test_version_1_refuses_a_zero_of_0() -> None:
    layer = make_layer(QuantSpec(bits=2, group_size=32), 16, 64, least_zero=1)
    layer.zeros[3, 1] = 0
    with pytest.raises(
        FormatError, match=r"m\.q has a zero of 0, which the layout gptq .* cannot hold .* write it as gptq_v2"
    ):
        pack_layer(layer, version=1, name="m.q")
    assert_same(unpack_layer(pack_layer(layer, version=2), layer.spec, version=2), layer)


def test_version_1_reader_refuses_a_wrapped_zero() -> None:
    layer = make_layer(QuantSpec(bits=2, group_size=32), 16, 64)
    packed = pack_layer(layer, version=2)
    packed["qzeros"] = torch.full_like(packed["qzeros"], -1)
    with pytest.raises(FormatError, match="all bits set, which readers of gptq take for 0 or for 4; quantize again"):
        unpack_layer(packed, layer.spec, version=1)


@pytest.mark.parametrize("version", [0, 3, "2"])
def test_unknown_version(version) -> None:
    layer = make_layer(QuantSpec(bits=4, group_size=32), 8, 32)
    with pytest.raises(FormatError, match=r"layout version .* is unknown; allowed are 1 \(gptq\) and 2 \(gptq_v2\)"):
        pack_layer(layer, version=version)
    with pytest.raises(FormatError, match="layout version"):
        unpack_layer({}, layer.spec, version=version)


@pytest.mark.parametrize(
    ("bits", "out", "columns", "message"),
    [
        (
            3,
            32,
            48,
            r"m has 48 inputs; .* 3-bit codes in whole 32-bit words, so inputs must be a multiple of 32\. Give",
        ),
        (3, 48, 64, "m has 48 outputs; .* must be a multiple of 32"),
        (2, 24, 64, "m has 24 outputs; .* must be a multiple of 16"),
        (4, 12, 64, "m has 12 outputs; .* must be a multiple of 8"),
        (8, 6, 64, "m has 6 outputs; .* must be a multiple of 4"),
        (8, 4, 6, "m has 6 inputs; .* must be a multiple of 4"),
    ],
)
def test_odd_shapes_are_refused(bits: int, out: int, columns: int, message: str) -> None:
    layer = make_layer(QuantSpec(bits=bits, group_size=-1), out, columns)
    with pytest.raises(ShapeError, match=message):
        pack_layer(layer, name="m")
    with pytest.raises(ShapeError, match=message):
        gptq.check_packable(out, columns, layer.spec, name="m")


def test_group_that_does_not_divide() -> None:
    with pytest.raises(ShapeError, match="96 inputs cannot be cut into groups of 64"):
        gptq.check_packable(32, 96, QuantSpec(bits=4, group_size=64))


def test_symmetric_layer_with_another_zero() -> None:
    layer = make_layer(QuantSpec(bits=4, group_size=32, symmetric=True), 8, 32)
    wrong = dataclasses.replace(layer, zeros=layer.zeros - 1)
    with pytest.raises(FormatError, match="marked symmetric but has a zero other than 8; mark it asymmetric"):
        pack_layer(wrong)
    packed = pack_layer(dataclasses.replace(wrong, spec=QuantSpec(bits=4, group_size=32)))
    with pytest.raises(FormatError, match="marked symmetric"):
        unpack_layer(packed, layer.spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("qweight"), "m lacks the tensor 'qweight'"),
        (lambda t: t.pop("g_idx"), "m lacks the tensor 'g_idx'"),
        (lambda t: t.update(qweight=t["qweight"].long()), r"qweight is torch\.int64; expected torch\.int32"),
        (lambda t: t.update(qweight=t["qweight"][:-1]), "qweight has shape .* which does not hold whole 3-bit codes"),
        (lambda t: t.update(qweight=t["qweight"][:3]), "32 inputs cannot be cut into groups of 64"),
        (lambda t: t.update(qweight=t["qweight"][:, :-1]), "m has 31 outputs"),
        (lambda t: t.update(qweight=t["qweight"][:0]), "does not hold whole 3-bit codes"),
        (lambda t: t.update(qweight=t["qweight"].reshape(-1)), "expected 2 dimensions"),
        (lambda t: t.update(qzeros=t["qzeros"][:1]), r"qzeros has shape \(1, 3\); expected \(2, 3\)"),
        (lambda t: t.update(scales=t["scales"].float()), r"scales is torch\.float32; expected torch\.float16"),
        (lambda t: t.update(scales=t["scales"].t()), r"scales has shape \(32, 2\); expected \(2, 32\)"),
        (lambda t: t.update(scales=-t["scales"]), "m: a scale is NaN, Inf, zero or negative"),
        (lambda t: t.update(scales=t["scales"] * float("inf")), "m: a scale is NaN, Inf, zero or negative"),
        (
            lambda t: t.update(g_idx=t["g_idx"].flip(0)),
            "g_idx is not sequential .*; quantize again with desc_act=false",
        ),
        (lambda t: t.update(g_idx=t["g_idx"][:-1]), r"g_idx has shape \(127,\); expected \(128,\)"),
    ],
)
def test_hostile_tensors(change, message: str) -> None:
    layer = make_layer(QuantSpec(bits=3, group_size=64), 32, 128)
    packed = pack_layer(layer)
    change(packed)
    with pytest.raises(FormatError, match=message) as caught:
        unpack_layer(packed, layer.spec, name="m")
    assert "\n" not in str(caught.value)


def test_wrong_bits_are_noticed() -> None:
    layer = make_layer(QuantSpec(bits=4, group_size=64), 32, 128)
    with pytest.raises(FormatError, match="expected"):
        unpack_layer(pack_layer(layer), QuantSpec(bits=2, group_size=64))


SPECS = {
    "model.layers.0.self_attn.q_proj": QuantSpec(2, 64),
    "model.layers.0.mlp.down_proj": QuantSpec(4, 128),
    "model.layers.1.self_attn.q_proj": QuantSpec(2, 64),
    "model.layers.1.mlp.down-proj": QuantSpec(8, -1, symmetric=True),
}


def test_config_as_written() -> None:
    config = quantization_config(
        SPECS, base_fingerprint=FINGERPRINT, skipped=["model.layers.2.mlp.gate"], producer="cloq_export:0.1.0"
    )
    assert config == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": 2,
        "group_size": 64,
        "sym": False,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": {
            r"+:^model\.layers\.0\.mlp\.down_proj$": {"bits": 4, "group_size": 128, "sym": False},
            r"+:^model\.layers\.1\.mlp\.down\-proj$": {"bits": 8, "group_size": -1, "sym": True},
            r"-:^model\.layers\.2\.mlp\.gate$": {},
        },
        "meta": {"quantizer": ["cloq_export:0.1.0"]},
        "cloq": {
            "format_version": 1,
            "layout": "gptq_v2",
            "base_fingerprint": FINGERPRINT,
            "modules": sorted(SPECS),
        },
    }
    plain = quantization_config({"a": QuantSpec(4, 128)}, version=1, base_fingerprint=FINGERPRINT)
    assert plain["checkpoint_format"] == "gptq"
    assert "dynamic" not in plain
    assert "meta" not in plain


def matched_by_other_readers(dynamic: dict, module: str):
    # The rule of GPTQModel and vLLM, written down from their documentation: first match of re.match counts.
    for pattern, values in dynamic.items():
        if pattern.startswith("-:"):
            if re.match(pattern.removeprefix("-:"), module):
                return False
        elif re.match(pattern.removeprefix("+:"), module):
            return values
    return None


def test_config_means_the_same_to_other_readers() -> None:
    dynamic = quantization_config(SPECS, base_fingerprint=FINGERPRINT, skipped=["skipped.one"])["dynamic"]
    assert matched_by_other_readers(dynamic, "model.layers.0.self_attn.q_proj") is None
    assert matched_by_other_readers(dynamic, "model.layers.0.mlp.down_proj")["bits"] == 4
    assert matched_by_other_readers(dynamic, "model.layers.0.mlp.down_proj.x") is None
    assert matched_by_other_readers(dynamic, "model.layers.1.mlp.down-proj")["sym"] is True
    assert matched_by_other_readers(dynamic, "skipped.one") is False
    assert matched_by_other_readers(dynamic, "skipped_one") is None


def test_config_comes_back() -> None:
    written = quantization_config(SPECS, version=1, base_fingerprint=FINGERPRINT, skipped=["left.float"])
    read = parse_quantization_config(written)
    assert read.layout is GPTQ_V1
    assert read.modules == tuple(sorted(SPECS))
    assert read.base_fingerprint == FINGERPRINT
    assert {module: read.spec_for(module) for module in SPECS} == SPECS
    assert read.spec_for("left.float") is None
    assert read.spec_for("lm_head") is None


def test_config_of_others_is_read() -> None:
    read = parse_quantization_config({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True})
    assert read.layout is GPTQ_V1
    assert read.modules is None
    assert read.base_fingerprint is None
    assert read.spec_for("anything") == QuantSpec(4, 128, symmetric=True)


def test_transformers_accepts_the_config() -> None:
    from transformers import GPTQConfig

    config = GPTQConfig(**quantization_config(SPECS, base_fingerprint=FINGERPRINT))
    assert (config.bits, config.group_size, config.format) == (2, 64, "gptq_v2")


def test_config_needs_modules_with_plain_names() -> None:
    with pytest.raises(FormatError, match="needs at least one quantized module"):
        quantization_config({}, base_fingerprint=FINGERPRINT)
    with pytest.raises(FormatError, match="the module name 'a b' holds characters other than"):
        quantization_config({"x": QuantSpec(2), "y": QuantSpec(2), "a b": QuantSpec(4)}, base_fingerprint=FINGERPRINT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "awq"}, "c: quant_method is 'awq'; this reader knows 'gptq'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; this reader knows"),
        ({"checkpoint_format": ["gptq"]}, "checkpoint_format is"),
        (
            {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "desc_act": None},
            "packing_format is 'auto_round:auto_gptq' but checkpoint_format is 'gptq_v2'",
        ),
        ({"format": "gptq"}, "checkpoint_format is 'gptq_v2' but format is 'gptq'; one of them is wrong"),
        ({"desc_act": "yes"}, "desc_act is 'yes'; expected true or false"),
        ({"rotation": "hadamard"}, "rotation is 'hadamard', which changes what the layers compute"),
        ({"act_bits": 8}, "act_bits is 8, which changes what the layers compute"),
        ({"bits": "4"}, "bits '4', group_size 64, sym False; expected two whole numbers and true or false"),
        ({"bits": 5}, "bits is 5; allowed are 2, 3, 4 and 8"),
        ({"group_size": 7}, "group size is 7"),
        ({"sym": None}, "sym None; expected"),
        ({"dynamic": ["x"]}, "dynamic is a list; expected an object"),
        ({"dynamic": {"+:(a": {"bits": 2}}}, r"the pattern '\(a' is not read \(a group is not closed\); name"),
        ({"dynamic": {"+:^a$": 3}}, "the dynamic rule '\\+:\\^a\\$' is a int; expected an object"),
        ({"dynamic": {"+:^a$": {"bits": 99}}}, "bits is 99"),
        ({"cloq": 3}, "format version 3 of cloq is unknown; this program reads 1"),
        ({"cloq": {"format_version": 2}}, "format version 2 of cloq is unknown"),
        (
            {"cloq": {"format_version": 1, "layout": "gptq", "modules": [], "base_fingerprint": "f"}},
            "cloq.layout is 'gptq' but checkpoint_format is 'gptq_v2'",
        ),
        ({"cloq": {"format_version": 1, "layout": "gptq_v2"}}, "cloq.modules is not a list of names"),
        (
            {"cloq": {"format_version": 1, "layout": "gptq_v2", "modules": []}},
            "cloq.base_fingerprint is None; the config is damaged",
        ),
    ],
)
def test_hostile_config(change: dict, message: str) -> None:
    config = quantization_config({"a": QuantSpec(4, 64)}, base_fingerprint=FINGERPRINT) | change
    with pytest.raises(FormatError, match=message):
        parse_quantization_config(config, source="c")


AUTO_ROUND_CONFIG: dict[str, Any] = {
    "quant_method": "auto-round",
    "packing_format": "auto_round",
    "data_type": "int",
    "bits": 2,
    "group_size": 64,
    "sym": False,
}


@pytest.mark.parametrize(("packing", "version"), [("auto_round", 2), ("auto_round:gptqmodel", 2), (None, 1)])
def test_autoround_files_hold_the_words_of_gptq_without_an_index(packing: str | None, version: int) -> None:
    layer = make_layer(QuantSpec(2, 64), 16, 128, least_zero=1)
    parts = gptq.pack_layer(layer, version=version)
    del parts["g_idx"]
    config = {key: value for key, value in AUTO_ROUND_CONFIG.items() if key != "packing_format"}
    grids = gptq.parse_quantization_config(config if packing is None else {**config, "packing_format": packing})
    assert grids.layout.name == gptq.layout_name(version)
    assert set(grids.layout.parts(grids.default)) == set(parts) == set(grids.layout.headers(16, 128, grids.default))
    assert_same(grids.layout.unpack_layer(parts, grids.default), layer)


def test_autoround_names_the_layers_that_differ() -> None:
    extra = {"a.b": {"bits": 4, "group_size": 32}, "a.c": {"bits": 16}}
    grids = gptq.parse_quantization_config({**AUTO_ROUND_CONFIG, "extra_config": extra})
    assert grids.spec_for("a.b") == QuantSpec(4, 32)
    assert grids.spec_for("a.c") is None
    assert grids.spec_for("a.d") == QuantSpec(2, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing_format": "auto_round:auto_awq"}, "packing_format is 'auto_round:auto_awq'; of AutoRound's"),
        ({"data_type": "mx_fp"}, "data_type is 'mx_fp'; only 'int' is read"),
        ({"extra_config": {".*down(": {"bits": 4}}}, "the pattern '.*down(' is not read (a group is not closed)"),
        ({"extra_config": {"a": 4}}, "extra_config maps 'a' to a int; expected an object of options"),
        ({"desc_act": True}, "desc_act is true in a file of AutoRound's"),
        ({"extra_config": []}, None),
        ({"extra_config": [1]}, "extra_config is a list"),
        ({"bits": "2"}, "bits '2'"),
    ],
)
def test_other_autoround_configs_are_refused(changes: dict[str, Any], message: str | None) -> None:
    config = {**AUTO_ROUND_CONFIG, **changes}
    if message is None:
        assert not gptq.parse_quantization_config(config).overrides
        return
    with pytest.raises(FormatError, match=re.escape(message)):
        gptq.parse_quantization_config(config)


def named(*modules: str) -> dict[str, Any]:
    return {f"{module}.qweight": ("I32", (4, 8)) for module in modules}


PLAIN = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}


def test_dynamic_rules_are_read_as_gptqmodel_means_them() -> None:
    rules = {
        r"-:.*\.2\..*": {},
        r"+:.*\.(?:q|k)_proj$": {"bits": 8, "group_size": 64},
        r".*\.v_proj": {"sym": True},
        r"+:^layers\.0\.q_proj$": {"bits": 2},
        r"+:^layers\.0\.up_proj$": {"bits": 3},
    }
    grids = gptq.parse_quantization_config(PLAIN | {"dynamic": rules})
    for module in ("layers.0.q_proj", "layers.1.k_proj", "layers.2.q_proj", "layers.0.v_proj.x", "layers.0.up_proj"):
        expected = matched_by_other_readers(rules, module)
        spec = grids.spec_for(module)
        if expected is False:
            assert spec is None
        else:
            values = PLAIN | expected
            assert spec == QuantSpec(values["bits"], values["group_size"], symmetric=values["sym"]), module
    assert grids.spec_for("layers.0.down_proj") == QuantSpec(4, 32)
    known = grids.with_modules(["layers.0.q_proj", "layers.2.q_proj"])
    assert known.spec_for("layers.0.q_proj") == QuantSpec(8, 64)
    assert known.spec_for("layers.2.q_proj") is None
    assert known.spec_for("layers.0.up_proj") == QuantSpec(3, 32)


def test_autoround_searches_for_keys_that_name_no_layer() -> None:
    extra = {"a.down": {"bits": 8}, ".*down.*": {"bits": 2}, "gate": {"bits": 16}}
    headers = named("a.down", "b.down", "c.up") | {"c.gate_proj.weight": ("F16", (4, 4))}
    grids = gptq.parse_quantization_config({**AUTO_ROUND_CONFIG, "extra_config": extra}, headers)
    assert grids.spec_for("a.down") == QuantSpec(8, 64)
    assert grids.spec_for("b.down") == QuantSpec(2, 64)
    assert grids.spec_for("c.up") == QuantSpec(2, 64)
    assert grids.spec_for("c.gate_proj") is None


@pytest.mark.parametrize(
    ("key", "value"),
    [("modules_to_not_convert", ["up"]), ("modules_in_block_to_quantize", [["self_attn.q_proj"], ["mlp.down"]])],
)
def test_codes_that_the_config_leaves_out_are_refused(key: str, value: list) -> None:
    kept = named("a.self_attn.q_proj", "a.mlp.down", "lm_head")
    assert gptq.parse_quantization_config(PLAIN | {key: value}, kept).spec_for("a.mlp.down") == QuantSpec(4, 32)
    with pytest.raises(FormatError, match=rf"c: {key} leaves a\.mlp\.up out, whose codes the files hold"):
        gptq.parse_quantization_config(PLAIN | {key: value}, kept | named("a.mlp.up"), source="c")


def test_a_quantized_head_is_said() -> None:
    spec = QuantSpec(4, 32)
    assert quantization_config({"a": spec, "lm_head": spec}, base_fingerprint=FINGERPRINT)["lm_head"] is True
    assert quantization_config({"a": spec}, base_fingerprint=FINGERPRINT)["lm_head"] is False


def test_labels_of_act_order_and_of_nothing_are_read() -> None:
    for change in ({"desc_act": True}, {"desc_act": None}, {"static_groups": True, "true_sequential": True}):
        assert gptq.parse_quantization_config(PLAIN | change).layout is GPTQ_V1
    without = {key: value for key, value in PLAIN.items() if key != "sym"}
    assert gptq.parse_quantization_config(without).default == QuantSpec(4, 32)


@pytest.mark.parametrize(
    ("spec", "held"), [(QuantSpec(8, 32), "4-bit codes in groups of 32"), (QuantSpec(4, 64), "32")]
)
def test_shapes_of_another_grid_are_named(spec: QuantSpec, held: str) -> None:
    headers = gptq.GPTQ_V2.headers(16, 128, QuantSpec(4, 32))
    with pytest.raises(FormatError, match=rf"a: the config says {spec.bits} bits and group size .* hold .*{held}"):
        gptq.GPTQ_V2.features(headers, spec, name="a")
    awq = {"qweight": ("I32", (128, 2)), "qzeros": ("I32", (4, 2)), "scales": ("F16", (4, 16))}
    with pytest.raises(FormatError, match="run along the outputs as those of AWQ"):
        gptq.GPTQ_V2.features(awq, QuantSpec(4, 32), name="a")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_zeros_prove_the_version(bits: int) -> None:
    spec = QuantSpec(bits, 32, symmetric=True)
    layer = make_layer(QuantSpec(bits, 32), 32, 64, least_zero=1)
    middle = QuantizedLayer(layer.codes, layer.scales, torch.full_like(layer.zeros, 2 ** (bits - 1)), spec)
    for version in (1, 2):
        assert gptq.version_of_symmetric(gptq.pack_layer(middle, version=version)["qzeros"], spec) == version
    assert gptq.version_of_symmetric(gptq.pack_layer(layer)["qzeros"], spec) is None
