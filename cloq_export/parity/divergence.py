"""How far the distribution of the next token is from another model's: KL divergence, and whether the best token is one.

With p the model that is the yardstick and q the one in question, each token has

    KL(p || q) = sum_v p(v) log(p(v) / q(v)),  in nats.

An engine that gives its k most probable tokens alone leaves q unknown elsewhere. Then all other tokens count as one:

    KL(p || q) >= sum_{v in S} p(v) log(p(v) / q(v)) + p(rest) log(p(rest) / q(rest)),

S the tokens that it gave, because no merging of outcomes increases a divergence (data processing inequality; Cover and
Thomas, Elements of Information Theory, 2006, section 2.8). That is a lower bound, and is called so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

from cloq_export.engines.protocol import TokenDistributions
from cloq_export.errors import ShapeError
from cloq_export.parity.plain import Result

EXACT, LOWER_BOUND = "exact", "lower bound"
QUANTILE = 0.99
# Tokens that are enough for the quantile, and log-probabilities of a yardstick that may wait in memory (half a
# gigabyte), whatever the vocabulary.
_TOKENS = 2048
_KEPT = 1 << 27
# What lies outside of k tokens is a difference of numbers near 1, of which float32 gives so much. A larger q(rest)
# makes the bound smaller.
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class Divergence(Result):
    """How far the distributions of one model are from another's; None where one is NaN.

    Args:
        tokens: places that were compared.
        estimate: "exact", or "lower bound" where the engine gives its most probable tokens alone.
        known_tokens: of the vocabulary that the engine gave in each place.
        kl_mean: mean KL divergence per token, in nats.
        kl_quantile_99: smallest divergence that 99 % of the tokens do not exceed.
        kl_max: the largest.
        top1_agreement: share of the places in which both have the same most probable token.
    """

    tokens: int
    estimate: str
    known_tokens: int
    kl_mean: float | None
    kl_quantile_99: float | None
    kl_max: float | None
    top1_agreement: float


@dataclasses.dataclass(frozen=True)
class PlaceDivergences:
    """What one sequence, or several, give: KL of each place, (n,) float64, and whether the best token is the same."""

    kl: torch.Tensor
    same_best: torch.Tensor
    known: int
    exact: bool


def windows_compared(windows: Sequence[Sequence[int]], vocabulary: int) -> Sequence[Sequence[int]]:
    """Return the windows on which whole distributions are compared: the first ones, at least one.

    Args:
        windows: all equally long.
        vocabulary: how many tokens there are.
    """
    return windows[: count_compared(len(windows[0]), vocabulary)] if windows else windows


def count_compared(window: int, vocabulary: int) -> int:
    """Return how many windows of a length are compared at most."""
    return max(1, min(-(-_TOKENS // window), _KEPT // (window * vocabulary)))


def next_logprobs(distribution: torch.Tensor, token_ids: Sequence[int]) -> torch.Tensor:
    """Return log p(x_i | x_1..x_{i-1}), i = 2..n, (n - 1,) float32, of tokens whose whole distributions are known.

    Args:
        distribution: log-probabilities of the whole vocabulary in each place, (n - 1, vocabulary) float32.
        token_ids: the n tokens.
    """
    return distribution.gather(1, torch.tensor(token_ids[1:]).view(-1, 1))[:, 0]


def divergences(expected: torch.Tensor, measured: TokenDistributions) -> PlaceDivergences:
    """Return KL(p || q) in each place of one sequence, or its lower bound; see above.

    Args:
        expected: log p, (n, vocabulary) float32.
        measured: log q of all tokens or of some.

    Raises:
        ShapeError: the two are of another number of places, or of another vocabulary.
    """
    ids, log_q = measured.token_ids, measured.logprobs
    if log_q.shape[0] != expected.shape[0] or (ids is None and log_q.shape != expected.shape):
        raise ShapeError(
            f"distributions of {tuple(log_q.shape)} and {tuple(expected.shape)} (places, tokens) cannot be compared; "
            "measure both models on the same tokens, with the same vocabulary."
        )
    best = expected.argmax(-1)
    if ids is None:
        kl = torch.stack([_divergence(p, q) for p, q in zip(expected, log_q, strict=True)])
        return PlaceDivergences(kl, best == log_q.argmax(-1), log_q.shape[1], exact=True)
    log_p = expected.gather(1, ids).to(torch.float64)
    log_q = log_q.to(torch.float64)
    rest_p = (1 - log_p.exp().sum(-1)).clamp(min=1e-12)
    rest_q = (1 - log_q.exp().sum(-1)).clamp(min=0) + _ROUNDING
    inside = (log_p.exp() * (log_p - log_q)).sum(-1)
    kl = (inside + rest_p * (rest_p / rest_q).log()).clamp(min=0)
    own_best = ids.gather(1, log_q.argmax(-1, keepdim=True))[:, 0]
    return PlaceDivergences(kl, best == own_best, ids.shape[1], exact=False)


def summarize_divergences(places: Sequence[PlaceDivergences]) -> Divergence:
    """Return what the divergences of several sequences amount to.

    Args:
        places: at least one.
    """
    kl = torch.cat([each.kl for each in places])
    same = torch.cat([each.same_best for each in places])
    exact, known = all(each.exact for each in places), min(each.known for each in places)
    mean = quantile = largest = None
    if bool(torch.isfinite(kl).all()):
        ordered = kl.sort().values
        mean, largest = float(kl.mean()), float(ordered[-1])
        quantile = float(ordered[math.ceil(QUANTILE * len(ordered)) - 1])
    share = float(same.to(torch.float64).mean())
    return Divergence(len(kl), EXACT if exact else LOWER_BOUND, known, mean, quantile, largest, share)


def mean_probability_factor(measured: torch.Tensor, expected: torch.Tensor) -> float | None:
    """Return by what factor the probability of a token is off in the mean, `mean exp(|log q - log p|)`.

    NeMo-RL's `token_mult_prob_error` (NVIDIA NeMo-RL, "Add New Models"); 1 is perfect.

    Args:
        measured: log q of the tokens that stand there, (n,).
        expected: log p of them, (n,).

    Returns:
        float: None if one is NaN or Inf, or if there is none.
    """
    factor = float((measured.to(torch.float64) - expected.to(torch.float64)).abs().exp().mean())
    return factor if math.isfinite(factor) else None


Watch = Callable[[int, torch.Tensor, torch.Tensor], None]


class WatchedDivergences:
    """Distributions of several models on the same first windows, compared with those of one that comes first.

    Args:
        yardstick: name of the model that the others are compared with.
    """

    def __init__(self, yardstick: str) -> None:
        self._yardstick = yardstick
        self._kept: dict[int, torch.Tensor] = {}
        self._places: dict[str, list[PlaceDivergences]] = {}
        self._tokens: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def watch(self, name: str) -> Watch:
        """Return what is to be called with each window's number, logits (n, vocabulary) and next tokens (n,)."""

        def note(number: int, logits: torch.Tensor, targets: torch.Tensor) -> None:
            if number >= count_compared(*logits.shape) or (name != self._yardstick and number not in self._kept):
                return
            logprobs = logits.to(torch.float32).log_softmax(-1).cpu()
            if name == self._yardstick:
                self._kept[number] = logprobs
                return
            expected, at = self._kept[number], targets.cpu().view(-1, 1)
            self._places.setdefault(name, []).append(divergences(expected, TokenDistributions(logprobs)))
            self._tokens.setdefault(name, []).append((logprobs.gather(1, at)[:, 0], expected.gather(1, at)[:, 0]))

        return note

    def of(self, name: str) -> tuple[Divergence, float | None] | None:
        """Return a model's divergence and `mean_probability_factor`; None where there was nothing to compare with."""
        if name not in self._places:
            return None
        measured, expected = (torch.cat(parts) for parts in zip(*self._tokens[name], strict=True))
        return summarize_divergences(self._places[name]), mean_probability_factor(measured, expected)


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Return the divergence of two whole distributions, (vocabulary,) each, as a sum of terms that are not negative.

    `p log(p / q) - p + q` sums to the same where both sum to 1, and rounding in float32 cannot make it negative.
    """
    log_p, log_q = log_p.to(torch.float64), log_q.to(torch.float64)
    p = log_p.exp()
    # What has no probability at all adds nothing to the sum of the one, and its q to the other.
    terms = torch.where(p > 0, p * (log_p - log_q) - p, torch.zeros_like(p)) + log_q.exp()
    return terms.sum().clamp(min=0)
