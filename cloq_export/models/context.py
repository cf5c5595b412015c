"""How many tokens a model reads at most, and which."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cloq_export.errors import DataError


def context_length(model: nn.Module) -> int | None:
    """Return how many tokens a model reads at most, None if its configuration does not say."""
    config = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config  # type: ignore[union-attr]
    limit = getattr(text_config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def embeddings_of(model: nn.Module) -> nn.Module:
    """Return the token embeddings of a model, or the whole model where it does not say which they are."""
    find: Any = getattr(model, "get_input_embeddings", None)
    return model if find is None else find()


def require_known_tokens(model: nn.Module, token_ids: torch.Tensor, what: str) -> None:
    """Refuse tokens that a model has no embedding for: tokens were added to its tokenizer and not to its weights.

    Args:
        model: a causal language model.
        token_ids: integers, of any shape.
        what: the tokens are, for the message.

    Raises:
        DataError: an id is outside of the vocabulary.
    """
    rows = getattr(embeddings_of(model), "num_embeddings", None)
    if rows is None or not token_ids.numel():
        return
    largest, least = int(token_ids.max()), int(token_ids.min())
    if largest >= rows or least < 0:
        raise DataError(
            f"{what} reach id {largest if largest >= rows else least}, the model's vocabulary has {rows} entries: "
            "tokenizer and model do not belong together. Use the tokenizer that came with the model."
        )
