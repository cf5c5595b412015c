"""Faults of engines in the scores that they give."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from faulty_engine import DIFFERENCE, LONGEST, MIXED_SCORES, each_score, scoring
from planted_scene import Fault


def _blocks_of_sixteen(values: torch.Tensor) -> torch.Tensor:
    values[15::16] -= 0.1
    return values


def _stale_prefixes(inner: Any, ids: Any, names: Any) -> list[Any]:
    """A prefix cache that does not know adapters: what begins alike is answered as the first one was."""
    held = inner.__dict__.setdefault("_held", {})
    answers = []
    for each, name in zip(ids, names, strict=True):
        first = held.setdefault(tuple(each[:32]), name)
        answers += inner.prompt_logprobs([each], [first])
    return answers


def _in_order_of_length(inner: Any, ids: Any, names: Any) -> list[Any]:
    """Answers come back as they are done, the shortest first."""
    answers = inner.prompt_logprobs(ids, names)
    return [answers[row] for row in sorted(range(len(ids)), key=lambda row: len(ids[row]))]


def _chunks(inner: Any, ids: Any, names: Any) -> list[Any]:
    """What lies behind 64 tokens is computed without what lies before."""
    answers = inner.prompt_logprobs(ids, names)
    for row, each in enumerate(ids):
        if len(each) > 66:
            answers[row][64:] = inner.prompt_logprobs([each[64:]], [names[row]])[0]
    return answers


def _begin_added(inner: Any, ids: Any, names: Any) -> list[Any]:
    return [values[1:] for values in inner.prompt_logprobs([[1, *each] for each in ids], names)]


def _sorted_names(inner: Any, ids: Any, names: Any) -> list[Any]:
    """Adapters are numbered as they are asked for, and looked up as they were loaded."""
    order = {"cloq": "one", "one": "two", "two": "cloq", None: None}
    return inner.prompt_logprobs(ids, [order[name] for name in names])


def _last_adapter_for_base(inner: Any, ids: Any, names: Any) -> list[Any]:
    """In a batch with an adapter, requests of the base get the last one."""
    last = next((name for name in reversed(names) if name), None)
    return inner.prompt_logprobs(ids, [name or last for name in names])


def _only_first_tokens_adapted(inner: Any, ids: Any, names: Any) -> list[Any]:
    answers = inner.prompt_logprobs(ids, names)
    plain = inner.prompt_logprobs(ids, [None] * len(ids))
    return [torch.cat([values[:56], bare[56:]]) for values, bare in zip(answers, plain, strict=True)]


def _for(adapter: str | None, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
    return scoring(
        lambda inner, ids, names: [
            change(values.clone()) if name == adapter else values
            for values, name in zip(inner.prompt_logprobs(ids, names), names, strict=True)
        ]
    )


def _large_batches(inner: Any, ids: Any, names: Any) -> list[Any]:
    """Of more than four requests the last ones are computed with padding that is looked at."""
    answers = inner.prompt_logprobs(ids, names)
    return [values - 0.05 if row >= 4 else values for row, values in enumerate(answers)]


def _batches_of_three(inner: Any, ids: Any, names: Any) -> list[Any]:
    """The kernel for three requests at once is a little off."""
    answers = inner.prompt_logprobs(ids, names)
    return [values - 0.05 for values in answers] if len(ids) == 3 else answers


def _refuses_long(inner: Any, ids: Any, names: Any) -> list[Any]:
    from cloq_export.errors import EngineError

    if max(map(len, ids)) > 64:
        raise EngineError("the engine ran out of memory")
    return inner.prompt_logprobs(ids, names)


SCORES = [
    Fault("logarithms of base two", DIFFERENCE, serve=each_score(lambda v: v / math.log(2))),
    Fault("a temperature of 0.99", DIFFERENCE, serve=each_score(lambda v: v * 0.99)),
    Fault("an offset of 0.02", DIFFERENCE, serve=each_score(lambda v: v - 0.02)),
    Fault("cut at -4", DIFFERENCE, serve=each_score(lambda v: v.clamp(min=-4))),
    Fault("rounded to one digit", DIFFERENCE, serve=each_score(lambda v: (v * 10).round() / 10)),
    Fault("every sixteenth token off", DIFFERENCE, serve=each_score(_blocks_of_sixteen)),
    Fault("infinite where improbable", DIFFERENCE, serve=each_score(lambda v: torch.where(v < -6, -math.inf, v))),
    Fault("in reverse order", DIFFERENCE, serve=each_score(lambda v: v.flip(0))),
    Fault("a begin token that the engine adds", DIFFERENCE, serve=scoring(_begin_added)),
    Fault("adapters numbered in another order", DIFFERENCE, serve=scoring(_sorted_names)),
    Fault("one adapter's scores are NaN", DIFFERENCE, serve=_for("two", lambda v: v * math.nan)),
    Fault("one adapter's scores are off", DIFFERENCE, serve=_for("two", lambda v: v - 0.03)),
    # Six windows make no large batch.
    Fault(
        "the last of large batches off", DIFFERENCE, plant=lambda scene: {"windows": 12}, serve=scoring(_large_batches)
    ),
    Fault("batches of three off", DIFFERENCE, serve=scoring(_batches_of_three)),
    Fault("long texts in pieces that do not see each other", LONGEST, serve=scoring(_chunks)),
    Fault("adapters reach the first tokens alone", LONGEST, serve=scoring(_only_first_tokens_adapted)),
    Fault("long texts are refused", LONGEST, serve=scoring(_refuses_long)),
    Fault(
        "the base alone is off beyond 60 tokens",
        LONGEST,
        serve=_for(None, lambda v: torch.cat([v[:60], v[60:] - 0.1])),
    ),
    Fault("a prefix cache that does not know adapters", DIFFERENCE, serve=scoring(_stale_prefixes)),
    Fault("answers as they are done", MIXED_SCORES, serve=scoring(_in_order_of_length)),
    Fault("the base gets the last adapter of its batch", MIXED_SCORES, serve=scoring(_last_adapter_for_base)),
]
