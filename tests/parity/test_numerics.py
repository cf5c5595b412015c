"""Differences of log-probabilities against numpy, and near-ties told from wrong tokens."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from cloq_export.errors import ShapeError
from cloq_export.parity.generation import AskedTexts
from cloq_export.parity.numerics import (
    GreedyTexts,
    compare_greedy,
    compare_logprobs,
    largest_difference,
    measure_logprobs,
)


def test_figures_are_those_of_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    a = [torch.randn(n, generator=generator) for n in (400, 301)]
    b = [values + 1e-3 * torch.randn(len(values), generator=generator) for values in a]
    found = compare_logprobs(a, b)
    apart = np.abs(np.concatenate([(x.double() - y.double()).numpy() for x, y in zip(a, b, strict=True)]))
    assert found.tokens == 701
    assert found.max == apart.max()
    assert found.mean == pytest.approx(apart.mean(), rel=1e-12)
    for share, value in found.quantiles.items():
        assert value == np.quantile(apart, float(share), method="inverted_cdf")
    edges = [-np.inf, *found.histogram.edges, np.inf]
    assert found.histogram.counts == tuple(
        int(((apart >= low) & (apart < high)).sum()) for low, high in itertools.pairwise(edges)
    )
    assert sum(found.histogram.counts) == 701


def test_equal_figures_differ_by_nothing() -> None:
    a = [torch.randn(5)]
    assert largest_difference(a, a) == 0.0
    assert compare_logprobs(a, a).histogram.counts[0] == 5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_measured(bad: float) -> None:
    a, b = torch.zeros(4), torch.zeros(4)
    b[2] = bad
    found = compare_logprobs([a], [b])
    assert found.max is found.mean is found.histogram is None
    assert set(found.quantiles.values()) == {None}
    assert largest_difference([], []) is None


class Scripted:
    """A runtime that answers what it was told to."""

    def __init__(self, logprobs: Any = None, texts: Any = None, table: Any = None) -> None:
        self.logprobs, self.texts, self.table = logprobs, texts, table or {}

    def prompt_logprobs(self, token_ids: Any, adapters: Any) -> Any:
        if self.logprobs is not None:
            return self.logprobs
        return [torch.tensor([0.0] * (len(ids) - 2) + [self.table[ids[-1]]]) for ids in token_ids]

    def generate(self, token_ids: Any, adapters: Any, max_new_tokens: int) -> Any:
        return self.texts

    def close(self) -> None: ...


def test_a_runtime_that_drops_answers_is_told_so() -> None:
    with pytest.raises(ShapeError, match="answered 1 of 2 sequences"):
        measure_logprobs(Scripted([torch.zeros(2)]), [[1, 2, 3], [4, 5]], [None, None])
    with pytest.raises(
        ShapeError, match=r"gave \(3,\) log-probabilities for a sequence of 3 tokens; \(2,\) are needed"
    ):
        measure_logprobs(Scripted([torch.zeros(3)]), [[1, 2, 3]], [None])


def greedy(expected: Any, served: Any) -> GreedyTexts:
    # log-probabilities of tokens 5, 6, 7 and of the end, 2
    reference = Scripted(table={5: -1.0, 6: -1.0005, 7: -3.0, 2: -1.0002, 9: -4.0})
    asked = AskedTexts([[1, 1]] * len(served), None, 3, frozenset([2, 9]))
    return compare_greedy(reference, asked, expected, served, 1e-3)


def test_near_ties_are_told_from_flips() -> None:
    found = greedy([[5, 5, 2]] * 5, [[5, 5, 2], [5, 5], [5, 6, 7], [5, 7, 7], [5]])
    assert found.agreement == 2 / 5  # an end is not compared: some runtimes give it, some do not
    assert (found.ties, found.flips) == (2, 1)  # 6 and the end are as good as 5
    first = found.first_flip
    assert (first.prompt, first.position, first.expected, first.served) == (3, 1, 5, 7)
    assert first.gap == pytest.approx(2.0)


def test_a_text_that_does_not_end_where_it_should() -> None:
    found = greedy([[7, 2]], [[7, 5, 5]])
    assert (found.ties, found.flips) == (1, 0)
    assert greedy([[7, 2]], [[7, 7, 5]]).first_flip.expected is None


def test_lost_prompts() -> None:
    with pytest.raises(ShapeError, match="continued 1 of 2 prompts"):
        compare_greedy(Scripted(), AskedTexts([[1], [1]], None, 1, frozenset()), [[5], [5]], [[5]], 0.0)
