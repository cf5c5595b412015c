"""The most probable tokens that vLLM lists in each place, as a served model answers with them."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TypeAlias

import torch

from cloq_export.engines.alternatives import Alternatives
from cloq_export.engines.protocol import MOST_ALTERNATIVES, TokenDistributions

# Tokens whose log-probabilities vLLM gives in each place unless `max_logprobs` is raised.
MOST_PROBABLE = MOST_ALTERNATIVES + 1

ListedTokens: TypeAlias = Sequence[tuple[int, float]]
"""Tokens of one place with their log-probabilities: the most probable ones, and the one that comes."""


class ListsTokens(abc.ABC):
    """A model that vLLM serves."""

    def token_distributions(
        self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None]
    ) -> list[TokenDistributions]:
        """Return the log-probabilities of the most probable tokens in each place, as many as vLLM gives unless told.

        Args:
            token_ids: as in `prompt_logprobs`.
            adapters: as in `prompt_logprobs`.

        Raises:
            UsageError: as `prompt_logprobs`.
            EngineError: as `prompt_logprobs`.
        """
        return [_most_probable(places) for places in self._listed(token_ids, adapters, MOST_PROBABLE)]

    def alternative_logprobs(
        self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None], count: int
    ) -> list[Alternatives]:
        """Return log-probabilities of the next token and of the most probable others; see `ServedModel`.

        Raises:
            UsageError: as `prompt_logprobs`.
            EngineError: as `prompt_logprobs`.
        """
        listed = self._listed(token_ids, adapters, count + 1)
        return [
            Alternatives.of_entries(ids, [dict(place) for place in places], count)
            for ids, places in zip(token_ids, listed, strict=True)
        ]

    @abc.abstractmethod
    def _listed(
        self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None], count: int
    ) -> list[list[ListedTokens]]:
        """Return so many tokens of each place behind the first, for each sequence; one more where another comes."""


def _most_probable(places: Sequence[ListedTokens]) -> TokenDistributions:
    best = [sorted(place, key=lambda entry: entry[1], reverse=True) for place in places]
    # The token that comes is one more where it is less probable than all others.
    count = min(MOST_PROBABLE, *map(len, best))
    return TokenDistributions(
        torch.tensor([[value for _, value in place[:count]] for place in best], dtype=torch.float32),
        torch.tensor([[token for token, _ in place[:count]] for place in best], dtype=torch.int64),
    )
