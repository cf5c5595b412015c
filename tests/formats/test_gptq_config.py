"""The config of GPTQ checkpoints: as written, as GPTQModel writes it, and as it is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest

import cloq_export.formats.gptq as gptq
from cloq_export.errors import FormatError
from cloq_export.formats.gptq import GPTQ_V1, parse_quantization_config, quantization_config
from cloq_export.formats.registry import LAYOUTS, read_quantization_config
from cloq_export.types import QuantSpec

FINGERPRINT = "sha256:" + "0" * 64


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
    assert not read.needs_adapter
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


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_codes_that_need_their_adapter_say_so_in_every_layout(layout: str) -> None:
    spec = QuantSpec(4, 64, LAYOUTS[layout].symmetric_only)
    written = LAYOUTS[layout].quantization_config({"a": spec}, base_fingerprint=FINGERPRINT, needs_adapter=True)
    headers = {f"a.{part}": header for part, header in LAYOUTS[layout].headers(64, 64, spec).items()}
    assert read_quantization_config(written, headers).needs_adapter
    written["cloq"]["needs_adapter"] = "yes"
    with pytest.raises(FormatError, match=r"cloq\.needs_adapter is 'yes'; the config is damaged"):
        read_quantization_config(written, headers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "awq"}, "c: quant_method is 'awq'; this reader knows 'gptq'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; this reader knows"),
        ({"checkpoint_format": ["gptq"]}, "checkpoint_format is"),
        ({"method": "qqq"}, "quant_method is 'gptq' but method is 'qqq'; one of them is wrong"),
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
