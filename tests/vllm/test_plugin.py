"""What the plugin does to a vLLM, without starting an engine; each probe is a script in the engine's environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cloq_export.formats.gptq import GPTQ_V1
from cloq_export.types import QuantSpec

pytestmark = pytest.mark.slow

# float32 sums of a few hundred products in another order.
ROUNDING = 2e-5


def test_claims_what_vllm_refuses_and_nothing_else(probe: Callable[..., Any]) -> None:
    seen = probe("claims.py")
    claimed, stock = seen["claimed"], seen["stock"]
    for name in ("asymmetric", "2-bit", "3-bit v2", "group of 16", "one layer of 2 bits"):
        assert claimed[name] == "cloq", name
    for name in ("stock 4-bit", "stock 8-bit"):
        assert claimed[name] is None, name
        assert stock[name], name
    for name in ("quantized head", "act-order", "general rule", "awq"):
        assert claimed[name] is None, name
    assert seen["asked for"] == "cloq"
    assert seen["asked for another"] is None


def test_registering_twice_changes_nothing(probe: Callable[..., Any]) -> None:
    seen = probe("claims.py")
    assert (seen["methods"], seen["kernels"]) == (1, 1)


def test_an_unsupported_version_is_left_alone(probe: Callable[..., Any]) -> None:
    assert probe("unsupported_version.py", "0.99.0") == {"methods": 0, "warnings": 1}


def test_low_rank_products_skip_rows_without_an_adapter(probe: Callable[..., Any]) -> None:
    seen = probe("punica.py")
    assert seen["ours"] < ROUNDING
    assert "adapters of the head cannot be served" in seen.pop("refusal")
    assert all(error < ROUNDING for name, error in seen.items() if name.startswith("head"))


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        ("3-bit", 1),
        ("3-bit", 2),
        ("2-bit per channel, version 1", 4),
        ("own grids in fused layers", 1),
        ("own grids in fused layers", 2),
        ("own grids in fused layers", 4),
    ],
)
def test_rank_slices(write_export: Callable[..., Any], probe: Callable[..., Any], case: str, ranks: int) -> None:
    if case == "3-bit":
        export = write_export(QuantSpec(bits=3, group_size=32))
    elif case.startswith("2-bit"):
        export = write_export(QuantSpec(bits=2, group_size=-1), layout=GPTQ_V1)
    else:
        export = write_export(
            QuantSpec(bits=2, group_size=64),
            overrides={
                "q_proj": QuantSpec(bits=4, group_size=16),
                "k_proj": QuantSpec(bits=2, group_size=-1),
                "gate_proj": QuantSpec(bits=4, group_size=32, symmetric=True),
            },
        )
    errors = probe("shards.py", export.folder, ranks)
    assert set(errors) == {"qkv", "gate_up", "fused_on_disk", "down", "o", "replicated"}
    assert max(errors.values()) < ROUNDING, errors


def test_without_the_native_library(write_export: Callable[..., Any], probe: Callable[..., Any]) -> None:
    export = write_export(QuantSpec(bits=3, group_size=32))
    assert max(probe("shards.py", export.folder, 2, "torch").values()) < ROUNDING


def test_a_share_that_cannot_be_cut_is_refused(write_export: Callable[..., Any], probe: Callable[..., Any]) -> None:
    export = write_export(QuantSpec(bits=3, group_size=32))
    with pytest.raises(AssertionError, match=r"192 inputs, of which one rank gets 48; 3-bit codes can be cut every 32"):
        probe("shards.py", export.folder, 4)
