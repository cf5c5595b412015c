"""How many tokens a model reads at most."""

from __future__ import annotations

from torch import nn


def context_length(model: nn.Module) -> int | None:
    """Return how many tokens a model reads at most, None if its configuration does not say."""
    config = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config  # type: ignore[union-attr]
    limit = getattr(text_config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
