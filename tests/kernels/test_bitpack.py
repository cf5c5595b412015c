"""Bit packing against a bitstream made of one Python integer per row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloq_export.kernels import bitpack, cpu, dispatch

# Packing has no code of its own beyond AVX2.
pytestmark = pytest.mark.parametrize(
    "isa", ["torch", *(name for name in cpu.runnable_isas() if name in ("scalar", "avx2"))], indirect=True
)

BITS = (2, 3, 4, 8)
SHAPES = [(1, 1), (1, 31), (3, 7), (5, 33), (17, 64), (2, 95), (66, 544), (16, 2080), (9, 0), (0, 5)]


def stream_of(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack one code at a time."""
    rows, columns = codes.shape
    words = torch.zeros(rows, -(-columns * bits // 32), dtype=torch.int64)
    for row, values in enumerate(codes.tolist()):
        stream = sum(code << (bits * index) for index, code in enumerate(values))
        for word in range(words.shape[1]):
            words[row, word] = stream >> (32 * word) & 0xFFFFFFFF
    return words.to(torch.int32)  # two's complement: the upper half of the range becomes negative


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)


@pytest.fixture
def _garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every new tensor with ones, so that a word or code that is not written shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        tensor.view(torch.uint8).fill_(0xFF)
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.usefixtures("_garbage")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows(isa, shape, bits):
    codes = random_codes(*shape, bits)
    words = bitpack.pack_rows(codes, bits)
    assert words.dtype == torch.int32
    assert words.is_contiguous()
    assert torch.equal(words, stream_of(codes, bits))
    back = bitpack.unpack_rows(words, bits, shape[1])
    assert back.is_contiguous()
    assert torch.equal(back, codes)


@pytest.mark.usefixtures("_garbage")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1, 32), (3, 64), (8, 96), (16, 544), (64, 1024), (131, 544), (272, 64), (7, 0)])
def test_columns(isa, shape, bits):
    codes = random_codes(*shape, bits)
    words = bitpack.pack_columns(codes, bits)
    assert words.is_contiguous()
    assert torch.equal(words, stream_of(codes, bits).t())
    back = bitpack.unpack_columns(words, bits)
    assert back.is_contiguous()
    assert torch.equal(back, codes)


@pytest.mark.parametrize("bits", BITS)
def test_inputs_need_not_be_contiguous(isa, bits):
    codes = random_codes(64, 96, bits)
    for view in (codes.t(), codes[::2], codes[:, 32:64], codes[:, ::3]):
        words = stream_of(view, bits)
        assert torch.equal(bitpack.pack_rows(view, bits), words)
        assert torch.equal(bitpack.pack_columns(view, bits), words.t())
        wide = torch.cat([words, words], dim=1)[:, : words.shape[1]]
        assert torch.equal(bitpack.unpack_rows(wide, bits), view)
        assert torch.equal(bitpack.unpack_columns(words.t(), bits), view)


@pytest.mark.parametrize("bits", BITS)
def test_one_column_with_the_strides_of_a_row(isa, bits):
    codes = random_codes(2, 32 // bits if bits != 3 else 8, bits)
    words = bitpack.pack_rows(codes, bits)
    turned = words.t().contiguous().t()  # torch calls it contiguous whatever its strides are
    assert torch.equal(bitpack.unpack_rows(turned, bits, codes.shape[1]), codes)


@pytest.mark.parametrize("bits", BITS)
def test_nothing_beyond_the_tensors_is_read_or_written(isa, bits):
    if isa == "torch":
        pytest.skip("torch checks its own bounds")
    rows, columns, margin = 5, 45, 64
    count = -(-columns * bits // 32)
    codes = random_codes(rows, columns, bits)
    native = cpu.load()
    assert native is not None
    # Words lie at the end of a block of their own, followed by a pattern that must survive.
    words = torch.full((rows * count + margin,), -0x5A5A5A5B, dtype=torch.int32)
    assert native.cloq_pack_rows(codes.data_ptr(), rows, columns, bits, words.data_ptr(), 2) == 0
    assert torch.equal(words[: rows * count].view(rows, count), stream_of(codes, bits))
    assert bool((words[rows * count :] == -0x5A5A5A5B).all())
    back = torch.full((rows * columns + margin,), 0xA5, dtype=torch.uint8)
    native.cloq_unpack_rows(words.data_ptr(), rows, count, columns, bits, back.data_ptr(), 2)
    assert torch.equal(back[: rows * columns].view(rows, columns), codes)
    assert bool((back[rows * columns :] == 0xA5).all())


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_unaligned_memory(isa, offset):
    block = torch.zeros(64 * 96 + offset, dtype=torch.uint8)
    codes = block[offset:].view(64, 96).copy_(random_codes(64, 96, 3))
    expected = stream_of(codes, 3)
    assert torch.equal(bitpack.pack_rows(codes, 3), expected)
    assert torch.equal(bitpack.pack_columns(codes, 3), expected.t())
    words = torch.zeros(expected.numel() + offset, dtype=torch.int32)[offset:].view_as(expected).copy_(expected)
    assert torch.equal(bitpack.unpack_rows(words, 3), codes)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(isa, threads):
    codes = random_codes(200, 4096, 3)
    expected = bitpack.pack_rows(codes, 3), bitpack.pack_columns(codes, 3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(bitpack.pack_rows(codes, 3), expected[0])
        assert torch.equal(bitpack.pack_columns(codes, 3), expected[1])
        assert torch.equal(bitpack.unpack_rows(expected[0], 3), codes)
        assert torch.equal(bitpack.unpack_columns(expected[1], 3), codes)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bits=st.sampled_from(BITS), rows=st.integers(0, 70), columns=st.integers(0, 600), seed=st.integers(0, 2**31 - 1))
def test_round_trip(isa, bits, rows, columns, seed):
    codes = random_codes(rows, columns, bits, seed)
    words = bitpack.pack_rows(codes, bits)
    assert torch.equal(bitpack.unpack_rows(words, bits, columns), codes)
    assert torch.equal(bitpack._pack_rows_torch(codes, bits), words)
    whole = columns // 32 * 32
    packed = bitpack.pack_columns(codes[:, :whole], bits)
    assert torch.equal(packed.t(), words[:, : whole * bits // 32])
    assert torch.equal(bitpack.unpack_columns(packed, bits), codes[:, :whole])


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("place", [(0, 0), (4, 66), (2, 40)])
def test_a_code_that_does_not_fit_is_refused(isa, bits, place):
    codes = random_codes(5, 67, bits)
    codes[place] = 2**bits
    message = f"the largest code is {2**bits}; {bits} bits hold 0..{2**bits - 1}"
    with pytest.raises(ValueError, match=message):
        bitpack.pack_rows(codes, bits)
    wide = torch.nn.functional.pad(codes, (0, 29))
    with pytest.raises(ValueError, match=message):
        bitpack.pack_columns(wide, bits)


def test_wrong_tensors_never_reach_the_library(isa):
    codes, words = torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.int32)
    for pack in (bitpack.pack_rows, bitpack.pack_columns):
        with pytest.raises(TypeError, match=r"codes must be torch\.uint8; got torch\.int8"):
            pack(codes.to(torch.int8), 2)
        with pytest.raises(ValueError, match=r"codes must be a matrix; got shape \(64,\)"):
            pack(codes.view(-1), 2)
        with pytest.raises(ValueError, match="bits is 5; allowed are 2, 3, 4 and 8"):
            pack(codes, 5)
    for unpack in (bitpack.unpack_rows, bitpack.unpack_columns):
        with pytest.raises(TypeError, match=r"packed words must be torch\.int32; got torch\.int64"):
            unpack(words.to(torch.int64), 2)
        with pytest.raises(ValueError, match=r"packed words must be a matrix; got shape \(6,\)"):
            unpack(words.view(-1), 2)
        with pytest.raises(ValueError, match="bits is 1; allowed are 2, 3, 4 and 8"):
            unpack(words, 1)
    with pytest.raises(ValueError, match="3 words hold 32 codes of 3 bits; 33 were asked for"):
        bitpack.unpack_rows(words, 3, 33)
    with pytest.raises(
        ValueError, match="31 codes of 3 bits do not fill whole 32-bit words; allowed is a multiple of 32"
    ):
        bitpack.pack_columns(codes[:, :31], 3)
    with pytest.raises(ValueError, match="2 words do not hold whole codes of 3 bits; allowed is a multiple of 3"):
        bitpack.unpack_columns(words, 3)


def test_outputs_may_be_given(isa):
    codes = random_codes(4, 64, 3)
    words = stream_of(codes, 3)
    out = torch.empty(4, 6, dtype=torch.int32)
    assert bitpack.pack_rows(codes, 3, out=out) is out
    assert torch.equal(out, words)
    out = torch.empty(6, 4, dtype=torch.int32)
    assert bitpack.pack_columns(codes, 3, out=out) is out
    assert torch.equal(out, words.t())
    for unpack, given_words in ((bitpack.unpack_rows, words), (bitpack.unpack_columns, words.t())):
        back = torch.empty(4, 64, dtype=torch.uint8)
        assert unpack(given_words, 3, out=back) is back
        assert torch.equal(back, codes)
        with pytest.raises(ValueError, match=r"out is \(4, 63\) .*, not contiguous; allowed is a contiguous \(4, 64\)"):
            unpack(given_words, 3, out=back[:, 1:])
    with pytest.raises(ValueError, match=r"out is \(4, 6\) torch.int64 on cpu; allowed is .* torch.int32 on cpu"):
        bitpack.pack_rows(codes, 3, out=words.to(torch.int64))


def test_fake_tensors_stay_with_torch(isa):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        codes = torch.zeros(4, 64, dtype=torch.uint8)
        assert dispatch.native_library(codes) is None
