"""Does a server compute with its default adapter? Asked before it answers anybody else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from cloq_export.artifact.probe_record import ProbeRecord
from cloq_export.engines.held_adapters import HeldAdapter
from cloq_export.engines.protocol import ScoresPrompts
from cloq_export.errors import GateMissedError
from cloq_export.parity.liveness import DISTORTED, IGNORED, Presence, measure_presence, zero_products
from cloq_export.parity.numerics import measure_logprobs
from cloq_export.parity.plain import Result
from cloq_export.parity.provenance import ProbeDifferences, join_some, probe_differences
from cloq_export.types import LoraPair


class Provable(ScoresPrompts, Protocol):
    """A server that scores prompts and tells which weights it holds."""

    def held_adapter(self, name: str) -> HeldAdapter | None:
        """Return what is held of an adapter; None before its first request.

        Args:
            name: of the adapter.
        """


@dataclasses.dataclass(frozen=True)
class DefaultAnswer:
    """What plain requests are to be answered with, as its files say.

    Args:
        adapter: its name; None is the base alone.
        pairs: of the adapter; empty for the base.
        token_ids: probes of two or more tokens.
        recorded: log-probabilities on these from when it was made; None if nothing recorded them.
        limit: of the mean difference from these, in nats.
        base_answers: the base may be asked without the adapter.
    """

    adapter: str | None
    pairs: Mapping[str, LoraPair]
    token_ids: Sequence[Sequence[int]]
    recorded: ProbeRecord | None
    limit: float
    base_answers: bool


@dataclasses.dataclass(frozen=True)
class StartProof(Result):
    """What was found of the default adapter before the port was opened.

    Args:
        adapter: its name; None is the base alone.
        tokens: that were scored.
        modules: whose A and B the engine holds as the files do, bit for bit in its precision.
        effect: root mean square of what the adapter changes of a log-probability, in nats; None where the base is not
            asked.
        presence: share of the recorded effect that is served; None without a record or without the base.
        recorded: differences from what was recorded when it was made; None if nothing was.
    """

    adapter: str | None
    tokens: int
    modules: int
    effect: float | None
    presence: Presence | None
    recorded: ProbeDifferences | None

    def sentence(self) -> str:
        """Return one line for people."""
        parts = []
        if self.adapter is not None:
            parts.append(f"the engine holds A and B of its {self.modules} modules as the files do")
        if self.effect is not None:
            parts.append(f"it moves log-probabilities by {self.effect:.2g} nats (root mean square)")
        if self.recorded is not None:
            parts.append(f"they differ from those of its making by {self.recorded.mean:.2g} nats in the mean")
        what = "the base alone" if self.adapter is None else f"the default adapter {self.adapter}"
        return f"proven on {self.tokens} tokens before the port opened: {what}" + "".join(f"; {part}" for part in parts)


def prove_default(served: Provable, default: DefaultAnswer) -> StartProof:
    """Ask a server whether it computes with what its files say.

    Args:
        served: the server.
        default: what plain requests are to be answered with.

    Returns:
        StartProof: what was found, all of it as it should be.

    Raises:
        GateMissedError: it holds or computes something else; the message says what.
        EngineError: it does not answer.
    """
    ids, name = default.token_ids, default.adapter
    scores = measure_logprobs(served, ids, [name] * len(ids))
    what = "the base" if name is None else f"the adapter {name}"
    if not all(bool(torch.isfinite(values).all()) for values in scores):
        raise _missed(f"with {what} log-probabilities are not finite")
    if name is not None:
        # After its first request: engines read an adapter when it is first used.
        _compare_weights(name, default.pairs, served.held_adapter(name))
    is_zero = bool(default.pairs) and len(zero_products(default.pairs)) == len(default.pairs)
    effect, presence = None, None
    if name is not None and default.base_answers:
        alone = measure_logprobs(served, ids, [None] * len(ids))
        effect = float((torch.cat(scores) - torch.cat(alone)).square().mean().sqrt())
        if default.recorded is not None:
            made = [torch.tensor(values) for values in default.recorded.logprobs]
            zero = frozenset([name]) if is_zero else frozenset()
            presence = measure_presence(scores, made, {name: alone}, zero=zero)[0]
            if presence.verdict in (IGNORED, DISTORTED):
                raise _missed(
                    f"{what} is {presence.verdict}: {presence.presence:.2g} of its effect is served, where 1 is all"
                )
        elif effect == 0 and not is_zero:
            raise _missed(f"{what} is ignored: it changes no log-probability of {sum(map(len, ids))} tokens")
    recorded = None
    if default.recorded is not None:
        recorded = probe_differences(name, default.recorded, scores)
        if recorded.mean is None or recorded.mean > default.limit:
            raise _missed(
                f"with {what} log-probabilities differ from those of its making by {recorded.mean} nats in the mean, "
                f"{default.limit:g} is allowed"
            )
    return StartProof(name, sum(len(each) - 1 for each in ids), len(default.pairs), effect, presence, recorded)


def _compare_weights(name: str, pairs: Mapping[str, LoraPair], held: HeldAdapter | None) -> None:
    if held is None:
        raise _missed(f"the engine holds no weights of the adapter {name}")
    wrong = HeldAdapter.of_pairs(pairs, held.dtype).differing(held)
    if wrong or len(held.modules) != len(pairs):
        named = join_some(wrong) if wrong else f"{len(held.modules)} modules, where the files have {len(pairs)}"
        raise _missed(f"the engine holds other weights of the adapter {name} than the files, or none, for {named}")


def _missed(found: str) -> GateMissedError:
    return GateMissedError(
        f"the port was not opened, because {found}; see what `cloq verify` says of it, or start with `skip_proof`."
    )
