"""Whether every module of every adapter reaches the served logits, seen from outside the engine.

With `r` the reference's log-probabilities of an adapter, `r_m` the same with the pair of module m left out, and `s`
what is served, `d = r - r_m` is what the module does, and `e = s - r` the error of serving. An engine that ignores the
module serves `r_m`, so that `e = -d`. The module's presence is the least-squares share of d in what is served,

    c = <s - r_m, d> / <d, d> = 1 + <e, d> / <d, d>,

about 1 where the pair works and about 0 where it is ignored, with the standard error
`|e - (c - 1) d| / (|d| sqrt(n - 1))` over n tokens. Nothing is asked of the engine but log-probabilities, and one
request shows all modules of an adapter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cloq_export.engines.protocol import ServedModel
from cloq_export.engines.transformers.reference import ReferenceModel
from cloq_export.parity.numerics import measure_logprobs
from cloq_export.parity.plain import Result
from cloq_export.types import LoraPair

# A module is live if its presence lies in this range, known to this standard error: ignored (0) and served (1) are
# then both five errors away from the bound between them.
PRESENCE = (0.5, 1.5)
LARGEST_ERROR = 0.1
# A module whose own effect is lost in the engine's rounding is shown again with its product enlarged, at most so much.
LARGEST_GAIN = 64.0
_WANTED_ERROR = LARGEST_ERROR / 3

Verdict = str
LIVE, IGNORED, DISTORTED, UNDECIDED, ZERO = "live", "ignored", "distorted", "undecided", "zero"


@dataclasses.dataclass(frozen=True)
class Presence(Result):
    """What was found of one module.

    Args:
        module: full name.
        verdict: "live", "ignored", "distorted" (served with another scaling), "undecided" (its effect is lost in the
            error of serving) or "zero" (its product is zero, so that nothing can be seen of it and nothing is lost).
        presence: c; None where the module has no effect on the probe.
        error: standard error of c.
        effect: root mean square of d over the tokens, in nats.
        gain: by what the product was enlarged for this measurement; 1 is the adapter as it is.
    """

    module: str
    verdict: Verdict
    presence: float | None
    error: float | None
    effect: float
    gain: float = 1.0


@dataclasses.dataclass(frozen=True)
class AdapterLiveness(Result):
    """What was found of the modules of one adapter.

    Args:
        adapter: its name.
        sequences: of the probe.
        tokens: of the probe.
        live_share: share of modules that are shown to be live; None if there is nothing to show.
        modules: what was found of each.
    """

    adapter: str
    sequences: int
    tokens: int
    live_share: float | None
    modules: tuple[Presence, ...]


def measure_presence(
    served: Sequence[torch.Tensor],
    reference: Sequence[torch.Tensor],
    without: Mapping[str, Sequence[torch.Tensor]],
    *,
    gains: Mapping[str, float] | None = None,
    zero: frozenset[str] = frozenset(),
) -> list[Presence]:
    """Judge modules from log-probabilities on the same tokens.

    Args:
        served: of the engine, one (n,) tensor per sequence.
        reference: r, same shapes.
        without: module -> r_m, same shapes.
        gains: module -> by what its product was enlarged, to be noted.
        zero: modules whose product is zero.

    Returns:
        list: one for each module.
    """
    r = torch.cat([values.to(torch.float64) for values in reference])
    e = torch.cat([values.to(torch.float64) for values in served]) - r
    presences = []
    for module, sequences in without.items():
        d = r - torch.cat([values.to(torch.float64) for values in sequences])
        presences.append(_judge(module, e, d, (gains or {}).get(module, 1.0), is_zero=module in zero))
    return presences


def left_out(
    reference: ReferenceModel, token_ids: Sequence[Sequence[int]], adapter: str, modules: Sequence[str]
) -> dict[str, list[torch.Tensor]]:
    """Return, for each module, the reference's log-probabilities with its pair left out.

    Args:
        reference: the reference with the adapter.
        token_ids: sequences.
        adapter: name of the adapter.
        modules: full names.
    """
    tables = [reference.logprobs_without(ids, adapter, modules) for ids in token_ids]
    return {module: [table[row] for table in tables] for row, module in enumerate(modules)}


def served_presence(
    served: ServedModel,
    token_ids: Sequence[Sequence[int]],
    adapter: str,
    reference: Sequence[torch.Tensor],
    without: Mapping[str, Sequence[torch.Tensor]],
    **options: Any,
) -> list[Presence]:
    """Ask an engine for an adapter's log-probabilities and judge its modules; see `measure_presence`."""
    return measure_presence(
        measure_logprobs(served, token_ids, [adapter] * len(token_ids)), reference, without, **options
    )


def zero_products(pairs: Mapping[str, LoraPair]) -> frozenset[str]:
    """Return the modules whose product `B A` is zero, such as those of an adapter that was never trained."""
    return frozenset(
        module
        for module, pair in pairs.items()
        if not bool(pair.lora_B.any()) or not bool(pair.lora_A.any()) or not bool(pair.product().any())
    )


def enlarged_pairs(
    pairs: Mapping[str, LoraPair], undecided: Sequence[Presence]
) -> tuple[dict[str, LoraPair], dict[str, float]]:
    """Return an adapter in which undecided modules are enlarged until their effect stands out.

    Args:
        pairs: the adapter.
        undecided: what was found of its undecided modules.

    Returns:
        (pairs, gains): all modules, those that are undecided with B multiplied by their gain.
    """
    gains = {}
    for presence in undecided:
        error = presence.error
        wanted = LARGEST_GAIN if error is None or not math.isfinite(error) else error / _WANTED_ERROR
        # A power of two changes no digit of B.
        gains[presence.module] = float(2 ** math.ceil(math.log2(min(max(wanted, 2.0), LARGEST_GAIN))))
    made = {
        module: dataclasses.replace(pair, lora_B=pair.lora_B * gains[module]) if module in gains else pair
        for module, pair in pairs.items()
    }
    return made, gains


def merged_findings(first: Sequence[Presence], again: Sequence[Presence]) -> list[Presence]:
    """Return findings with those of a second measurement in the place of the first one's."""
    newer = {presence.module: presence for presence in again}
    return [newer.get(presence.module, presence) for presence in first]


def live_share(found: Sequence[Presence]) -> float | None:
    """Return the share of modules that are shown to be live, those of zero product left out; None if none is left."""
    shown = [presence for presence in found if presence.verdict != ZERO]
    return sum(presence.verdict == LIVE for presence in shown) / len(shown) if shown else None


def _judge(module: str, e: torch.Tensor, d: torch.Tensor, gain: float, *, is_zero: bool) -> Presence:
    n = d.numel()
    size = float(d.norm())
    effect = size / math.sqrt(n) if n else 0.0
    if is_zero:
        return Presence(module, ZERO, None, None, effect, gain)
    if n < 2 or not size or not math.isfinite(size) or not bool(torch.isfinite(e).all()):
        return Presence(module, UNDECIDED, None, None, effect, gain)
    share = float(e @ d) / size**2
    error = float((e - share * d).norm()) / (size * math.sqrt(n - 1))
    presence = 1 + share
    if error > LARGEST_ERROR:
        verdict = UNDECIDED
    else:
        verdict = IGNORED if presence < PRESENCE[0] else DISTORTED if presence > PRESENCE[1] else LIVE
    return Presence(module, verdict, presence, error, effect, gain)
