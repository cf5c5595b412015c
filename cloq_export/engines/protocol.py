"""What a model that an engine serves answers, whichever engine it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch

from cloq_export.engines.alternatives import Alternatives

# vLLM names 20 tokens of each place at most, unless it is started otherwise, and the one that comes may be among them.
MOST_ALTERNATIVES = 19


@dataclasses.dataclass(frozen=True)
class TokenDistributions:
    """What a model says of every token that could stand in each place of one sequence.

    Args:
        logprobs: log p(v | x_1..x_{i-1}), i = 2..n, (n - 1, k) float32.
        token_ids: v, (n - 1, k) int64, the most probable tokens; None where the whole vocabulary is given in its order.
    """

    logprobs: torch.Tensor
    token_ids: torch.Tensor | None = None


class ScoresPrompts(Protocol):
    """A model with its adapters that says how probable tokens are; requests are token ids."""

    def prompt_logprobs(self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None]) -> list[torch.Tensor]:
        """Return log p(x_i | x_1..x_{i-1}), i = 2..n, of each sequence, all requests in one batch.

        Args:
            token_ids: sequences of two or more tokens.
            adapters: for each sequence the name of its adapter, or None for the base alone.

        Returns:
            list: one (n - 1,) float32 tensor on the CPU per sequence.
        """


class ServedModel(ScoresPrompts, Protocol):
    """A model with its adapters as a runtime serves it; requests are token ids, so no tokenizer comes between."""

    def token_distributions(
        self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None]
    ) -> list[TokenDistributions]:
        """Return the log-probabilities of all tokens, or of as many as the runtime gives, in each place.

        Args:
            token_ids: sequences of two or more tokens.
            adapters: as in `prompt_logprobs`.

        Returns:
            list: one for each sequence, on the CPU.
        """

    def alternative_logprobs(
        self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None], count: int
    ) -> list[Alternatives]:
        """Return what `prompt_logprobs` does, and in each place the most probable other tokens.

        Args:
            token_ids: as in `prompt_logprobs`.
            adapters: as in `prompt_logprobs`.
            count: how many others, `MOST_ALTERNATIVES` at most.

        Returns:
            list: one for each sequence.
        """

    def generate(
        self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None], max_new_tokens: int
    ) -> list[list[int]]:
        """Return the most probable continuation of each prompt, token by token, without the prompt.

        Args:
            token_ids: prompts of one or more tokens.
            adapters: as in `prompt_logprobs`.
            max_new_tokens: where a continuation is cut that has not ended by itself.

        Returns:
            list: token ids for each prompt.
        """

    def close(self) -> None:
        """Let go of memory and processes."""
