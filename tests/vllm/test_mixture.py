"""Experts from packed codes against dense products of each token, and their loading, rank by rank; without vLLM."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from cloq_export.engines.vllm.plugin.adapters import target_name
from cloq_export.engines.vllm.plugin.expert_parts import (
    COMPRESSED_NAMES,
    DOWN,
    GATE,
    GPTQ_NAMES,
    UP,
    ExpertParts,
    MixtureShare,
    named_modules,
)
from cloq_export.engines.vllm.plugin.mixture import (
    Mixture,
    MixtureLora,
    StackedLora,
    StackedWeight,
    compute_mixture,
    cpu_mixture_op,
    operands,
    stack_weights,
)
from cloq_export.engines.vllm.plugin.parts import Fused
from cloq_export.errors import FormatError, NonFiniteError, ShapeError
from cloq_export.formats.gptq import GPTQ_V1
from cloq_export.formats.registry import LAYOUTS
from cloq_export.kernels import cpu
from cloq_export.types import QuantizedLayer, QuantSpec

HIDDEN, INNER, EXPERTS, SLOTS = 64, 96, 5, 3
NAMES = {GATE: "gate_proj", DOWN: "down_proj", UP: "up_proj"}
LORA = dict[tuple[int, int, str], tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(params=["native", "torch"])
def native(request: pytest.FixtureRequest) -> bool:
    if request.param == "native" and not cpu.available():
        pytest.skip("there is no native library")
    return bool(request.param == "native")


def random_layer(out_features: int, in_features: int, spec: QuantSpec, seed: int, lowest: int = 0) -> QuantizedLayer:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(spec.max_code + 1, (out_features, in_features), dtype=torch.uint8, generator=generator)
    groups = (out_features, spec.group_count(in_features))
    scales = (0.05 + 0.1 * torch.rand(groups, generator=generator)).to(torch.float16)
    zeros = torch.randint(lowest, spec.max_code + 1, groups, dtype=torch.uint8, generator=generator)
    if spec.symmetric:
        zeros = torch.full_like(zeros, 2 ** (spec.bits - 1))
    return QuantizedLayer(codes, scales, zeros, spec)


def random_experts(spec: QuantSpec, *, gated: bool = True, lowest: int = 0) -> dict[str, list[QuantizedLayer]]:
    sizes = {GATE: (INNER, HIDDEN), DOWN: (HIDDEN, INNER), UP: (INNER, HIDDEN)}
    return {
        name: [random_layer(*sizes[name], spec, 10 * number + int(name[1]), lowest) for number in range(EXPERTS)]
        for name in ((GATE, DOWN, UP) if gated else (GATE, DOWN))
    }


def stacked(parts: list[list[QuantizedLayer]], *, native: bool) -> StackedWeight:
    def fused(layers: tuple[QuantizedLayer, ...]) -> Fused:
        tensors = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("codes", "scales", "zeros"))
        return Fused(*tensors, layers[0].spec.bits, layers[0].spec.symmetric)

    return stack_weights(map(fused, zip(*parts, strict=True)), EXPERTS, native=native)


def random_pairs(gated: bool) -> LORA:
    """Return pairs of some experts, projections and slots, of several ranks."""
    generator = torch.Generator().manual_seed(4)
    sizes = {GATE: (INNER, HIDDEN), DOWN: (HIDDEN, INNER), UP: (INNER, HIDDEN)}
    pairs: LORA = {}
    for slot in range(SLOTS):
        for expert in range(EXPERTS):
            for place, name in enumerate((GATE, DOWN, UP) if gated else (GATE, DOWN)):
                if (slot + expert + place) % 4 == 3 or expert == EXPERTS - 1:
                    continue  # no adapter adapts everything, and the last expert has none
                out_features, in_features = sizes[name]
                rank = 1 + (slot + expert) % 4
                a = 0.1 * torch.randn(rank, in_features, generator=generator)
                pairs[slot, expert, name] = (a, 0.1 * torch.randn(out_features, rank, generator=generator))
    return pairs


def placed(pairs: LORA, up: StackedWeight, down: StackedWeight, dtype: torch.dtype) -> tuple[StackedLora, StackedLora]:
    gated = up.out_features == 2 * INNER
    loras = (
        StackedLora(SLOTS, 4, up, [INNER, INNER] if gated else [INNER], dtype),
        StackedLora(SLOTS, 4, down, [HIDDEN], dtype),
    )
    for slot in range(SLOTS):
        for expert in range(EXPERTS):
            for lora, names in zip(loras, (((GATE, UP) if gated else (GATE,)), (DOWN,)), strict=True):
                lora.place(slot, expert, [pairs.get((slot, expert, name)) for name in names])
    return loras


def dense(
    experts: dict[str, list[QuantizedLayer]],
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    pairs: LORA | None = None,
    index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the mixture one token and one expert at a time, in float64."""
    result = torch.zeros(x.shape, dtype=torch.float64)

    def weight(token: int, expert: int, name: str) -> torch.Tensor:
        dequantized = experts[name][expert].dequantize().to(torch.float64)
        pair = (pairs or {}).get((int(index[token]), expert, name)) if index is not None else None
        return dequantized if pair is None else dequantized + pair[1].to(torch.float64) @ pair[0].to(torch.float64)

    for token, row in enumerate(x.to(torch.float64)):
        for expert, share in zip(chosen[token].tolist(), weights[token].tolist(), strict=True):
            if expert < 0:
                continue
            gate = weight(token, expert, GATE) @ row
            if UP in experts:
                inner = functional.silu(gate) * (weight(token, expert, UP) @ row)
            else:
                inner = functional.relu(gate).square()
            result[token] += share * (weight(token, expert, DOWN) @ inner)
    return result


def routed(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return correlated tokens, which experts of this rank they are sent to, with what weights, and their adapters."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5
    x = torch.randn(tokens, HIDDEN, generator=generator) @ mixing + 0.3
    chosen = torch.stack([torch.randperm(EXPERTS, generator=generator)[:3] for _ in range(tokens)])
    chosen[chosen == 1] = -1  # that one is held by another rank
    weights = torch.rand(tokens, 3, generator=generator)
    index = torch.randint(-1, SLOTS, (tokens,), dtype=torch.int32, generator=generator)
    return x, chosen, weights, index


def relative(measured: torch.Tensor, expected: torch.Tensor) -> float:
    return float((measured.to(torch.float64) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("tokens", [1, 23])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("gated", [True, False])
def test_every_token_meets_its_experts_and_its_adapter(native: bool, gated: bool, bits: int, tokens: int) -> None:
    experts = random_experts(QuantSpec(bits=bits, group_size=32), gated=gated)
    up = stacked([experts[name] for name in (GATE, UP) if name in experts], native=native)
    down = stacked([experts[DOWN]], native=native)
    mixture = Mixture(up, down, "silu" if gated else "relu2_no_mul")
    x, chosen, weights, index = routed(tokens)
    pairs = random_pairs(gated)
    loras = placed(pairs, up, down, torch.float32)
    with_adapters = compute_mixture(mixture, x, chosen, weights, MixtureLora(*loras, index))
    assert relative(with_adapters, dense(experts, x, chosen, weights, pairs, index)) < 1e-5
    plain = compute_mixture(mixture, x, chosen, weights)
    assert relative(plain, dense(experts, x, chosen, weights)) < 1e-5
    nobody = MixtureLora(*loras, torch.full_like(index, -1))
    assert relative(compute_mixture(mixture, x, chosen, weights, nobody), plain.to(torch.float64)) < 1e-6
    for lora in loras:
        for slot in range(SLOTS):
            lora.clear(slot)
    emptied = compute_mixture(mixture, x, chosen, weights, MixtureLora(*loras, index))
    assert relative(emptied, plain.to(torch.float64)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_its_dtype(native: bool, dtype: torch.dtype) -> None:
    experts = random_experts(QuantSpec(bits=2, group_size=32))
    up, down = stacked([experts[GATE], experts[UP]], native=native), stacked([experts[DOWN]], native=native)
    x, chosen, weights, index = routed(9)
    loras = placed(random_pairs(True), up, down, dtype)
    y = compute_mixture(Mixture(up, down, "silu"), x.to(dtype), chosen, weights, MixtureLora(*loras, index))
    assert y.dtype == dtype
    expected = dense(experts, x, chosen, weights, random_pairs(True), index)
    # Inputs, both layers' outputs and factors are rounded once each.
    assert relative(y, expected) < 6 * torch.finfo(dtype).eps


def test_a_weight_of_the_router_on_the_input(native: bool) -> None:
    experts = random_experts(QuantSpec(bits=4, group_size=32))
    up, down = stacked([experts[GATE], experts[UP]], native=native), stacked([experts[DOWN]], native=native)
    x, chosen, weights, _ = routed(6)
    chosen, weights = chosen[:, :1].clamp(min=0), weights[:, :1]
    y = compute_mixture(Mixture(up, down, "silu", weighs_input=True), x, chosen, weights)
    assert relative(y, dense(experts, x * weights, chosen, torch.ones_like(weights))) < 1e-5


def test_the_operator_of_compiled_models(native: bool) -> None:
    experts = random_experts(QuantSpec(bits=3, group_size=32))
    mixture = Mixture(
        stacked([experts[GATE], experts[UP]], native=native), stacked([experts[DOWN]], native=native), "silu"
    )
    x, chosen, weights, _ = routed(5)
    given = (x, chosen, weights, *operands(mixture.up), *operands(mixture.down), "silu", False)
    assert torch.equal(cpu_mixture_op(*given), compute_mixture(mixture, x, chosen, weights))
    torch.library.opcheck(cpu_mixture_op, given, test_utils=("test_schema", "test_faketensor"))


def tensors_of(layer: QuantizedLayer, layout: str) -> dict[str, torch.Tensor]:
    return dict(LAYOUTS[layout].pack_layer(layer))


def load(experts: dict[str, list[QuantizedLayer]], share: MixtureShare, layout: str) -> tuple[Any, Any]:
    """Return what a rank holds after every tensor of the files was offered to it, as vLLM's loaders do."""
    names = COMPRESSED_NAMES if layout == "compressed_tensors" else GPTQ_NAMES
    modules = {
        name: [(f"experts.{number}.{NAMES[name]}", layers[number].spec) for number in share.experts]
        for name, layers in experts.items()
    }
    holder = nn.Module()
    parts = ExpertParts(modules, share, names, first_version=layout == GPTQ_V1.name)
    parts.register(holder)
    for name, layers in experts.items():
        for number, layer in enumerate(layers):
            for part, tensor in tensors_of(layer, layout).items():
                parameter: Any = holder.get_parameter(f"{'w2' if name == DOWN else 'w13'}_{part}")
                taken = parameter.weight_loader(
                    parameter, tensor, part, shard_id=name, expert_id=number, return_success=True
                )
                assert taken == (number in share.experts)
    up, down = parts.stack(holder)
    assert not dict(holder.named_parameters())
    return up, down


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", "compressed_tensors"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_add_up_to_the_whole(layout: str, ranks: int) -> None:
    experts = random_experts(QuantSpec(bits=3, group_size=32), lowest=1)
    x, _, weights, _ = routed(7)
    chosen = torch.stack([torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(n))[:3] for n in range(7)])
    total = torch.zeros(x.shape)
    for rank in range(ranks):
        share = MixtureShare(tuple(range(EXPERTS)), HIDDEN, INNER // ranks, INNER, rank * INNER // ranks)
        total += compute_mixture(Mixture(*load(experts, share, layout), "silu"), x, chosen, weights)
    assert relative(total, dense(experts, x, chosen, weights)) < 1e-5
    total = torch.zeros(x.shape)
    for mine in ((3, 0), (1, 4), (2,)):  # experts may be dealt to ranks in any order
        places = torch.full((EXPERTS,), -1)
        places[list(mine)] = torch.arange(len(mine))
        held = load(experts, MixtureShare(mine, HIDDEN, INNER, INNER), layout)
        total += compute_mixture(Mixture(*held, "silu"), x, places[chosen], weights)
    assert relative(total, dense(experts, x, chosen, weights)) < 1e-5


def test_experts_with_grids_of_their_own() -> None:
    experts = random_experts(QuantSpec(bits=2, group_size=32))
    experts[GATE][1] = random_layer(INNER, HIDDEN, QuantSpec(bits=4, group_size=16), 90)
    experts[UP][2] = random_layer(INNER, HIDDEN, QuantSpec(bits=3, group_size=-1), 91)
    experts[DOWN][3] = random_layer(HIDDEN, INNER, QuantSpec(bits=4, group_size=32, symmetric=True), 92)
    up, down = load(experts, MixtureShare(tuple(range(EXPERTS)), HIDDEN, INNER, INNER), "gptq_v2")
    assert (up.bits, down.bits) == (4, 4)
    x, chosen, weights, _ = routed(11)
    y = compute_mixture(Mixture(up, down, "silu"), x, chosen, weights)
    assert relative(y, dense(experts, x, chosen, weights)) < 1e-5


def test_what_cannot_be_loaded_is_refused() -> None:
    spec = QuantSpec(bits=3, group_size=32)
    modules = {name: [(f"experts.0.{NAMES[name]}", spec)] for name in NAMES}
    with pytest.raises(ShapeError, match="has 96 inputs, of which one rank gets 24; 3-bit codes can be cut every 32"):
        ExpertParts(modules, MixtureShare((0,), HIDDEN, 24, INNER, 24))
    parts, holder = ExpertParts(modules, MixtureShare((0,), HIDDEN, INNER, INNER)), nn.Module()
    parts.register(holder)
    order: Any = holder.get_parameter("w2_g_idx")
    with pytest.raises(FormatError, match=re.escape("experts.0.down_proj: g_idx is not sequential")):
        order.weight_loader(order, torch.arange(INNER).flip(0), "w2_g_idx", shard_id=DOWN, expert_id=0)
    with pytest.raises(NonFiniteError, match=re.escape("experts.0.gate_proj: a scale is missing")):
        parts.stack(holder)


def test_half_quantized_experts_are_refused() -> None:
    spec = QuantSpec(bits=2, group_size=32)
    known = {f"mlp.experts.{number}.{name}" for number in range(3) for name in NAMES.values()}

    def spec_of(module: str) -> QuantSpec | None:
        return spec if module in known else None

    found = named_modules("mlp.experts", range(3), NAMES, spec_of)
    assert found is not None
    assert found[DOWN][2] == ("mlp.experts.2.down_proj", spec)
    assert named_modules("other.experts", range(3), NAMES, spec_of) is None
    known -= {"mlp.experts.1.up_proj", "mlp.experts.2.up_proj"}
    said = "the experts of mlp.experts as one layer, but mlp.experts.1.up_proj and 1 more are not quantized"
    with pytest.raises(FormatError, match=re.escape(said)):
        named_modules("mlp.experts", range(3), NAMES, spec_of)


def test_vllm_knows_all_experts_by_one_name() -> None:
    assert target_name("model.layers.3.mlp.experts.17.gate_proj") == "experts"
    assert target_name("model.layers.3.mlp.shared_expert.gate_proj") == "gate_proj"
    assert target_name("model.layers.3.mlp.shared_experts.up_proj") == "up_proj"
