"""Deterministic layers: a token gets the same bits alone and anywhere in a batch, on every instruction set here."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cpu_layers import DTYPES, SHAPES, make_layer, make_lora, random_input

from cloq_export.kernels import cpu
from cloq_export.kernels.cpu import linear as kernel
from cloq_export.kernels.cpu import lora as cpu_lora
from cloq_export.kernels.cpu import weight as cpu_weight

pytestmark = [
    pytest.mark.parametrize("isa", cpu.runnable_isas(), indirect=True),
    pytest.mark.usefixtures("_nan_outputs"),
]

# Every width of a kernel, what is left over beside it, panels, and row tiles of one adapter and of several.
TOKENS = (2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 24, 25, 33, 64)


@pytest.mark.parametrize("precision", ["exact", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(100, 384, 128), (33, 72, 24), (1, 40, 8), (16, 7, 7)])
def test_a_token_alone_and_in_a_batch(isa, shape, bits, dtype, precision):
    assert shape in SHAPES
    codes, scales, zeros, _ = make_layer(*shape, bits)
    weight = cpu_weight.pack_weight(codes, scales, zeros, bits, deterministic=True)
    lora = cpu_lora.pack_lora(*make_lora(3, 5, *shape[:2], dtype))
    bias = random_input(shape[0], seed=2)
    x = random_input(64, shape[1], dtype=dtype)
    mixed = torch.randint(-1, 3, (64,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    mixed[16:32] = 1
    for index in (None, mixed):

        def compute(first, last, index=index):
            pairs = (None, None) if index is None else (lora, index[first:last])
            return kernel.lora_linear(x[first:last], weight, bias, *pairs, precision=precision)

        alone = torch.cat([compute(row, row + 1) for row in range(64)])
        assert not alone.isnan().any()
        for tokens in TOKENS:
            for first in {0, 64 - tokens}:
                assert torch.equal(compute(first, first + tokens), alone[first : first + tokens]), (tokens, first)


@pytest.mark.parametrize(
    ("shape", "bits"),
    [
        pytest.param((530, 256, 64), 2, id="more blocks than a task has"),
        pytest.param((530, 128, 64), 3, id="the same without pairs"),
        pytest.param((33, 616, 616), 2, id="groups longer than what stays near"),
        pytest.param((33, 616, 616), 4, id="such groups without pairs"),
    ],
)
def test_threads_passes_and_slabs_change_nothing(isa, shape, bits):
    codes, scales, zeros, _ = make_layer(*shape, bits)
    weight = cpu_weight.pack_weight(codes, scales, zeros, bits, deterministic=True)
    x = random_input(1024 + 5, shape[1])
    rows = torch.tensor([0, 1023, 1024, 1028])
    alone = torch.cat([kernel.linear(x[row : row + 1], weight) for row in rows])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(kernel.linear(x, weight)[rows], alone)
            assert torch.equal(kernel.linear(x[:1], weight), alone[:1])
    finally:
        torch.set_num_threads(before)


def test_the_sums_are_as_good(isa):
    codes, scales, zeros, q = make_layer(48, 544, 32, 2)
    weight = cpu_weight.pack_weight(codes, scales, zeros, 2)
    x = random_input(9, 544)
    truth = x.to(torch.float64) @ q.t()
    errors = [
        float((kernel.linear(x, each).to(torch.float64) - truth).square().mean().sqrt())
        for each in (weight, dataclasses.replace(weight, deterministic=True))
    ]
    assert errors[1] <= 2 * errors[0] + 1e-6


def test_without_it_the_way_depends_on_the_tokens(isa):
    """What the tests above would not see if they compared the same way with itself."""
    codes, scales, zeros, _ = make_layer(100, 384, 128, 2)
    weight = cpu_weight.pack_weight(codes, scales, zeros, 2)
    x = random_input(33, 384)
    assert not torch.equal(kernel.linear(x, weight)[:1], kernel.linear(x[:1], weight))
