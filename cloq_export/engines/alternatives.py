"""What may come next in each place of a text: the token that does come, and the most probable others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch


@dataclasses.dataclass(frozen=True)
class Alternatives:
    """Log-probabilities of several tokens in each place of a sequence of n tokens.

    Args:
        tokens: (n - 1, c) int64 on the CPU: the token that does come, then the most probable others, each once.
        logprobs: of them given the tokens before, (n - 1, c) float32 on the CPU.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor

    @classmethod
    def of_logits(cls, logits: torch.Tensor, targets: torch.Tensor, count: int) -> Alternatives:
        """Return the alternatives that logits name.

        Args:
            logits: (n - 1, vocabulary).
            targets: the tokens that come, (n - 1,) int64.
            count: how many others; fewer where the vocabulary is smaller.
        """
        logprobs = torch.log_softmax(logits.to(torch.float32), -1)
        others = logprobs.scatter(1, targets[:, None], -torch.inf)
        tokens = torch.cat([targets[:, None], others.topk(min(count, logits.shape[1] - 1), -1).indices], dim=1)
        return cls(tokens.cpu(), logprobs.gather(1, tokens).cpu())

    @classmethod
    def of_entries(cls, ids: Sequence[int], entries: Sequence[Mapping[int, float]], count: int) -> Alternatives:
        """Return the alternatives that an engine lists for each place.

        Args:
            ids: the sequence, n tokens.
            entries: of the tokens 1 to n - 1, token -> log-probability, the token that comes among them.
            count: how many others are kept; fewer where one place has fewer.
        """
        ordered = [
            [target, *sorted(set(entry) - {target}, key=lambda token: -entry[token])]
            for target, entry in zip(ids[1:], entries, strict=True)
        ]
        width = min([count + 1, *map(len, ordered)])
        tokens = [row[:width] for row in ordered]
        logprobs = [[entry[token] for token in row] for entry, row in zip(entries, tokens, strict=True)]
        shape = (len(entries), width)
        return cls(
            torch.tensor(tokens, dtype=torch.int64).view(shape), torch.tensor(logprobs, dtype=torch.float32).view(shape)
        )

    def looked_up(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what is said of other tokens in the same places.

        Args:
            tokens: (n - 1, c) int64.

        Returns:
            (log-probabilities (n - 1, c) float32, zero where nothing is said; whether something is, bool).
        """
        equal = tokens[:, :, None] == self.tokens[:, None, :]
        # Chosen, not summed with zeros: one NaN must not reach the others of its place.
        place = equal.to(torch.int64).argmax(-1)
        known = equal.any(-1)
        return torch.where(known, self.logprobs.gather(1, place), 0.0), known
