"""Pairs that are split, padded and made uniform: the same product, to the rounding that is allowed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft_adapters import FINGERPRINT, llama_pairs, make_pair

from cloq_export.errors import NonFiniteError, ShapeError
from cloq_export.formats.peft import (
    VLLM_MAX_LORA_RANKS,
    allowed_rank,
    balanced,
    padded,
    product_difference,
    uniform,
    write_adapter,
)
from cloq_export.types import LoraPair


def exact_product(pair: LoraPair) -> torch.Tensor:
    return (pair.lora_B.to(torch.float64) @ pair.lora_A.to(torch.float64)) * pair.scaling


def exact_difference(pair: LoraPair, reference: LoraPair) -> float:
    wanted = exact_product(reference)
    return float(torch.linalg.norm(exact_product(pair) - wanted) / torch.linalg.norm(wanted))


def conditioned_pair(
    out: int, columns: int, values: torch.Tensor, share: float, seed: int, dtype=torch.float32
) -> LoraPair:
    """A pair with the given singular values, the power `share` of them in B and the rest in A."""
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(out, len(values), generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64))
    lora_b, lora_a = u * values**share, (v * values ** (1 - share)).T
    return LoraPair(lora_a.to(dtype).contiguous(), lora_b.to(dtype).contiguous(), float(len(values)))


def spread(condition: float, rank: int) -> torch.Tensor:
    return torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64)


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, 2.0])
def test_balanced_split_is_the_svd_split(condition: float, share: float) -> None:
    values = spread(condition, 12)
    pair = conditioned_pair(40, 56, values, share, 3)
    split = balanced(pair)
    product = exact_product(pair)
    singular = torch.linalg.svdvals(product)[:12]
    # The oracle forms the product, whose own rounding hides singular values below 1e-16 of the largest.
    for factor in (split.lora_A @ split.lora_A.T, split.lora_B.T @ split.lora_B):
        torch.testing.assert_close(factor.to(torch.float64), torch.diag(singular), rtol=1e-5, atol=1e-6)
    assert split.alpha == split.rank == 12
    assert split.lora_A.dtype == torch.float32
    assert exact_difference(split, pair) < 2 * 2**-24 * 1.01
    largest = max(float(split.lora_A.abs().max()), float(split.lora_B.abs().max()))
    assert largest <= math.sqrt(float(singular[0])) * (1 + 1e-6)


@pytest.mark.parametrize(("dtype", "roundoff"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e4])
def test_balanced_split_loses_two_roundings_at_most(dtype: torch.dtype, roundoff: float, scale: float) -> None:
    # Magnitudes that float16 cannot hold: A reaches 1e9 while B falls to 1e-8, and the other way round.
    for share, seed in ((-1.0, 0), (0.0, 1), (1.0, 2), (2.0, 3)):
        pair = conditioned_pair(48, 64, scale * spread(1e6, 16), share, seed)
        split = balanced(pair, dtype)
        assert split.lora_A.dtype == split.lora_B.dtype == dtype
        assert max(float(split.lora_A.abs().max()), float(split.lora_B.abs().max())) < 1000
        error = product_difference(split, pair)
        assert error == pytest.approx(exact_difference(split, pair), rel=1e-6)
        assert error < 2 * roundoff + roundoff**2


def test_balanced_split_takes_the_scaling_in() -> None:
    pair = make_pair(24, 16, 4, 1.0, 0)
    split = balanced(pair)
    assert (pair.scaling, split.scaling) == (0.25, 1.0)
    assert product_difference(split, pair) < 1e-6
    zero = LoraPair(torch.zeros(2, 8), torch.zeros(4, 2), 2.0)
    assert not balanced(zero).lora_A.any()
    assert product_difference(balanced(zero), zero) == 0.0


def test_balanced_split_of_a_rank_above_the_layer() -> None:
    pair = make_pair(4, 16, 6, 6.0, 0)
    split = balanced(pair)
    assert split.rank == 6
    assert not split.lora_B[:, 4:].any()
    assert product_difference(split, pair) < 1e-6


def test_a_product_beyond_half_precision_is_refused() -> None:
    huge = LoraPair(torch.full((1, 4), 1e8), torch.full((4, 1), 1e8), 1.0)
    with pytest.raises(NonFiniteError, match=r"holds NaN or Inf in torch\.float16; store the adapter in float32"):
        balanced(huge, torch.float16)
    assert product_difference(balanced(huge), huge) < 1e-6


def test_product_difference_of_products_that_nearly_agree() -> None:
    pair = conditioned_pair(48, 64, spread(1e6, 16), 2.0, 0, torch.float64)
    near = LoraPair(pair.lora_A * (1 + 1e-9), pair.lora_B, pair.alpha)
    assert product_difference(near, pair) == pytest.approx(1e-9, rel=1e-5)
    assert product_difference(pair, pair) < 1e-15
    other = conditioned_pair(48, 64, spread(1e6, 10), 0.0, 1, torch.float64)
    assert product_difference(other, pair) == pytest.approx(exact_difference(other, pair), rel=1e-9)
    zero = LoraPair(torch.zeros(2, 64), torch.zeros(48, 2), 2.0)
    assert product_difference(zero, pair) == pytest.approx(1.0)
    assert product_difference(pair, zero) == math.inf
    with pytest.raises(ShapeError, match=r"the products are \(4, 8\) and \(48, 64\); only pairs of one layer"):
        product_difference(make_pair(4, 8, 2, 2.0, 0), pair)


@pytest.mark.parametrize(("rank", "alpha", "target"), [(60, 60.0, 64), (3, 1.0, 8), (5, 10.0, 320), (8, 4.5, 8)])
def test_padding_changes_no_digit_of_the_product(rank: int, alpha: float, target: int) -> None:
    pair = make_pair(12, 20, rank, alpha, 0, torch.float16)
    wide = padded(pair, target)
    assert wide.rank == target
    assert wide.scaling == pair.scaling
    assert torch.equal(wide.lora_A[:rank], pair.lora_A)
    assert torch.equal(wide.lora_B[:, :rank], pair.lora_B)
    assert not wide.lora_A[rank:].any()
    assert not wide.lora_B[:, rank:].any()
    assert wide.lora_A.dtype == torch.float16


def test_padding_that_cannot_be_exact_is_refused() -> None:
    with pytest.raises(ShapeError, match="a pair of rank 9 cannot be padded to rank 8; give 9 or more"):
        padded(make_pair(4, 8, 9, 9.0, 0), 8)
    with pytest.raises(ShapeError, match=r"no alpha gives exactly the scaling 0\.1111111111111111 at rank 10; split"):
        padded(make_pair(4, 8, 9, 1.0, 0), 10)


def test_allowed_rank() -> None:
    assert [allowed_rank(rank) for rank in (1, 2, 8, 60, 65, 257, 512)] == [1, 8, 8, 64, 128, 320, 512]
    assert allowed_rank(3, (16, 4)) == 4
    assert VLLM_MAX_LORA_RANKS == (1, 8, 16, 32, 64, 128, 256, 320, 512)
    with pytest.raises(ShapeError, match="rank 513 is above 512, the largest that is allowed; make the adapter with"):
        allowed_rank(513)


def test_uniform_pairs_need_no_patterns(tmp_path: Path) -> None:
    pairs = {
        "model.layers.0.q": make_pair(8, 16, 4, 4.0, 0, torch.float16),
        "model.layers.0.k": make_pair(8, 16, 6, 12.0, 1, torch.float16),
        "model.layers.0.v": make_pair(8, 16, 8, 2.0, 2, torch.float16),
    }
    same = uniform(pairs)
    assert (same.rank, same.alpha, same.inexact) == (8, 8.0, {})
    for module, pair in pairs.items():
        assert torch.equal(exact_product(same.pairs[module]), exact_product(pair))
    write_adapter(tmp_path / "a", same.pairs, base_model="m", base_fingerprint=FINGERPRINT)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert uniform(pairs, 64).rank == 64


def test_uniform_pairs_say_what_they_had_to_round() -> None:
    pairs = {
        "q": make_pair(8, 16, 4, 4.0, 0, torch.float16),
        "k": make_pair(8, 16, 4, 6.0, 1, torch.float16),
        "v": make_pair(8, 16, 4, 1.0, 2, torch.float16),
    }
    same = uniform(pairs)
    assert same.alpha == same.rank == 4
    assert set(same.inexact) == {"k"}
    assert same.inexact["k"] == pytest.approx(exact_difference(same.pairs["k"], pairs["k"]), rel=1e-6)
    assert 0 < same.inexact["k"] < 2**-11
    # A scaling that all share costs nothing, whatever it is.
    thirds = {name: make_pair(8, 16, 3, 1.0, seed) for seed, name in enumerate("qkv")}
    assert uniform(thirds).inexact == {}
    assert uniform(thirds).pairs["q"].scaling == 1 / 3
    # A power of two is not exact where it pushes entries among the subnormal numbers.
    tiny = {"q": pairs["q"], "k": LoraPair(torch.ones(1, 4).half(), torch.full((4, 1), 2**-14 * 1.001).half(), 2**-9)}
    assert set(uniform(tiny).inexact) == {"k"}
    off = {"q": pairs["q"], "k": LoraPair(torch.ones(1, 4), torch.ones(4, 1), 0.0)}
    assert uniform(off).inexact == {}
    assert not uniform(off).pairs["k"].lora_B.any()


def test_uniform_pairs_that_cannot_be() -> None:
    with pytest.raises(ShapeError, match="there is no LoRA pair to bring to one rank"):
        uniform({})
    with pytest.raises(ShapeError, match="the largest rank among the pairs is 6; rank 4 cannot hold it"):
        uniform({"q": make_pair(8, 16, 6, 6.0, 0)}, 4)
    loud = LoraPair(torch.ones(1, 4).half(), torch.full((4, 1), 6e4).half(), 2.0)
    with pytest.raises(NonFiniteError, match=r"k: B times 2 leaves the range of torch\.float16; store the adapter in"):
        uniform({"q": make_pair(4, 4, 1, 1.0, 0), "v": make_pair(4, 4, 1, 1.0, 1), "k": loud})


def test_what_uniform_and_balanced_write_is_served_by_peft(tiny_llama, tmp_path: Path) -> None:
    import copy

    from peft import PeftModel

    pairs = llama_pairs(tiny_llama)
    split = {name: balanced(pair) for name, pair in uniform(pairs, 8).pairs.items()}
    write_adapter(tmp_path / "a", split, base_model="tiny", base_fingerprint=FINGERPRINT, extra={"split": "balanced"})
    model = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), tmp_path / "a")
    for name, pair in pairs.items():
        delta = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        torch.testing.assert_close(delta, pair.product(), rtol=1e-5, atol=1e-5)
