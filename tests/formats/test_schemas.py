"""The JSON schemas of the integer layouts: what the code writes fits them, and what it would not write does not."""

import dataclasses
import functools
import json
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cloq_export.formats
from cloq_export.formats.registry import LAYOUTS
from cloq_export.types import QuantSpec

FOLDERS = {
    "gptq": "gptq",
    "gptq_v2": "gptq",
    "compressed_tensors": "compressed_tensors",
    "compressed_tensors_padded": "compressed_tensors",
    "auto_round": "auto_round",
    "auto_round_gptq": "auto_round",
}
FINGERPRINT = "sha256:" + "0123456789abcdef" * 4
SPECS = {
    "model.layers.0.self_attn.q_proj": QuantSpec(2, 64),
    "model.layers.1.self_attn.q_proj": QuantSpec(2, 64),
    "model.layers.1.mlp.down-proj": QuantSpec(8, -1, symmetric=True),
}


def schema_of(layout: str) -> dict:
    return json.loads((Path(cloq_export.formats.__file__).parent / FOLDERS[layout] / "schema.json").read_text())


@functools.cache
def validator_of(layout: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(schema_of(layout))


def test_every_layout_has_a_schema() -> None:
    assert set(FOLDERS) >= set(LAYOUTS)
    for layout in LAYOUTS:
        schema = schema_of(layout)
        assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        jsonschema.Draft202012Validator.check_schema(schema)


names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_\-]{0,8}(\.[A-Za-z0-9_\-]{1,8}){0,3}", fullmatch=True).filter(
    lambda name: name != "Linear"
)
specs = st.builds(
    QuantSpec,
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([-1, 8, 32, 64, 128]),
    symmetric=st.booleans(),
)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(names, specs, min_size=1, max_size=6),
    st.lists(names, max_size=3),
    st.sampled_from(["", "cloq_export:0.1.0"]),
    st.booleans(),
)
def test_what_is_written_fits(layout: str, modules: dict, skipped: list, producer: str, needs_adapter: bool) -> None:
    if LAYOUTS[layout].symmetric_only:
        modules = {module: dataclasses.replace(spec, symmetric=True) for module, spec in modules.items()}
    config = LAYOUTS[layout].quantization_config(
        modules, base_fingerprint=FINGERPRINT, skipped=skipped, producer=producer, needs_adapter=needs_adapter
    )
    assert config["cloq"].get("needs_adapter", False) is needs_adapter
    validator_of(layout).validate(json.loads(json.dumps(config)))


def set_in(config: dict, path: str, value: object) -> dict:
    *parents, last = path.split("/")
    inner = config
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return config


COMMON = [
    ("quant_method", "awq"),
    ("unknown", 1),
    ("meta/quantizer", []),
    ("cloq/format_version", 2),
    ("cloq/layout", "onnx"),
    ("cloq/base_fingerprint", "sha256:0"),
    ("cloq/base_fingerprint", None),
    ("cloq/modules", []),
    ("cloq/modules", ["a", "a"]),
    ("cloq/unknown", 1),
    ("cloq/needs_adapter", False),
]
OF_GPTQ = [
    *COMMON,
    ("bits", 5),
    ("bits", "4"),
    ("group_size", 12),
    ("group_size", 0),
    ("sym", 1),
    ("desc_act", True),
    ("dynamic", {}),
    ("dynamic/+:.*", {"bits": 2, "group_size": 64, "sym": True}),
    ("dynamic/+:^a$", {"bits": 2}),
    ("dynamic/-:^a$", {"bits": 2}),
]
OF_AUTO_ROUND = [
    *((path, value) for path, value in COMMON if path != "meta/quantizer"),
    ("packing_format", "auto_round:auto_awq"),
    ("packing_format", "auto_round:auto_gptq"),
    ("bits", 5),
    ("group_size", 0),
    ("data_type", "fp"),
    ("block_name_to_quantize", ["model.layers"]),
    ("block_name_to_quantize", ""),
    ("extra_config", {}),
    ("extra_config/.*", {"bits": 16}),
    ("extra_config/a", {"bits": 2}),
    ("extra_config/a", {"bits": 16, "sym": True}),
]
OF_COMPRESSED_TENSORS = [
    *COMMON,
    ("format", "naive-quantized"),
    ("quantization_status", "frozen"),
    ("kv_cache_scheme", {}),
    ("ignore", ["re:.*"]),
    ("ignore", ["Linear"]),
    ("config_groups", {}),
    ("config_groups/W4A16", ["Linear"]),
    ("config_groups/group_0/targets", ["model.layers.0.self_attn.q_proj"]),
    ("config_groups/group_1/targets", ["Linear"]),
    ("config_groups/group_1/targets", []),
    ("config_groups/group_1/format", "pack-quantized"),
    ("config_groups/group_0/input_activations", {}),
    ("config_groups/group_0/weights/num_bits", 5),
    ("config_groups/group_0/weights/group_size", None),
    ("config_groups/group_0/weights/group_size", 12),
    ("config_groups/group_1/weights/group_size", 64),
    ("config_groups/group_0/weights/strategy", "tensor"),
    ("config_groups/group_0/weights/dynamic", True),
    ("config_groups/group_0/weights/actorder", "group"),
]


@pytest.mark.parametrize(
    ("layout", "path", "value"),
    [
        *(("gptq_v2", path, value) for path, value in [*OF_GPTQ, ("checkpoint_format", "gptq")]),
        *(("compressed_tensors", path, value) for path, value in OF_COMPRESSED_TENSORS),
        *(("auto_round", path, value) for path, value in OF_AUTO_ROUND),
    ],
)
def test_what_would_not_be_written_does_not_fit(layout: str, path: str, value: object) -> None:
    config = LAYOUTS[layout].quantization_config(
        SPECS, base_fingerprint=FINGERPRINT, skipped=["left.float"], producer="cloq_export:0.1.0"
    )
    validator = validator_of(layout)
    assert validator.is_valid(config)
    assert not validator.is_valid(set_in(config, path, value))


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_key_is_needed(layout: str) -> None:
    specs = SPECS
    if LAYOUTS[layout].symmetric_only:
        specs = {module: dataclasses.replace(spec, symmetric=True) for module, spec in SPECS.items()}
    config = LAYOUTS[layout].quantization_config(specs, base_fingerprint=FINGERPRINT)
    validator = validator_of(layout)
    for key in config:
        if key not in ("dynamic", "block_name_to_quantize", "extra_config"):
            assert not validator.is_valid({name: value for name, value in config.items() if name != key}), key
