"""The packed linear layers of the CPU library against plain torch in float64, on every instruction set here."""

from __future__ import annotations

import pytest
import torch
from cpu_layers import DTYPES, SHAPES, assert_as_good_as_torch, make_layer, make_lora, random_input

from cloq_export.kernels import cpu
from cloq_export.kernels.cpu import linear as kernel
from cloq_export.kernels.cpu import lora as cpu_lora
from cloq_export.kernels.cpu import weight as cpu_weight
from cloq_export.kernels.reference import canonical
from cloq_export.kernels.reference.lora import Adapters

pytestmark = [
    pytest.mark.parametrize("isa", cpu.runnable_isas(), indirect=True),
    pytest.mark.usefixtures("_nan_outputs"),
]

BITS = (2, 3, 4, 8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_layout_comes_back_and_dequantizes_exactly(isa, shape, bits):
    codes, scales, zeros, q = make_layer(*shape, bits)
    weight = cpu_weight.pack_weight(codes, scales, zeros, bits)
    for given, back in zip((codes, scales, zeros), cpu_weight.unpack_weight(weight), strict=True):
        assert back.is_contiguous()
        assert torch.equal(given, back)
    # A code of at most 8 bits times an 11-bit mantissa fits float32: no rounding at all.
    assert torch.equal(cpu_weight.dequantize(weight).to(torch.float64), q)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(cpu_weight.dequantize(weight, dtype), q.to(torch.float32).to(dtype))
    if shape[0] > 32:
        assert torch.equal(cpu_weight.dequantize(weight, first_row=16, rows=17).to(torch.float64), q[16:33])


def test_the_layout_is_the_one_that_the_header_describes(isa):
    """One output channel at a time, from the words of cloq_cpu.h's text."""
    for bits in BITS:
        codes, scales, zeros, _ = make_layer(3, 64, 64, bits, seed=bits)
        weight = cpu_weight.pack_weight(codes, scales, zeros, bits)
        slots = 2 if bits == 3 else 8 // bits
        for row in range(3):
            for unit in range(2):
                stored = weight.words[0, unit * bits : (unit + 1) * bits, row].tolist()
                words = [word & 0xFFFFFFFF for word in stored]
                if bits == 3:
                    words.append(sum((word >> 6 & 0x03030303) << 2 * v for v, word in enumerate(words)))
                for v, word in enumerate(words):
                    for byte in range(4):
                        for slot in range(slots):
                            k = 32 * unit + 2 * (v * 2 * slots + byte % 2 * slots + slot) + byte // 2
                            assert word >> (8 * byte + bits * slot) & (2**bits - 1) == codes[row, k]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(isa, shape, bits, dtype):
    codes, scales, zeros, q = make_layer(*shape, bits)
    weight = cpu_weight.pack_weight(codes, scales, zeros, bits)
    bias = random_input(shape[0], dtype=dtype, seed=2)
    for leading in [(), (2,), (0,), (2, 3), (13,), (33,)]:
        x = random_input(*leading, shape[1], dtype=dtype)
        truth = canonical.lora_linear(x, q, bias)
        largest = float((x.to(torch.float64).abs() @ q.t().abs()).max()) if x.numel() else 0.0
        plain = torch.nn.functional.linear(x, q.to(dtype), bias)
        assert_as_good_as_torch(kernel.linear(x, weight, bias), plain, truth, largest)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_tokens_than_one_pass(isa, dtype):
    codes, scales, zeros, q = make_layer(40, 96, 32, 3)
    weight = cpu_weight.pack_weight(codes, scales, zeros, 3)
    x = random_input(1024 + 37, 96, dtype=dtype)
    plain = torch.nn.functional.linear(x, q.to(dtype))
    assert_as_good_as_torch(kernel.linear(x, weight), plain, canonical.lora_linear(x, q), 10.0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_activations_are_rounded_activations(isa, shape, bits):
    codes, scales, zeros, q = make_layer(*shape, bits)
    weight = cpu_weight.pack_weight(codes, scales, zeros, bits)
    for tokens in (1, 2, 3, 7, 12, 29):
        x = random_input(tokens, shape[1])
        x[tokens // 2] *= 100.0
        # AMX rounds the weights that several tokens meet to bfloat16.
        met = q.to(torch.bfloat16).to(torch.float64) if isa == "amx" and tokens > 4 else q
        truth = canonical.lora_linear(x, met, int8_activations=True)
        result = kernel.linear(x, weight, precision="int8")
        # Activations that lie at the middle of two steps may go either way in float32 and float64; few of them do, so
        # the mean stays far below one step.
        step = float(x.abs().max()) / 127 * float(q.abs().max())
        torch.testing.assert_close(result.to(torch.float64), truth, rtol=1e-4, atol=1.01 * step)
        assert float((result - truth).square().mean().sqrt()) <= 0.1 * step
    zero = kernel.linear(torch.zeros(2, shape[1]), weight, precision="int8")
    assert torch.equal(zero, torch.zeros(2, shape[0]))


@pytest.mark.parametrize("precision", ["exact", "int8"])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), [*zip(DTYPES, DTYPES, strict=True), (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize(("shape", "rank"), [((33, 72, 24), 5), ((17, 128, 64), 64)])
def test_lora(isa, shape, rank, dtype, adapter_dtype, precision):
    codes, scales, zeros, q = make_layer(*shape, 2)
    weight = cpu_weight.pack_weight(codes, scales, zeros, 2)
    a, b, scaling = make_lora(3, rank, shape[0], shape[1], adapter_dtype)
    lora = cpu_lora.pack_lora(a, b, scaling)
    bias = random_input(shape[0], seed=2)
    for tokens in (1, 2, 9, 40):
        x = random_input(tokens, shape[1], dtype=dtype)
        mixed = torch.randint(-1, 3, (tokens,), dtype=torch.int32, generator=torch.Generator().manual_seed(tokens))
        runs = torch.arange(tokens, dtype=torch.int32) // 17 - 1  # whole tiles of one adapter, and mixed ones
        for index in (None, mixed, runs, torch.full((tokens,), -1, dtype=torch.int32)):
            truth = canonical.lora_linear(
                x, q, bias, Adapters(a, b, scaling, index), int8_activations=precision == "int8"
            )
            result = kernel.lora_linear(x, weight, bias, lora, index, precision=precision)
            if precision == "exact":
                narrow = Adapters(a.to(dtype), b.to(dtype), scaling, index)
                plain = canonical.lora_linear(x, q.to(dtype), bias, narrow)
                assert_as_good_as_torch(result, plain, truth, 10.0)
                continue
            # Half a unit in the last place of the result, and an activation between two steps that goes the other way;
            # on AMX the weights and factors that several tokens meet are bfloat16.
            tolerance = torch.finfo(torch.bfloat16 if isa == "amx" and tokens > 4 else dtype).eps + 3e-3
            torch.testing.assert_close(
                result.to(torch.float64), truth, rtol=tolerance, atol=tolerance * float(truth.abs().max())
            )


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_a_low_rank_term_meets_a_huge_output_once(isa, tokens):
    codes, scales, zeros, q = make_layer(48, 128, 64, 2)
    a, b, scaling = make_lora(1, 64, 48, 128, torch.float32)
    a[..., 5] = 0.0
    x = torch.zeros(tokens, 128)
    x[:, 5], x[:, 6] = 2.0**20, 30.0  # makes the output huge, and is what the adapter sees
    index = torch.zeros(tokens, dtype=torch.int32)
    truth = canonical.lora_linear(x, q, None, Adapters(a, b, scaling, index))
    result = kernel.lora_linear(
        x, cpu_weight.pack_weight(codes, scales, zeros, 2), None, cpu_lora.pack_lora(a, b, scaling)
    )
    # The base and the sum of both are rounded, by half a unit in the last place each.
    allowed = 2.0**-23 * truth.abs() + 1e-4
    assert ((result - truth).abs() <= allowed).all()
    assert truth.abs().max() > 1e5


def make_slices(outputs, columns, ranks, dtype):
    """Return three adapters of a layer that is several in one: a pair for every adapter and slice, or None."""
    generator = torch.Generator().manual_seed(sum(outputs))

    def pair(rank, out):
        if not rank:
            return None
        a, b = torch.randn(rank, columns, generator=generator), torch.randn(out, rank, generator=generator)
        return (a / columns**0.5).to(dtype), (b / rank**0.5).to(dtype)

    return [[pair(rank, out) for rank, out in zip(own, outputs, strict=True)] for own in ranks]


def sliced_truth(x, q, bias, outputs, adapters, scaling, index):
    """Return every slice computed by itself and token by token."""
    y = canonical.lora_linear(x, q, bias)
    first = 0
    for number, out in enumerate(outputs):
        for token, adapter in enumerate(index.tolist()):
            if adapter >= 0 and adapters[adapter][number] is not None:
                a, b = (factor.to(q.dtype) for factor in adapters[adapter][number])
                y[token, first : first + out] += scaling[adapter] * (b @ (a @ x[token].to(q.dtype)))
        first += out
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs", [(48, 16, 16), (16, 96), (320, 37)])
def test_slices_have_adapters_of_their_own(isa, outputs, dtype):
    codes, scales, zeros, q = make_layer(sum(outputs), 72, 24, 3)
    weight = cpu_weight.pack_weight(codes, scales, zeros, 3)
    bias = random_input(sum(outputs), seed=2)
    ranks = [[5, 0, 70][: len(outputs)], [33, 16, 8][: len(outputs)], [0, 0, 0][: len(outputs)]]
    adapters = make_slices(outputs, 72, ranks, dtype)
    lora = cpu_lora.allocate_lora(3, 72, 72, outputs, dtype)
    # What an adapter that was there before left behind must not be looked at.
    lora.a.fill_(float("nan"))
    lora.b.fill_(float("nan"))
    scaling = [0.5, 2.0, 1.0]
    for adapter, pairs in enumerate(adapters):
        cpu_lora.place_adapter(lora, adapter, pairs, scaling[adapter])
    assert lora.ranks.tolist() == ranks
    for tokens in (1, 4, 9, 40):
        x = random_input(tokens, 72, dtype=dtype)
        mixed = torch.randint(-1, 3, (tokens,), dtype=torch.int32, generator=torch.Generator().manual_seed(tokens))
        runs = torch.arange(tokens, dtype=torch.int32) // 17 % 3  # whole tiles of one adapter, and mixed ones
        for index in (mixed, runs):
            truth = sliced_truth(x, q, bias, outputs, adapters, scaling, index)
            result = kernel.lora_linear(x, weight, bias, lora, index)
            plain = sliced_truth(x, q.to(dtype), bias, outputs, adapters, scaling, index)
            assert_as_good_as_torch(result, plain, truth, float(truth.abs().max()))


def test_an_adapter_is_replaced_and_taken_away(isa):
    codes, scales, zeros, q = make_layer(48, 64, 32, 2)
    weight = cpu_weight.pack_weight(codes, scales, zeros, 2)
    lora = cpu_lora.allocate_lora(2, 16, 64, (32, 16), torch.float32)
    x, index = random_input(3, 64), torch.tensor([1, -1, 0], dtype=torch.int32)
    base = kernel.linear(x, weight)
    assert torch.equal(kernel.lora_linear(x, weight, None, lora, index), base)
    for ranks in ([16, 4], [3, 0], [0, 0]):
        pairs = make_slices((32, 16), 64, [ranks], torch.float32)[0]
        cpu_lora.place_adapter(lora, 1, pairs)
        truth = sliced_truth(x, q, None, (32, 16), [None, pairs], [1.0, 1.0], torch.tensor([1, -1, -1]))
        result = kernel.lora_linear(x, weight, None, lora, index)
        torch.testing.assert_close(result.to(torch.float64), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))
        assert torch.equal(result[1:], base[1:])
    # Ranks beyond the adapter's own, which engines fill with zeros, cost nothing.
    a, b = make_slices((32, 16), 64, [[4, 4]], torch.float32)[0][0]
    padded = torch.nn.functional.pad(a, (0, 0, 0, 9)), torch.nn.functional.pad(b, (0, 9))
    cpu_lora.place_adapter(lora, 0, [padded, None])
    assert lora.ranks.tolist() == [[4, 0], [0, 0]]


def test_tokens_without_an_adapter_get_the_base(isa):
    codes, scales, zeros, _ = make_layer(48, 64, 32, 3)
    weight = cpu_weight.pack_weight(codes, scales, zeros, 3)
    lora = cpu_lora.pack_lora(*make_lora(2, 4, 48, 64, torch.float32))
    x = random_input(6, 64)
    index = torch.tensor([-1, 0, -1, 1, 1, -1], dtype=torch.int32)
    result, base = kernel.lora_linear(x, weight, None, lora, index), kernel.linear(x, weight)
    assert torch.equal(result[index < 0], base[index < 0])
    assert bool((result[index >= 0] != base[index >= 0]).any(dim=1).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(isa, dtype):
    codes, scales, zeros, _ = make_layer(330, 256, 64, 3)
    weight = cpu_weight.pack_weight(codes, scales, zeros, 3)
    lora = cpu_lora.pack_lora(*make_lora(2, 8, 330, 256, torch.bfloat16))
    before = torch.get_num_threads()
    try:
        for tokens in (1, 6, 300):
            x = random_input(tokens, 256, dtype=dtype)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(kernel.lora_linear(x, weight, None, lora))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


def test_what_one_instruction_set_packed_another_reads(isa):
    codes, scales, zeros, q = make_layer(50, 96, 32, 3)
    weight = cpu_weight.pack_weight(codes, scales, zeros, 3)
    x = random_input(3, 96)
    for other in cpu.runnable_isas():
        with cpu.select_isa(other):
            assert torch.equal(cpu_weight.unpack_weight(weight)[0], codes)
            torch.testing.assert_close(kernel.linear(x, weight), (x.to(torch.float64) @ q.t()).to(torch.float32))


def test_inputs_need_not_be_contiguous_or_aligned(isa):
    codes, scales, zeros, _ = make_layer(20, 64, 32, 4)
    weight = cpu_weight.pack_weight(codes, scales, zeros, 4)
    x = random_input(5, 64)
    expected = kernel.linear(x, weight)
    assert torch.equal(kernel.linear(x.t().contiguous().t(), weight), expected)
    shifted = torch.zeros(5 * 64 + 1)[1:].view(5, 64).copy_(x)
    assert torch.equal(kernel.linear(shifted, weight), expected)
    transposed = cpu_weight.pack_weight(codes.t().contiguous().t(), scales, zeros, 4)
    assert torch.equal(transposed.words, weight.words)


def test_not_a_number_stays_with_its_token(isa):
    codes, scales, zeros, _ = make_layer(20, 64, 32, 4)
    weight = cpu_weight.pack_weight(codes, scales, zeros, 4)
    for dtype in DTYPES:
        for tokens in (3, 20, 40):
            x = random_input(tokens, 64, dtype=dtype)
            clean = kernel.linear(x, weight)
            x[1, 5] = torch.nan
            result = kernel.linear(x, weight)
            assert bool(result[1].isnan().all())
            kept = torch.arange(tokens) != 1
            assert torch.equal(result[kept], clean[kept])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"codes": torch.zeros(4, 64)}, TypeError, r"codes must be torch\.uint8; got torch\.float32"),
        ({"scales": torch.ones(4, 2)}, TypeError, r"scales must be torch\.float16; got torch\.float32"),
        ({"zeros": torch.zeros(8, dtype=torch.uint8)}, ValueError, r"zeros must be a matrix on the CPU; got \(8,\)"),
        ({"codes": torch.full((4, 64), 8, dtype=torch.uint8)}, ValueError, "largest of codes is 8; 3 bits hold 0..7"),
        ({"zeros": torch.full((4, 2), 9, dtype=torch.uint8)}, ValueError, "largest of zeros is 9; 3 bits hold 0..7"),
        ({"zeros": torch.zeros(4, 1, dtype=torch.uint8)}, ValueError, "disagree; allowed are"),
        ({"bits": 5}, ValueError, "bits is 5; allowed are 2, 3, 4 and 8"),
        ({"codes": torch.zeros(4, 63, dtype=torch.uint8)}, ValueError, "with groups dividing in"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(isa, change, error, message):
    parts = {
        "codes": torch.zeros(4, 64, dtype=torch.uint8),
        "scales": torch.ones(4, 2, dtype=torch.float16),
        "zeros": torch.zeros(4, 2, dtype=torch.uint8),
        "bits": 3,
    }
    with pytest.raises(error, match=message):
        cpu_weight.pack_weight(**(parts | change))


def test_tensors_that_do_not_belong_together_never_reach_the_library(isa):
    codes, scales, zeros, _ = make_layer(20, 64, 32, 4)
    weight = cpu_weight.pack_weight(codes, scales, zeros, 4)
    lora = cpu_lora.pack_lora(*make_lora(2, 4, 20, 64, torch.float32))
    x = random_input(3, 64)
    with pytest.raises(ValueError, match=r"the input is \(3, 63\) .*; this layer takes \(\.\.\., 64\)"):
        kernel.linear(x[:, :63], weight)
    with pytest.raises(ValueError, match=r"the input is \(3, 64\) torch.float64"):
        kernel.linear(x.to(torch.float64), weight)
    with pytest.raises(ValueError, match=r"the bias is \(19,\) torch.float32; this layer takes \(20,\)"):
        kernel.linear(x, weight, torch.zeros(19))
    with pytest.raises(ValueError, match=r"the gradient is \(3, 19\) .*; this layer takes \(\.\.\., 20\)"):
        kernel.cpu_linear_input_grad_op(x[:, :19], *weight.operands(), [])
    with pytest.raises(ValueError, match="the precision is 'fast'; allowed are"):
        kernel.linear(x, weight, precision="fast")
    with pytest.raises(ValueError, match="names 2; there are 2 adapters"):
        kernel.lora_linear(x, weight, None, lora, torch.tensor([0, 2, 1], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"the adapter index is \(2,\) torch.int32; allowed is \(3,\) int32"):
        kernel.lora_linear(x, weight, None, lora, torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="an adapter index was given, but no adapters"):
        kernel.lora_linear(x, weight, None, None, torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"this layer has 64 inputs and 2 blocks"):
        kernel.lora_linear(x, weight, None, cpu_lora.pack_lora(*make_lora(1, 4, 40, 64, torch.float32)))
    with pytest.raises(ValueError, match="disagree about the rank or the dtype"):
        cpu_lora.pack_lora(torch.zeros(1, 4, 64), torch.zeros(1, 20, 5), torch.ones(1))
    with pytest.raises(ValueError, match=r"scaling is \(2,\) torch.float32; allowed is \(1,\)"):
        cpu_lora.pack_lora(torch.zeros(1, 4, 64), torch.zeros(1, 20, 4), torch.ones(2))
    with pytest.raises(ValueError, match=r"slices of \(8, 12\) outputs are not possible"):
        cpu_lora.allocate_lora(2, 4, 64, (8, 12), torch.float32)
    room = cpu_lora.allocate_lora(2, 4, 64, (16, 4), torch.float32)
    a, b = torch.ones(5, 64), torch.ones(16, 5)
    for pairs, place, message in (
        ([(a, b), None], 0, "the adapter has rank 5; there is room for 4"),
        ([(a[:4], b), None], 0, r"A \(4, 64\) and B \(16, 5\) do not fit slice 0"),
        ([None, (a[:4, :63], b[:4, :4])], 0, r"A \(4, 63\) and B \(4, 4\) do not fit slice 1"),
        ([None, (a[:4], b[:, :4][:0])], 0, "which has 64 inputs and 1 blocks"),
        ([None], 0, "adapter 0 with 1 pairs was given; there is room for 2 with 2 each"),
        ([None, None], 2, "adapter 2 with 2 pairs was given"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu_lora.place_adapter(room, place, pairs)
    with pytest.raises(ValueError, match=r"the slices end at the blocks \[2, 1\]"):
        cpu_lora.CpuLora(room.a, room.b, room.scaling, room.ranks, torch.tensor([2, 1], dtype=torch.int32))
    with pytest.raises(ValueError, match="allowed are 0 to 4"):
        cpu_lora.CpuLora(room.a, room.b, room.scaling, room.ranks + 5, room.ends)
    with pytest.raises(ValueError, match=r"words are \(1, 4, 16\) torch.int32; this layer has contiguous \(2, 8, 16\)"):
        cpu_weight.CpuWeight(weight.words[:1, :4], weight.scales, weight.zeros, 4, 20, 64)
    with pytest.raises(
        ValueError, match="rows 8 to 12 were asked for; allowed are a first row that is a multiple of 16"
    ):
        cpu_weight.dequantize(weight, first_row=8, rows=4)
    with pytest.raises(ValueError, match=r"Q is made in float32, bfloat16 or float16; got torch.float64"):
        cpu_weight.dequantize(weight, torch.float64)


def test_without_a_library_packing_says_so(isa, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu.library, "load", lambda: None)
    codes, scales, zeros, _ = make_layer(4, 32, 32, 2)
    with pytest.raises(RuntimeError, match="CPU kernels: "):
        cpu_weight.pack_weight(codes, scales, zeros, 2)
