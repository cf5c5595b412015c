"""The config of compressed-tensors checkpoints: as written, as others write it, and as it is refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from packed_forms import FORMS

from cloq_export.errors import FormatError
from cloq_export.formats.compressed_tensors import COMPRESSED_TENSORS, COMPRESSED_TENSORS_PADDED
from cloq_export.formats.registry import LAYOUTS, read_quantization_config
from cloq_export.types import QuantizedLayer, QuantSpec

FINGERPRINT = "sha256:" + "0" * 64


SPECS = {
    "model.layers.0.self_attn.q_proj": QuantSpec(2, 64),
    "model.layers.0.mlp.down_proj": QuantSpec(4, 128),
    "model.layers.1.self_attn.q_proj": QuantSpec(2, 64),
    "model.layers.1.mlp.down-proj": QuantSpec(8, -1, symmetric=True),
}


def weights(spec: QuantSpec) -> dict:
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": "channel" if spec.group_size == -1 else "group",
        "group_size": None if spec.group_size == -1 else spec.group_size,
        "dynamic": False,
    }


def group(targets: list[str], spec: QuantSpec, **changes) -> dict:
    return {
        "targets": targets,
        "weights": weights(spec) | changes,
        "input_activations": None,
        "output_activations": None,
    }


def foreign(groups: dict, **changes) -> dict:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "global_compression_ratio": None,
        "version": "0.20.0",
    } | changes


def headers_for(specs: dict[str, QuantSpec], layout=COMPRESSED_TENSORS, out: int = 64, columns: int = 128) -> dict:
    return {
        f"{module}.{part}": header
        for module, spec in specs.items()
        for part, header in layout.headers(out, columns, spec).items()
    }


def test_config_as_written() -> None:
    config = COMPRESSED_TENSORS.quantization_config(
        SPECS, base_fingerprint=FINGERPRINT, skipped=["model.layers.2.mlp.gate"], producer="cloq_export:0.1.0"
    )
    assert config == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": group(["Linear"], QuantSpec(2, 64)),
            "group_1": group(["model.layers.0.mlp.down_proj"], QuantSpec(4, 128)),
            "group_2": group(["model.layers.1.mlp.down-proj"], QuantSpec(8, -1, symmetric=True)),
        },
        "ignore": ["lm_head", "model.layers.2.mlp.gate"],
        "kv_cache_scheme": None,
        "meta": {"quantizer": ["cloq_export:0.1.0"]},
        "cloq": {
            "format_version": 1,
            "layout": "compressed_tensors",
            "base_fingerprint": FINGERPRINT,
            "modules": sorted(SPECS),
        },
    }
    assert json.loads(json.dumps(config)) == config
    plain = COMPRESSED_TENSORS_PADDED.quantization_config({"lm_head": QuantSpec(4, 128)}, base_fingerprint=FINGERPRINT)
    assert plain["cloq"]["layout"] == "compressed_tensors_padded"
    assert plain["ignore"] == []
    assert "meta" not in plain


def test_config_needs_modules_with_plain_names() -> None:
    with pytest.raises(FormatError, match="needs at least one quantized module"):
        COMPRESSED_TENSORS.quantization_config({}, base_fingerprint=FINGERPRINT)
    for name in ("a b", "re:.*", "Linear", ""):
        with pytest.raises(FormatError, match=f"the module name '{re.escape(name)}' is 'Linear' or holds characters"):
            COMPRESSED_TENSORS.quantization_config({name: QuantSpec(4)}, base_fingerprint=FINGERPRINT)
    with pytest.raises(FormatError, match="the module name 're:x' is"):
        COMPRESSED_TENSORS.quantization_config({"a": QuantSpec(4)}, base_fingerprint=FINGERPRINT, skipped=["re:x"])


@FORMS
def test_config_comes_back(layout) -> None:
    specs = SPECS | {"model.layers.1.mlp.up_proj": QuantSpec(3, 64)}
    written = layout.quantization_config(specs, base_fingerprint=FINGERPRINT, skipped=["left.float"])
    read = read_quantization_config(written, headers_for(specs, layout))
    assert read.layout is layout
    assert LAYOUTS[layout.name] is layout
    assert read.modules == tuple(sorted(specs))
    assert read.base_fingerprint == FINGERPRINT
    assert {module: read.spec_for(module) for module in specs} == specs
    assert read.spec_for("left.float") is None
    assert read.spec_for("lm_head") is None


def test_label_and_content_that_disagree() -> None:
    specs = {"a": QuantSpec(3, 64), "b": QuantSpec(4, 64)}
    for label, content in (
        (COMPRESSED_TENSORS, COMPRESSED_TENSORS_PADDED),
        (COMPRESSED_TENSORS_PADDED, COMPRESSED_TENSORS),
    ):
        config = label.quantization_config(specs, base_fingerprint=FINGERPRINT)
        with pytest.raises(
            FormatError,
            match=f"c: cloq.layout is '{label.name}', but the 3-bit .* of '{content.name}'; label and content",
        ):
            read_quantization_config(config, headers_for(specs, content), source="c")
    # Shapes that fit both are what the label says; 2, 4 and 8 bits are the same in both.
    for specs in ({"a": QuantSpec(3, -1, symmetric=True)}, {"a": QuantSpec(8, 64)}):
        config = COMPRESSED_TENSORS_PADDED.quantization_config(specs, base_fingerprint=FINGERPRINT)
        read = read_quantization_config(config, headers_for(specs, columns=64))
        assert read.layout is COMPRESSED_TENSORS_PADDED


def test_config_of_others_is_read() -> None:
    specs = {
        "model.layers.0.self_attn.q_proj": QuantSpec(4, 128, symmetric=True),
        "model.layers.0.mlp.down_proj": QuantSpec(8, -1, symmetric=True),
        "model.layers.1.mlp.down_proj": QuantSpec(4, 64),
        "model.layers.1.mlp.up_proj": QuantSpec(4, 64),
    }
    config = foreign(
        {
            "group_0": group(["Linear"], QuantSpec(4, 128, symmetric=True), observer="minmax", actorder="weight"),
            "group_1": group(["model.layers.0.mlp.down_proj"], QuantSpec(8, -1, symmetric=True), group_size=-1),
            "group_2": group(["re:.*layers\\.1\\.mlp\\.(up|down)_proj$"], QuantSpec(4, 64), strategy=None),
        },
        ignore=["lm_head", "re:.*vision_tower.*"],
    )
    read = read_quantization_config(config, headers_for(specs))
    assert read.layout is COMPRESSED_TENSORS
    assert read.modules is None
    assert read.base_fingerprint is None
    assert read.default == QuantSpec(4, 128, symmetric=True)
    assert {module: read.spec_for(module) for module in specs} == specs
    assert read.spec_for("lm_head") is None


@pytest.mark.parametrize(
    ("spec", "columns", "version", "layout"),
    [
        (QuantSpec(3, 64), 128, "0.17.0", COMPRESSED_TENSORS),
        (QuantSpec(3, 64), 128, "0.20.0", COMPRESSED_TENSORS_PADDED),
        # Told by the zeros, which run along the 64 outputs.
        (QuantSpec(3, -1), 50, None, COMPRESSED_TENSORS_PADDED),
        (QuantSpec(3, -1), 50, None, COMPRESSED_TENSORS),
        # Told by nothing but the writer.
        (QuantSpec(3, -1, symmetric=True), 128, "0.17.1", COMPRESSED_TENSORS_PADDED),
        (QuantSpec(3, -1, symmetric=True), 128, "0.18.0", COMPRESSED_TENSORS),
        (QuantSpec(3, -1, symmetric=True), 128, "1.0", COMPRESSED_TENSORS),
        (QuantSpec(3, -1, symmetric=True), 128, "0.15.0.post1", COMPRESSED_TENSORS_PADDED),
    ],
)
def test_3_bit_form_of_others(spec: QuantSpec, columns: int, version: str | None, layout) -> None:
    config = foreign({"group_0": group(["Linear"], spec)}, version=version)
    assert read_quantization_config(config, headers_for({"a": spec}, layout, columns=columns)).layout is layout


@pytest.mark.parametrize("version", [None, "0.17.2.a20260805", "0.18.1.dev0+gac8e2ba", 17, "x" * 100_000])
def test_3_bit_form_that_nothing_tells(version) -> None:
    spec = QuantSpec(3, -1, symmetric=True)
    config = foreign({"group_0": group(["Linear"], spec)}, version=version)
    with pytest.raises(FormatError, match="c: the shapes fit both dense and padded 3-bit codes, and the version"):
        read_quantization_config(config, headers_for({"a": spec}), source="c")
    # One module whose shape decides is enough for all.
    clear = headers_for({"b": QuantSpec(3, 64)}, COMPRESSED_TENSORS_PADDED)
    config["config_groups"]["group_1"] = group(["b"], QuantSpec(3, 64))
    assert read_quantization_config(config, headers_for({"a": spec}) | clear).layout is COMPRESSED_TENSORS_PADDED


def test_3_bit_forms_that_are_mixed_or_neither() -> None:
    spec = QuantSpec(3, 64)
    config = foreign({"group_0": group(["Linear"], spec)})
    mixed = headers_for({"a": spec}) | headers_for({"b": spec}, COMPRESSED_TENSORS_PADDED)
    with pytest.raises(FormatError, match=r"c: a is compressed_tensors, b is compressed_tensors_padded; .* mixes"):
        read_quantization_config(config, mixed, source="c")
    for change in (
        {"a.weight_packed": ("I32", (64, 11))},
        {"a.weight_packed": ("I32", (64,))},
        {"a.weight_scale": ("F16", ())},
    ):
        with pytest.raises(FormatError, match="c: the tensors of a have the shapes of neither dense nor padded 3-bit"):
            read_quantization_config(config, headers_for({"a": spec}) | change, source="c")


LINEAR = {"group_0": group(["Linear"], QuantSpec(4, 64))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "naive-quantized"}, "c: format is 'naive-quantized'; this reader knows 'pack-quantized'"),
        ({"format": "float-quantized"}, "format is 'float-quantized'"),
        ({"format": "marlin-24"}, "format is 'marlin-24'"),
        ({"format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized'"),
        ({"format": "mixed-precision"}, "format is 'mixed-precision'"),
        ({"format": None}, "format is None"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "c has a kv_cache_scheme; only .* quantized weights alone are read"),
        ({"transform_config": {"config_groups": {}}}, "c has a transform_config, which changes what the weights mean"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "c has a sparsity_config"),
        ({"config_groups": {}}, "config_groups is {}; expected an object with groups"),
        ({"config_groups": ["W4A16"]}, "config_groups is"),
        ({"config_groups": {"W8A8": ["Linear"]}}, "the group 'W8A8' is no object and names no preset that is read"),
        ({"config_groups": {"g": {"targets": ["Linear"]}}}, "c: the group 'g': weights is None; expected an object"),
        (
            {"config_groups": {"g": LINEAR["group_0"] | {"input_activations": {"num_bits": 8}}}},
            "the group 'g' has input_activations; only",
        ),
        (
            {"config_groups": {"g": LINEAR["group_0"] | {"output_activations": {"num_bits": 8}}}},
            "the group 'g' has output_activations; only",
        ),
        ({"config_groups": {"g": LINEAR["group_0"] | {"format": "marlin-24"}}}, "'g' has the format 'marlin-24'"),
        ({"config_groups": {"g": LINEAR["group_0"] | {"targets": "Linear"}}}, "c holds 'Linear'; expected a list"),
        ({"config_groups": {"g": LINEAR["group_0"] | {"targets": [1]}}}, "expected a list of names"),
        ({"config_groups": {"g": group(["Linear"], QuantSpec(4, 64), type="float")}}, "weights of type 'float'"),
        ({"config_groups": {"g": group(["Linear"], QuantSpec(4, 64), dynamic=True)}}, "dynamic is True; only weights"),
        (
            {"config_groups": {"g": group(["Linear"], QuantSpec(4, 64), actorder="group")}},
            "actorder is 'group', but a has no",
        ),
        ({"config_groups": {"g": group(["Linear"], QuantSpec(4, 64), actorder=True)}}, "actorder is True; only"),
        ({"config_groups": {"g": group(["Linear"], QuantSpec(4, 64), actorder=["x"])}}, "actorder is"),
        (
            {"config_groups": {"g": group(["Linear"], QuantSpec(4, 64), num_bits=6)}},
            "bits is 6; allowed are",
        ),
        ({"config_groups": {"g": group(["Linear"], QuantSpec(4, 64), num_bits="4")}}, "num_bits '4', symmetric False"),
        ({"config_groups": {"g": group(["Linear"], QuantSpec(4, 64), symmetric=1)}}, "symmetric 1; expected"),
        ({"config_groups": {"g": group(["Linear"], QuantSpec(4, 64), group_size=12)}}, "group size is 12; allowed are"),
        (
            {"config_groups": {"g": group(["Linear"], QuantSpec(4, 64), group_size=64.0)}},
            "group_size is 64.0; exp",
        ),
        (
            {"config_groups": {"g": group(["Linear"], QuantSpec(4, 64), strategy="tensor", group_size=None)}},
            "strategy 'tensor' with group_size None; this reader knows 'group' with a size, and 'channel' without",
        ),
        (
            {"config_groups": {"g": group(["Linear"], QuantSpec(4, 64), strategy="channel")}},
            "'channel' with",
        ),
        ({"config_groups": {"g": group(["Linear"], QuantSpec(4, 64), strategy="block")}}, "strategy 'block'"),
        ({"config_groups": {"g": group(["Conv1d"], QuantSpec(4, 64))}}, "c: no group in config_groups means a, whose"),
        (
            {"config_groups": LINEAR | {"g": group(["Linear"], QuantSpec(2, 64))}},
            "c: 2 groups with different grids in config_groups means a",
        ),
        (
            {"config_groups": {"g": group(["a"], QuantSpec(4, 64)), "h": group(["re:a.*"], QuantSpec(2, 64))}},
            "2 groups with different grids",
        ),
        ({"ignore": ["a"]}, "c ignores a, whose codes the files hold; config and weights disagree"),
        ({"ignore": ["re:.*"]}, "c ignores a"),
        ({"ignore": ["Linear"]}, "c ignores a"),
        ({"ignore": "a"}, "c holds 'a'; expected a list of names"),
        (
            {"ignore": ["re:(a+"]},
            r"c: the pattern '\(a\+' is not read \(a group is not closed\); name the modules in full",
        ),
        ({"cloq": 3}, "format version 3 of cloq is unknown; this program reads 1"),
        ({"cloq": {"format_version": 2}}, "format version 2 of cloq is unknown"),
        ({"cloq": {"format_version": 1, "layout": "compressed_tensors"}}, "cloq.modules is not a list of names"),
        (
            {"cloq": {"format_version": 1, "layout": "compressed_tensors", "modules": ["a"]}},
            "cloq.base_fingerprint is None; the config is damaged",
        ),
        (
            {"cloq": {"format_version": 1, "layout": 4, "modules": ["a"], "base_fingerprint": FINGERPRINT}},
            "cloq.layout is 4; the config is damaged",
        ),
        (
            {"cloq": {"format_version": 1, "layout": "gptq_v2", "modules": ["a"], "base_fingerprint": FINGERPRINT}},
            "cloq.layout is 'gptq_v2' but quant_method is 'compressed-tensors'",
        ),
        (
            {"cloq": {"format_version": 1, "layout": "gptq_v2", "modules": [], "base_fingerprint": FINGERPRINT}},
            "there is no quantized module",
        ),
    ],
)
def test_hostile_config(change: dict, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        read_quantization_config(foreign(LINEAR) | change, headers_for({"a": QuantSpec(4, 64)}), source="c")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("index", "read"), [("in a row", True), ("none stored", True), ("permuted", False)])
def test_the_tensor_tells_whether_groups_have_an_order(index: str, read: bool) -> None:
    spec = QuantSpec(4, 32)
    layer = QuantizedLayer(
        torch.randint(0, 16, (8, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8),
        torch.ones(8, 2, dtype=torch.float16),
        torch.full((8, 2), 7, dtype=torch.uint8),
        spec,
    )
    row = torch.arange(64, dtype=torch.int32) // 32
    stored = {"in a row": row, "none stored": torch.full_like(row, -1), "permuted": row.flip(0)}[index]
    parts = COMPRESSED_TENSORS.pack_layer(layer) | {"weight_g_idx": stored}
    headers = headers_for({"a": spec}) | {"a.weight_g_idx": ("I32", (64,))}
    config = foreign(LINEAR) | {"config_groups": {"g": group(["Linear"], spec, actorder="group")}}
    assert read_quantization_config(config, headers, source="c").spec_for("a") == spec
    if read:
        assert torch.equal(COMPRESSED_TENSORS.unpack_layer(parts, spec).codes, layer.codes)
        return
    with pytest.raises(FormatError, match=r"a: weight_g_idx is not sequential \(act-order\).*actorder 'static'"):
        COMPRESSED_TENSORS.unpack_layer(parts, spec, name="a")


def test_presets_are_read_by_name() -> None:
    config = foreign(LINEAR) | {"config_groups": {"W4A16": ["Linear"], "w3a16": ["re:.*b$"]}}
    specs = {"a": QuantSpec(4, 128, symmetric=True), "b": QuantSpec(3, 128, symmetric=True)}
    read = read_quantization_config(config, headers_for(specs, columns=128), source="c")
    assert {module: read.spec_for(module) for module in specs} == specs


def test_checkpoint_without_packed_tensors() -> None:
    with pytest.raises(FormatError, match=r"c: there is no quantized module \(no tensor is named weight_packed\)"):
        read_quantization_config(foreign(LINEAR), {"a.weight": ("F16", (4, 4))}, source="c")
    with pytest.raises(
        FormatError, match="quant_method is 'awq'; this program reads auto-round, compressed-tensors, gptq"
    ):
        read_quantization_config({"quant_method": "awq"}, {})


def test_many_patterns_and_long_names_are_refused() -> None:
    many = foreign(LINEAR, ignore=[f"re:.*{number}x.*" for number in range(5000)])
    headers = {f"model.{number}.weight_packed": ("I32", (1, 1)) for number in range(1000)}
    with pytest.raises(FormatError, match=r"c: .* characters of patterns over 1000 modules are too many to compare"):
        read_quantization_config(many, headers, source="c")
    with pytest.raises(FormatError, match=r"c: the module name .* has 600 characters; .* at most 512"):
        read_quantization_config(
            foreign(LINEAR, ignore=["re:b"]), {"a" * 600 + ".weight_packed": ("I32", (1, 1))}, source="c"
        )
