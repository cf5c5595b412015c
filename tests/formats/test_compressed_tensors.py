"""The compressed-tensors layout: bytes against a packer that shares no code, round trips, refusals, config."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_forms import FORMS
from random_layers import assert_same, make_layer

import cloq_export.formats.compressed_tensors as compressed_tensors
from cloq_export.errors import FormatError, ShapeError
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.formats.compressed_tensors import COMPRESSED_TENSORS, COMPRESSED_TENSORS_PADDED
from cloq_export.types import QuantizedLayer, QuantSpec

GOLDEN = Path(compressed_tensors.__file__).parent / "golden"


def load_generator():
    spec = importlib.util.spec_from_file_location("compressed_tensors_golden_generate", GOLDEN / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = load_generator()


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
