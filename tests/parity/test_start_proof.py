"""What a server's default adapter is held against before the port opens, with servers wrong in one way each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from cloq_export.artifact.probe_record import ProbeRecord
from cloq_export.engines.held_adapters import HeldAdapter
from cloq_export.errors import GateMissedError
from cloq_export.parity.start_proof import DefaultAnswer, prove_default
from cloq_export.types import LoraPair

GENERATOR = torch.Generator().manual_seed(0)
IDS = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 8, 7, 6]]
BASE = [-3 * torch.rand(len(ids) - 1, generator=GENERATOR) for ids in IDS]
EFFECT = [torch.randn(len(ids) - 1, generator=GENERATOR) for ids in IDS]
MADE = [base + effect for base, effect in zip(BASE, EFFECT, strict=True)]
PAIRS = {
    name: LoraPair(torch.randn(2, 6, generator=GENERATOR), torch.randn(4, 2, generator=GENERATOR), 4.0)
    for name in ("layer.0", "layer.1")
}
RECORD = ProbeRecord.of(torch.float32, IDS, MADE)
DEFAULT = DefaultAnswer("mine", PAIRS, IDS, RECORD, 1e-3, base_answers=True)


@dataclasses.dataclass
class Server:
    """A server that scores as it is told."""

    scores: Sequence[torch.Tensor]
    pairs: dict[str, LoraPair] | None = None
    base: Sequence[torch.Tensor] | None = None

    def prompt_logprobs(self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None]) -> list[torch.Tensor]:
        assert list(map(list, token_ids)) == IDS
        if adapters[0] is not None:
            return list(self.scores)
        assert self.base is not None, "the base must not be asked"
        return list(self.base)

    def held_adapter(self, name: str) -> HeldAdapter | None:
        assert name == "mine"
        return None if self.pairs is None else HeldAdapter.of_pairs(self.pairs, "bfloat16")


def refuse(server: Server, default: DefaultAnswer = DEFAULT) -> str:
    with pytest.raises(GateMissedError, match=r"^the port was not opened, because .* `skip_proof`\.$") as caught:
        prove_default(server, default)
    return str(caught.value)


def test_what_is_served_as_it_was_made() -> None:
    found = prove_default(Server(MADE, PAIRS, BASE), DEFAULT)
    assert (found.adapter, found.tokens, found.modules) == ("mine", 10, 2)
    assert found.presence is not None
    assert found.presence.presence == pytest.approx(1, abs=1e-5)
    assert found.recorded is not None
    assert found.recorded.mean == pytest.approx(0, abs=1e-6)
    assert found.effect == pytest.approx(float(torch.cat(EFFECT).square().mean().sqrt()), rel=1e-5)
    assert found.to_json()["recorded"]["tokens"] == 10
    assert found.sentence().startswith("proven on 10 tokens before the port opened: the default adapter mine; the")


def test_an_adapter_that_is_ignored_or_has_another_scaling() -> None:
    assert "the adapter mine is ignored: " in refuse(Server(BASE, PAIRS, BASE))
    twice = [base + 2 * effect for base, effect in zip(BASE, EFFECT, strict=True)]
    assert "the adapter mine is distorted: 2 of its effect is served" in refuse(Server(twice, PAIRS, BASE))


def test_a_difference_that_is_no_share_of_the_effect() -> None:
    off = [made + 0.01 for made in MADE]
    assert "differ from those of its making by 0.0" in refuse(Server(off, PAIRS, BASE))
    prove_default(Server(off, PAIRS, BASE), dataclasses.replace(DEFAULT, limit=0.1))


def test_other_weights_than_the_files() -> None:
    other = {**PAIRS, "layer.1": dataclasses.replace(PAIRS["layer.1"], alpha=8.0)}
    assert "holds other weights of the adapter mine than the files, or none, for layer.1" in refuse(
        Server(MADE, other, BASE)
    )
    more = {**PAIRS, "layer.2": PAIRS["layer.0"]}
    assert "for 3 modules, where the files have 2" in refuse(Server(MADE, more, BASE))
    assert "holds no weights of the adapter mine" in refuse(Server(MADE, None, BASE))


def test_without_a_record_the_effect_is_what_shows() -> None:
    default = dataclasses.replace(DEFAULT, recorded=None)
    found = prove_default(Server(MADE, PAIRS, BASE), default)
    assert (found.recorded, found.presence) == (None, None)
    assert "it changes no log-probability of 12 tokens" in refuse(Server(BASE, PAIRS, BASE), default)
    # One that was never trained changes nothing, and that is right.
    zero = {name: dataclasses.replace(pair, lora_B=torch.zeros_like(pair.lora_B)) for name, pair in PAIRS.items()}
    prove_default(Server(BASE, zero, BASE), dataclasses.replace(default, pairs=zero))


def test_a_base_that_needs_its_adapter_is_not_asked() -> None:
    found = prove_default(Server(MADE, PAIRS), dataclasses.replace(DEFAULT, base_answers=False))
    assert found.effect is None
    assert "differ from those of its making" in refuse(
        Server(BASE, PAIRS), dataclasses.replace(DEFAULT, base_answers=False)
    )


def test_what_is_not_finite() -> None:
    nan = [values * float("nan") for values in MADE]
    assert "with the adapter mine log-probabilities are not finite" in refuse(Server(nan, PAIRS, BASE))


def test_the_base_alone() -> None:
    record = ProbeRecord.of(torch.float32, IDS, BASE)
    default = DefaultAnswer(None, {}, IDS, record, 1e-3, base_answers=True)
    found = prove_default(Server([], None, BASE), default)
    assert (found.adapter, found.modules, found.effect) == (None, 0, None)
    assert "the base alone; they differ" in found.sentence()
    assert "with the base log-probabilities differ" in refuse(Server([], None, MADE), default)
