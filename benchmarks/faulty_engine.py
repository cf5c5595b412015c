"""Engines that are wrong in one thing each, made of healthy ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# The gates that miss.
DIFFERENCE, LONGEST, MIXED_SCORES = "logprob_difference_max", "longest_difference_max", "mixed_batch_difference_max"
GAP, MIXED_GAP, LIVE, SCALE = "decode_gap_max", "mixed_decode_gap_max", "live_modules", "scale_error_max"

Scores = Callable[[Any, Any, Any], Any]
Writes = Callable[[Any, Any, Any, int], Any]


class FaultyEngine:
    """A healthy runtime behind two places where something can go wrong.

    Args:
        inner: the healthy runtime.
        scores: (runtime, token ids, adapters) -> log-probabilities.
        writes: (runtime, prompts, adapters, tokens) -> texts.
    """

    def __init__(self, inner: Any, scores: Scores | None = None, writes: Writes | None = None) -> None:
        self._inner, self._scores, self._writes = inner, scores, writes

    def prompt_logprobs(self, token_ids: Any, adapters: Any) -> Any:
        """Return the answers of the runtime, changed."""
        ask = self._scores or (lambda inner, ids, names: inner.prompt_logprobs(ids, names))
        return ask(self._inner, token_ids, adapters)

    def generate(self, token_ids: Any, adapters: Any, max_new_tokens: int) -> Any:
        """Return the texts of the runtime, changed."""
        ask = self._writes or (lambda inner, ids, names, new: inner.generate(ids, names, new))
        return ask(self._inner, token_ids, adapters, max_new_tokens)

    def __getattr__(self, name: str) -> Any:
        """Hand on everything else."""
        return getattr(self._inner, name)


def scoring(change: Scores) -> Callable[[Any], Any]:
    """Change log-probabilities: (runtime, token ids, adapters) -> log-probabilities."""
    return lambda inner: FaultyEngine(inner, scores=change)


def writing(change: Writes) -> Callable[[Any], Any]:
    """Change texts: (runtime, prompts, adapters, tokens) -> texts."""
    return lambda inner: FaultyEngine(inner, writes=change)


def each_score(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
    """Change the log-probabilities of each sequence."""
    return scoring(lambda inner, ids, names: [change(values.clone()) for values in inner.prompt_logprobs(ids, names)])


def each_text(change: Callable[[list[int]], list[int]]) -> Callable[[Any], Any]:
    """Change each text."""
    return writing(lambda inner, ids, names, new: [change(list(text)) for text in inner.generate(ids, names, new)])


def changed_models(change: Callable[[Any, str | None], None]) -> Callable[[Any], Any]:
    """Change the models of the runtime when they are loaded: (model, adapter)."""

    def serve(inner: Any) -> Any:
        load = inner._load_model

        def load_changed(name: str | None) -> Any:
            model = load(name)
            change(model, name)
            return model

        inner._load_model = load_changed
        return inner

    return serve


def named_module(model: Any, ending: str) -> Any:
    """Return the first module whose name ends so."""
    return next(module for name, module in model.named_modules() if name.endswith(ending))
