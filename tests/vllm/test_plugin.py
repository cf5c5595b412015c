"""What the plugin does to a vLLM, without starting an engine; each probe is a script in the engine's environment."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from cloq_export.formats.gptq import GPTQ_V1
from cloq_export.types import QuantSpec

pytestmark = pytest.mark.slow

# float32 sums of a few hundred products in another order.
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def claims(probe: Callable[..., Any]) -> Any:
    return probe("claims.py")


def test_claims_what_vllm_refuses_and_nothing_else(claims: Any) -> None:
    claimed, stock = claims["claimed"], claims["stock"]
    for name in ("asymmetric", "2-bit", "3-bit v2", "group of 16", "one layer of 2 bits"):
        assert claimed[name] == "cloq", name
    for name in ("stock 4-bit", "stock 8-bit"):
        assert claimed[name] is None, name
        assert stock[name], name
    # Whether groups have an order is told by g_idx when it is loaded, not by the label.
    assert claimed["general rule"] == claimed["act-order"] == "cloq"
    for name in ("quantized head", "awq"):
        assert claimed[name] is None, name
    for name in ("8-bit", "2-bit", "asymmetric", "zeros as they are", "a float head"):
        assert claimed[f"AutoRound, {name}"] == "cloq", name
    for name in ("4-bit", "a head", "words of AWQ"):
        assert claimed[f"AutoRound, {name}"] is None, name
    assert "lm_head is quantized, and this plugin does not serve a quantized head" in claims["head of AutoRound's"]
    assert claims["asked for"] == "cloq"
    assert claims["asked for another"] is None


def test_registering_twice_changes_nothing(claims: Any) -> None:
    assert (claims["methods"], claims["kernels"]) == (1, 1)


def test_a_base_that_needs_its_adapter_is_never_asked_alone(claims: Any) -> None:
    assert claims["needs adapter"] == [True, True, False, False, False]
    assert claims["alone"].startswith("tiny needs its adapter: its codes were made for what its adapter leaves of the")
    assert "Ask for an adapter by its name." in claims["alone"]
    assert claims["with an adapter"] is None
    assert claims["no adapters at all"].startswith("/exports/tiny needs its adapter: its codes were made")
    assert (
        "start with --enable-lora and --lora-modules NAME=FOLDER, or with cloq serve." in claims["no adapters at all"]
    )


def test_an_adapter_of_which_a_part_would_be_left_out_is_refused(claims: Any) -> None:
    assert claims["lost"][:3] == [None] * 3
    for message, module in zip(
        claims["lost"][3:], ("model.layers.0.self_attn.q_proj", "vision.layers.0.q_proj"), strict=True
    ):
        assert message.startswith(f"mine adapts {module}, which this engine would serve without the adapter; start it")


def test_experts_that_are_not_computed_are_refused_by_name(claims: Any) -> None:
    refusals = claims["experts"]
    assert refusals.pop("as they should be") is None
    expected = {
        "gpu": r"does not serve quantized experts on .*, only on the CPU; serve a merged export",
        "activation": "with the activation swiglustep; it knows silu",
        "clamped": "whose activation is clamped",
        "biases": "with biases",
        "uneven": "whose 192 inner features cannot be cut evenly into 5 ranks",
        "data parallel": "where ranks hold other tokens; start without data, context or sequence parallelism",
        "copied": "that vLLM copies or adds to; start without --enable-eplb",
        "half": r"experts\.1\.up_proj is not quantized; quantize all of them or none",
        "adapted float experts": "mlp.experts is adapted, but its experts are not quantized, and on a CPU",
    }
    assert set(refusals) == set(expected)
    for name, message in expected.items():
        assert re.search(message, refusals[name]), (name, refusals[name])
        assert "\n" not in refusals[name]


def test_low_rank_products_skip_rows_without_an_adapter(probe: Callable[..., Any]) -> None:
    seen = probe("punica.py")
    assert seen["ours"] < ROUNDING
    assert "adapters of the head cannot be served" in seen.pop("refusal")
    assert all(error < ROUNDING for name, error in seen.items() if name.startswith("head"))


@pytest.mark.usefixtures("only_on_cpu")
def test_adapters_are_computed_with_their_layer(export: Any, probe: Callable[..., Any]) -> None:
    # bfloat16 keeps eight bits of factors, sums and results: 4e-3 for each of two or three roundings.
    for dtype, allowed in (("float32", ROUNDING), ("bfloat16", 1e-2)):
        errors = probe("fused_lora.py", export.folder, dtype)
        assert set(errors) == {"qkv", "gate_up", "RowParallelLinear", "ReplicatedLinear"}
        assert max(errors.values()) < allowed, (dtype, errors)


def test_rank_slices(write_export: Callable[..., Any], probe: Callable[..., Any]) -> None:
    plain = write_export(QuantSpec(bits=3, group_size=32)).folder
    per_channel = write_export(QuantSpec(bits=2, group_size=-1), layout=GPTQ_V1).folder
    own_grids = write_export(
        QuantSpec(bits=2, group_size=64),
        overrides={
            "q_proj": QuantSpec(bits=4, group_size=16),
            "k_proj": QuantSpec(bits=2, group_size=-1),
            "gate_proj": QuantSpec(bits=4, group_size=32, symmetric=True),
        },
    ).folder
    jobs = [
        *((plain, ranks, native) for ranks, native in ((1, True), (2, True), (2, False))),
        (per_channel, 4, True),
        *((own_grids, ranks, True) for ranks in (1, 2, 4)),
        (plain, 4, True),
    ]
    *found, refused = probe("shards.py", json.dumps([(str(folder), *rest) for folder, *rest in jobs]))
    for job, errors in zip(jobs, found, strict=False):
        assert set(errors) == {"qkv", "gate_up", "fused_on_disk", "down", "o", "replicated"}, (job, errors)
        assert max(errors.values()) < ROUNDING, (job, errors)
    assert "192 inputs, of which one rank gets 48; 3-bit codes can be cut every 32" in refused["refused"]
