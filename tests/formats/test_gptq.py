"""The GPTQ layout: bytes against a packer that shares no code, round trips, refusals, config."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_layers import assert_same, make_layer

import cloq_export.formats.gptq as gptq
from cloq_export.errors import FormatError, ShapeError
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.formats.gptq import pack_layer, unpack_layer
from cloq_export.types import QuantizedLayer, QuantSpec

GOLDEN = Path(gptq.__file__).parent / "golden"


def load_generator():
    spec = importlib.util.spec_from_file_location("gptq_golden_generate", GOLDEN / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = load_generator()


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
        (lambda t: t.update(scales=t["scales"].double()), r"scales is torch\.float64; expected torch\.float16"),
        (lambda t: t.update(scales=t["scales"].float() / 3), "scales, which are torch.float32, are no float16 numbers"),
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_writers_are_converted_without_loss(dtype: torch.dtype) -> None:
    layer = make_layer(QuantSpec(bits=3, group_size=64), 32, 128)
    coarse = layer.scales.to(torch.bfloat16)
    read = unpack_layer(pack_layer(layer) | {"scales": coarse.t().to(dtype)}, layer.spec)
    assert read.scales.dtype == torch.float16
    assert torch.equal(read.scales.float(), coarse.float())
    assert torch.equal(read.codes, layer.codes)


def test_wrong_bits_are_noticed() -> None:
    layer = make_layer(QuantSpec(bits=4, group_size=64), 32, 128)
    with pytest.raises(FormatError, match="expected"):
        unpack_layer(pack_layer(layer), QuantSpec(bits=2, group_size=64))


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
