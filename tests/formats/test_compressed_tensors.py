"""The compressed-tensors layout: bytes against a packer that shares no code, round trips, refusals, config."""

import dataclasses
import importlib.util
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cloq_export.formats.compressed_tensors as compressed_tensors
from cloq_export.errors import FormatError, ShapeError
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.formats.compressed_tensors import COMPRESSED_TENSORS, COMPRESSED_TENSORS_PADDED
from cloq_export.formats.registry import LAYOUTS, read_quantization_config
from cloq_export.types import QuantizedLayer, QuantSpec

GOLDEN = Path(compressed_tensors.__file__).parent / "golden"
FINGERPRINT = "sha256:" + "0" * 64
FORMS = pytest.mark.parametrize("layout", [COMPRESSED_TENSORS, COMPRESSED_TENSORS_PADDED], ids=lambda form: form.name)


def load_generator():
    spec = importlib.util.spec_from_file_location("compressed_tensors_golden_generate", GOLDEN / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = load_generator()


def make_layer(spec: QuantSpec, out: int, columns: int, seed: int = 0) -> QuantizedLayer:
    generator = torch.Generator().manual_seed(seed)
    groups = spec.group_count(columns)
    zeros = torch.randint(0, spec.max_code + 1, (out, groups), dtype=torch.uint8, generator=generator)
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


@st.composite
def layers(draw) -> QuantizedLayer:
    group_size = draw(st.sampled_from([32, 64, 128, -1]))
    columns = draw(st.integers(1, 200)) if group_size == -1 else group_size * draw(st.integers(1, 3))
    spec = QuantSpec(draw(st.sampled_from([2, 3, 4, 8])), group_size, draw(st.booleans()))
    return make_layer(spec, draw(st.integers(1, 70)), columns, draw(st.integers(0, 2**31)))


def headers_of(module: str, packed: dict[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    codes = {torch.int32: "I32", torch.int64: "I64", torch.float16: "F16"}
    return {f"{module}.{part}": (codes[tensor.dtype], tuple(tensor.shape)) for part, tensor in packed.items()}


@settings(max_examples=80, deadline=None)
@given(layers(), st.sampled_from([COMPRESSED_TENSORS, COMPRESSED_TENSORS_PADDED]))
def test_round_trip(layer: QuantizedLayer, layout) -> None:
    packed = layout.pack_layer(layer)
    assert_same(layout.unpack_layer(packed, layer.spec), layer)
    assert all(tensor.is_contiguous() for tensor in packed.values())


@settings(max_examples=60, deadline=None)
@given(layers(), st.booleans())
def test_words_equal_the_bit_by_bit_packer(layer: QuantizedLayer, padded: bool) -> None:
    packed = compressed_tensors.pack_layer(layer, padded=padded)
    bits = layer.spec.bits
    assert packed["weight_packed"].tolist() == oracle.pack_weight(layer.codes.tolist(), bits, padded)
    if not layer.spec.symmetric:
        assert packed["weight_zero_point"].tolist() == oracle.pack_zeros(layer.zeros.tolist(), bits, padded)
    assert torch.equal(packed["weight_scale"], layer.scales)
    assert packed["weight_shape"].tolist() == list(layer.codes.shape)


@settings(max_examples=60, deadline=None)
@given(layers(), st.sampled_from([COMPRESSED_TENSORS, COMPRESSED_TENSORS_PADDED]))
def test_headers_and_features_are_those_of_the_tensors(layer: QuantizedLayer, layout) -> None:
    spec = layer.spec
    headers = layout.headers(layer.out_features, layer.in_features, spec)
    packed = layout.pack_layer(layer)
    assert headers == {name.removeprefix("m."): header for name, header in headers_of("m", packed).items()}
    assert set(headers) == set(layout.parts(spec)) <= set(layout.roles)
    out, columns = layout.features(headers, spec)
    assert out == layer.out_features
    if spec.group_size == -1:
        words = headers["weight_packed"][1][1]
        assert layer.in_features <= columns
        assert layout.headers(out, columns, spec)["weight_packed"][1][1] == words
        assert layout.features(headers, spec, read=packed.__getitem__) == (layer.out_features, layer.in_features)
    else:
        assert columns == layer.in_features


def test_the_two_forms_differ_at_3_bits_only() -> None:
    for bits in (2, 4, 8):
        layer = make_layer(QuantSpec(bits, 32), 18, 64)
        dense, padded = COMPRESSED_TENSORS.pack_layer(layer), COMPRESSED_TENSORS_PADDED.pack_layer(layer)
        assert all(torch.equal(dense[part], padded[part]) for part in dense)
    layer = make_layer(QuantSpec(3, 32), 18, 64)
    assert COMPRESSED_TENSORS.pack_layer(layer)["weight_packed"].shape == (18, 6)
    assert COMPRESSED_TENSORS_PADDED.pack_layer(layer)["weight_packed"].shape == (18, 7)


def test_one_word_of_zeros_as_a_file_gives_it() -> None:
    for bits in (2, 3, 4, 8):
        layer = make_layer(QuantSpec(bits, 32), 3, 64)
        packed = COMPRESSED_TENSORS.pack_layer(layer)
        packed["weight_zero_point"] = torch.tensor(packed["weight_zero_point"].tolist(), dtype=torch.int32)
        assert_same(COMPRESSED_TENSORS.unpack_layer(packed, layer.spec), layer)


def test_words_worked_out_by_hand() -> None:
    codes = (torch.arange(32, dtype=torch.uint8) % 8).repeat(11, 1)
    zeros = torch.full((11, 1), 5, dtype=torch.uint8)
    layer = QuantizedLayer(codes, torch.ones(11, 1).half(), zeros, QuantSpec(bits=3, group_size=-1))
    dense = COMPRESSED_TENSORS.pack_layer(layer)
    assert [word & 0xFFFFFFFF for word in dense["weight_packed"][0].tolist()] == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]
    # Eleven times 101, least significant bit first, are 33 bits.
    assert [word & 0xFFFFFFFF for word in dense["weight_zero_point"][:, 0].tolist()] == [0x6DB6DB6D, 0x1]
    padded = COMPRESSED_TENSORS_PADDED.pack_layer(layer)
    # Ten codes to a word are ten octal digits.
    assert padded["weight_packed"][0].tolist() == [0o1076543210, 0o3210765432, 0o5432107654, 0o76]
    assert padded["weight_zero_point"][:, 0].tolist() == [0o5555555555, 0o5]
    assert dense["weight_shape"].tolist() == [11, 32]


@pytest.mark.parametrize("case", list(oracle.CASES))
@FORMS
def test_golden_files(case: str, layout) -> None:
    path = GOLDEN / f"{case}.safetensors"
    assert path.read_bytes() == oracle.golden_bytes(case), "the golden file is not what its script makes"
    tensors, _ = read_safetensors(path)
    bits, group_size, symmetric, _, _ = oracle.CASES[case]
    spec = QuantSpec(bits, group_size, symmetric)
    layer = QuantizedLayer(tensors["codes"], tensors["scales"], tensors["zeros"], spec)
    form = "padded" if layout is COMPRESSED_TENSORS_PADDED else "dense"
    golden = {
        part: tensors.get(f"packed.{part}", tensors.get(f"packed.{part}.{form}")) for part in layout.parts(layer.spec)
    }
    packed = layout.pack_layer(layer)
    assert packed.keys() == golden.keys()
    assert all(torch.equal(packed[part], golden[part]) for part in golden)
    assert_same(layout.unpack_layer(golden, layer.spec), layer)


def test_every_golden_file_has_a_case() -> None:
    assert {path.stem for path in GOLDEN.glob("*.safetensors")} == set(oracle.CASES)


def test_scales_of_other_writers_are_converted_only_without_loss() -> None:
    layer = make_layer(QuantSpec(4, 32), 9, 64)
    packed = COMPRESSED_TENSORS.pack_layer(layer)
    for dtype in (torch.float32, torch.bfloat16):
        coarse = layer.scales.to(torch.bfloat16)
        read = COMPRESSED_TENSORS.unpack_layer(packed | {"weight_scale": coarse.to(dtype)}, layer.spec)
        assert torch.equal(read.scales.float(), coarse.float())
        assert read.scales.dtype == torch.float16
    third = torch.full_like(layer.scales, 0.5, dtype=torch.float32)
    third[2, 1] = 1 / 3
    with pytest.raises(
        FormatError,
        match=r"m: 1 of 18 scales, which are torch\.float32, are no float16 numbers \(the first is 0\.333.*quantize",
    ):
        COMPRESSED_TENSORS.unpack_layer(packed | {"weight_scale": third}, layer.spec, name="m")
    tiny = torch.full_like(layer.scales, 1e-30, dtype=torch.bfloat16)
    with pytest.raises(FormatError, match=r"m: 18 of 18 scales, which are torch\.bfloat16, are no float16 numbers"):
        COMPRESSED_TENSORS.unpack_layer(packed | {"weight_scale": tiny}, layer.spec, name="m")


def test_symmetric_layer_with_another_zero() -> None:
    layer = make_layer(QuantSpec(4, 32, symmetric=True), 8, 32)
    wrong = dataclasses.replace(layer, zeros=layer.zeros - 1)
    with pytest.raises(FormatError, match=r"m is marked symmetric but has a zero other than 8, .*; mark it asymm"):
        COMPRESSED_TENSORS.pack_layer(wrong, name="m")
    asymmetric = COMPRESSED_TENSORS.pack_layer(dataclasses.replace(wrong, spec=QuantSpec(4, 32)))
    with pytest.raises(FormatError, match="m holds weight_zero_point although its config says symmetric"):
        COMPRESSED_TENSORS.unpack_layer(asymmetric, layer.spec, name="m")


@FORMS
def test_shapes_that_do_not_fit(layout) -> None:
    layout.check_packable(1, 1, QuantSpec(3, -1))
    layout.check_packable(7, 96, QuantSpec(3, 32))
    with pytest.raises(ShapeError, match="m: a layer with 96 inputs cannot be cut into groups of 64"):
        layout.check_packable(32, 96, QuantSpec(4, 64), name="m")
    with pytest.raises(ShapeError, match="m has 0 outputs and 8 inputs; a layer needs one of each"):
        layout.check_packable(0, 8, QuantSpec(4, -1), name="m")


def with_bit(tensor: torch.Tensor, row: int, column: int, bit: int) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[row, column] |= -(2**31) if bit == 31 else 1 << bit
    return tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("weight_packed"), "m lacks the tensor 'weight_packed'"),
        (lambda t: t.pop("weight_shape"), "m lacks the tensor 'weight_shape'"),
        (lambda t: t.pop("weight_zero_point"), "m lacks the tensor 'weight_zero_point'"),
        (lambda t: t.update(weight_packed=t["weight_packed"].long()), r"weight_packed is torch\.int64; expected"),
        (lambda t: t.update(weight_packed=t["weight_packed"].reshape(-1)), "expected 2 dimensions"),
        (
            lambda t: t.update(weight_packed=t["weight_packed"][:, :-1]),
            r"weight_packed has shape \(20, 11\); 128 codes of 3 bits take 12 words: the config and the tensors",
        ),
        (
            lambda t: t.update(weight_packed=t["weight_packed"][:-1]),
            "weight_shape says 20 x 128, but weight_packed has 19 rows; the file is damaged",
        ),
        (
            lambda t: t.update(weight_shape=torch.tensor([20, 64])),
            r"shape .*; 64 codes of 3 bits take 6 words",
        ),
        (lambda t: t.update(weight_shape=torch.tensor([20, 100])), "100 inputs cannot be cut into groups of 64"),
        (lambda t: t.update(weight_shape=torch.tensor([20, -64])), "m has 20 outputs and -64 inputs"),
        (lambda t: t.update(weight_shape=torch.tensor([20, 2**62])), "codes of 3 bits take"),
        (lambda t: t.update(weight_shape=torch.tensor([20.0, 128.0])), r"weight_shape is torch\.float32; expected"),
        (
            lambda t: t.update(weight_shape=torch.tensor([[20, 128]])),
            r"shape \(1, 2\); expected \(2,\)",
        ),
        (
            lambda t: t.update(weight_zero_point=t["weight_zero_point"].repeat(2, 1)),
            r"weight_zero_point has shape \(4, 2\); 20 codes of 3 bits take 2 words",
        ),
        (
            lambda t: t.update(weight_zero_point=t["weight_zero_point"][:, :1]),
            r"weight_zero_point has shape \(2, 1\); it needs 2 columns",
        ),
        (
            lambda t: t.update(weight_zero_point=torch.zeros(20, 2, dtype=torch.int8)),
            r"weight_zero_point is torch\.int8; expected torch\.int32",
        ),
        (
            lambda t: t.update(weight_zero_point=with_bit(t["weight_zero_point"], 1, 1, 28)),
            "weight_zero_point has bits set that belong to no code",
        ),
        (lambda t: t.update(weight_scale=t["weight_scale"].double()), r"weight_scale is torch\.float64; expected"),
        (
            lambda t: t.update(weight_scale=t["weight_scale"].t()),
            r"has shape \(2, 20\); expected \(20, 2\)",
        ),
        (lambda t: t.update(weight_scale=-t["weight_scale"]), "m: a scale is NaN, Inf, zero or negative"),
        (lambda t: t.update(weight_scale=t["weight_scale"] * float("nan")), "m: a scale is NaN, Inf, zero or negative"),
    ],
)
def test_hostile_tensors(change, message: str) -> None:
    layer = make_layer(QuantSpec(bits=3, group_size=64), 20, 128)
    packed = COMPRESSED_TENSORS.pack_layer(layer)
    change(packed)
    with pytest.raises(FormatError, match=message) as caught:
        COMPRESSED_TENSORS.unpack_layer(packed, layer.spec, name="m")
    assert "\n" not in str(caught.value)


def test_the_other_3_bit_form_is_named() -> None:
    layer = make_layer(QuantSpec(bits=3, group_size=64), 20, 128)
    with pytest.raises(FormatError, match=r"3 bits take 12 words: it is the padded \(.* 0\.17 and older\) form"):
        COMPRESSED_TENSORS.unpack_layer(COMPRESSED_TENSORS_PADDED.pack_layer(layer), layer.spec)
    with pytest.raises(FormatError, match=r"3 bits take 13 words: it is the dense \(.* 0\.18 and newer\) form"):
        COMPRESSED_TENSORS_PADDED.unpack_layer(COMPRESSED_TENSORS.pack_layer(layer), layer.spec)
    # 50 codes take five words either way, and only the bits between them tell.
    narrow = make_layer(QuantSpec(bits=3, group_size=-1, symmetric=True), 20, 50)
    for written, reader in (
        (COMPRESSED_TENSORS, COMPRESSED_TENSORS_PADDED),
        (COMPRESSED_TENSORS_PADDED, COMPRESSED_TENSORS),
    ):
        with pytest.raises(
            FormatError, match=r"bits set that belong to no code, .* not in the form that it is labelled"
        ):
            reader.unpack_layer(written.pack_layer(narrow), narrow.spec)


@FORMS
@pytest.mark.parametrize(("part", "codes"), [("weight_packed", 14), ("weight_zero_point", 3)])
def test_every_bit_is_of_a_code_or_refused(layout, part: str, codes: int) -> None:
    # A reader that overlooked a bit would take two different files for one.
    layer = make_layer(QuantSpec(bits=3, group_size=-1), 3, 14)
    packed = layout.pack_layer(layer)
    for row, column in itertools.product(*map(range, packed[part].shape)):
        word = row if part == "weight_zero_point" else column
        for bit in range(32):
            flipped = packed | {part: packed[part].clone()}
            flipped[part][row, column] ^= -(2**31) if bit == 31 else 1 << bit
            code = (word * 10 + bit // 3 if bit < 30 else codes) if layout.padded else (word * 32 + bit) // 3
            if code < codes:
                read = layout.unpack_layer(flipped, layer.spec)
                assert (read.codes != layer.codes).sum() + (read.zeros != layer.zeros).sum() == 1
            else:
                with pytest.raises(FormatError, match=f"{part} has bits set that belong to no code"):
                    layout.unpack_layer(flipped, layer.spec)


def test_wrong_bits_are_noticed() -> None:
    layer = make_layer(QuantSpec(4, 64), 32, 128)
    with pytest.raises(FormatError, match="128 codes of 2 bits take 8 words: the config and the tensors disagree"):
        COMPRESSED_TENSORS.unpack_layer(COMPRESSED_TENSORS.pack_layer(layer), QuantSpec(2, 64))
    headers = COMPRESSED_TENSORS.headers(32, 128, QuantSpec(4, 64))
    with pytest.raises(FormatError, match="m: weight_packed 32 x 16 and weight_scale 32 x 2 do not belong to"):
        COMPRESSED_TENSORS.features(headers, QuantSpec(2, 64), name="m")
    with pytest.raises(FormatError, match="do not belong to one layer of 4 bits and group size -1"):
        COMPRESSED_TENSORS.features(headers, QuantSpec(4, -1), name="m")
    for shape in ([32, 127], [32, -1], [31, 32]):
        with pytest.raises(FormatError, match=r"m: .*(do not belong|weight_packed has 32 rows)"):
            COMPRESSED_TENSORS.features(
                COMPRESSED_TENSORS.headers(32, 32, QuantSpec(4, -1)),
                QuantSpec(4, -1),
                name="m",
                read={"weight_shape": torch.tensor(shape)}.__getitem__,
            )
    with pytest.raises(FormatError, match=r"m: weight_scale has shape \(2,\); expected 2 dimensions"):
        COMPRESSED_TENSORS.features(headers | {"weight_scale": ("F16", (2,))}, QuantSpec(4, 64), name="m")


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
