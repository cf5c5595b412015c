"""Whether a request gets the same answer in a mixed batch of base and adapters as it gets alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cloq_export.engines.protocol import ServedModel
from cloq_export.parity.numerics import compare_logprobs, measure_logprobs


def measure_isolation(
    served: ServedModel, token_ids: Sequence[Sequence[int]], adapters: Sequence[str]
) -> dict[str, Any]:
    """Compare the answers of a mixed batch with those of single requests.

    The batch holds every sequence once with the base and once with each adapter, so that neighbours differ, in two
    orders: what a request finds beside itself must not matter.

    Args:
        served: the runtime.
        token_ids: sequences of two or more tokens.
        adapters: names of all adapters.

    Returns:
        dict: "requests" (of one batch), "max" (over both orders), and "by_adapter": list of {"adapter" (None is the
        base), "max", "mean"}.
    """
    names: list[str | None] = [None, *adapters]
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
        rows.append({"adapter": name, "max": difference["max"], "mean": difference["mean"]})
    known = [row["max"] for row in rows if row["max"] is not None]
    return {"requests": len(requests), "max": max(known) if len(known) == len(rows) else None, "by_adapter": rows}
