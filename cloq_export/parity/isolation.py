"""Whether a request gets the same answer in a mixed batch of base and adapters as it gets alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from cloq_export.engines.protocol import ServedModel
from cloq_export.parity.numerics import compare_logprobs, measure_logprobs
from cloq_export.parity.plain import Result


@dataclasses.dataclass(frozen=True)
class AdapterIsolation(Result):
    """Differences of one adapter's answers between a mixed batch and single requests; None is the base."""

    adapter: str | None
    max: float | None
    mean: float | None


@dataclasses.dataclass(frozen=True)
class Isolation(Result):
    """Differences of answers between mixed batches and single requests.

    Args:
        requests: of one batch.
        max: the largest, over both orders.
        by_adapter: of the base and each adapter.
    """

    requests: int
    max: float | None
    by_adapter: tuple[AdapterIsolation, ...]


def measure_isolation(
    served: ServedModel, token_ids: Sequence[Sequence[int]], names: Sequence[str | None]
) -> Isolation:
    """Compare the answers of a mixed batch with those of single requests.

    The batch holds every sequence once with each name, so that neighbours differ, in two orders: what a request finds
    beside itself must not matter.

    Args:
        served: the runtime.
        token_ids: sequences of two or more tokens.
        names: of all adapters, and None for the base.
    """
    requests = [(ids, name) for ids in token_ids for name in names]
    alone = [measure_logprobs(served, [ids], [name])[0] for ids, name in requests]
    mixed: list[list[torch.Tensor]] = []
    for order in (list(range(len(requests))), list(range(len(requests)))[::-1]):
        answered = measure_logprobs(served, [requests[i][0] for i in order], [requests[i][1] for i in order])
        back = dict(zip(order, answered, strict=True))
        mixed.append([back[i] for i in range(len(requests))])
    rows = []
    for name in names:
        chosen = [i for i, (_, own) in enumerate(requests) if own == name]
        difference = compare_logprobs(
            [batch[i] for batch in mixed for i in chosen], [alone[i] for _ in mixed for i in chosen]
        )
        rows.append(AdapterIsolation(name, difference.max, difference.mean))
    known = [row.max for row in rows if row.max is not None]
    return Isolation(len(requests), max(known) if len(known) == len(rows) else None, tuple(rows))
