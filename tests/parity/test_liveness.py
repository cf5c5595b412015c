"""Presence of modules, on log-probabilities that are made up so that the truth is known."""

from __future__ import annotations

import math

import pytest
import torch

from cloq_export.parity import liveness
from cloq_export.parity.liveness import Presence, enlarged_pairs, live_share, measure_presence, merged_findings
from cloq_export.types import LoraPair

TOKENS = 256


def normal(seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(TOKENS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def presence_of(served: torch.Tensor, effect: torch.Tensor, reference: torch.Tensor) -> Presence:
    halves = TOKENS // 2  # two sequences
    (found,) = measure_presence(
        served.split(halves), reference.split(halves), {"m": (reference - effect).split(halves)}
    )
    return found


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0, 1.3, 2.0])
@pytest.mark.parametrize("noise", [1e-7, 1e-2])
def test_the_served_share_of_a_module_is_found_behind_noise(share: float, noise: float) -> None:
    reference, effect = normal(1), normal(2, 0.05)
    found = presence_of(reference - (1 - share) * effect + normal(3, noise), effect, reference)
    assert found.presence == pytest.approx(share, abs=max(1e-4, 4 * float(found.error or 0)))
    wanted = liveness.IGNORED if share < 0.5 else liveness.DISTORTED if share > 1.5 else liveness.LIVE
    assert found.verdict == wanted
    # The root mean square of a sample of the spread 0.05.
    assert found.effect == pytest.approx(0.05, rel=0.2)


def test_the_standard_error_is_that_of_repeated_measurements() -> None:
    reference, effect = normal(1), normal(2, 0.05)
    found = [presence_of(reference + normal(100 + n, 0.05), effect, reference) for n in range(300)]
    spread = torch.tensor([each.presence for each in found], dtype=torch.float64).std()
    # The spread of 300 measurements is known to 4 %, and so is the error of a single one.
    assert float(spread) == pytest.approx(float(found[0].error or 0), rel=0.15)


def test_an_effect_that_noise_hides_is_not_decided() -> None:
    reference, effect = normal(1), normal(2, 1e-3)
    assert presence_of(reference + normal(3, 0.1), effect, reference).verdict == liveness.UNDECIDED


def test_what_cannot_be_seen_is_not_live() -> None:
    reference = normal(1)
    assert presence_of(reference, torch.zeros(TOKENS, dtype=torch.float64), reference).verdict == liveness.UNDECIDED
    assert presence_of(reference * math.nan, normal(2), reference).verdict == liveness.UNDECIDED


def test_an_adapter_that_is_ignored_altogether_shows_no_module() -> None:
    reference = normal(1)
    effects = {f"m{n}": normal(10 + n, 0.05) for n in range(40)}
    served = reference - torch.stack(list(effects.values())).sum(0)
    found = measure_presence([served], [reference], {name: [reference - d] for name, d in effects.items()})
    assert not any(each.verdict == liveness.LIVE for each in found)
    assert live_share(found) == 0


def pair(scale: float) -> LoraPair:
    generator = torch.Generator().manual_seed(5)
    return LoraPair(torch.randn(2, 8, generator=generator).half(), scale * torch.ones(6, 2).half(), 2.0)


def test_zero_products_are_found_and_lose_nothing() -> None:
    pairs = {"a": pair(1.0), "b": pair(0.0)}
    assert liveness.zero_products(pairs) == {"b"}
    found = measure_presence(
        [normal(1)], [normal(1)], {"b": [normal(1)], "a": [normal(1) - normal(2)]}, zero=frozenset("b")
    )
    assert [each.verdict for each in found] == [liveness.ZERO, liveness.LIVE]
    assert live_share(found) == 1
    assert live_share([]) is None


def test_enlarged_pairs_are_exact_multiples() -> None:
    pairs = {"a": pair(0.5), "b": pair(0.5), "c": pair(0.5)}
    undecided = [
        Presence("a", liveness.UNDECIDED, 1.0, 0.3, 1e-3),
        Presence("b", liveness.UNDECIDED, 1.0, 1e9, 1e-9),
    ]
    made, gains = enlarged_pairs(pairs, undecided)
    assert gains == {"a": 16.0, "b": liveness.LARGEST_GAIN}
    for name, gain in gains.items():
        assert torch.equal(made[name].product(), pairs[name].product() * gain)
        assert made[name].lora_B.dtype == torch.float16
    assert made["c"] is pairs["c"]


def test_the_second_measurement_takes_the_place_of_the_first() -> None:
    first = [Presence("a", liveness.LIVE, 1, 0, 1), Presence("b", liveness.UNDECIDED, 1, 9, 1)]
    again = [Presence("b", liveness.IGNORED, 0, 0, 1, 8.0)]
    assert merged_findings(first, again) == [first[0], again[0]]
