"""A first forward pass of a model, where a config that is wrong shows before any work is done."""

from __future__ import annotations

from typing import Any

import torch

from cloq_export.errors import CloqError, UnsupportedModelError

# What a config counts, and what some classes use only when they compute or write.
_COUNTS = ("num_key_value_heads", "head_dim", "sliding_window")


def require_forward(model: Any, source: str) -> None:
    """Run a few tokens through a model: what a config names wrongly, some classes look up only when they compute.

    Args:
        model: a causal language model in evaluation mode.
        source: what it was read from, for the message.

    Raises:
        UnsupportedModelError: the model cannot compute.
    """
    ids = torch.zeros(1, 8, dtype=torch.int64, device=next(model.parameters()).device)
    config = model.config.get_text_config()
    counts = [name for name in _COUNTS if name != "sliding_window" or _slides(config)]
    try:
        for name in counts:
            value = _count(config, name)
            # Where a class starts with 0, it counts by another name.
            own = getattr(type(config), name, None)
            if value is not None and value != own and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r:.60}")
        with torch.no_grad():
            cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
            options = {} if cache is None else {"past_key_values": cache, "use_cache": True}
            model(input_ids=ids[:, :1], **options).logits  # noqa: B018
    except (MemoryError, torch.OutOfMemoryError, CloqError):
        raise
    except Exception as error:  # transformers may raise anything for a value that it does not know
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UnsupportedModelError(
            f"{source}: {type(model).__name__} cannot compute with its config.json ({reason}); values such "
            "as layer_types and sliding_window must be those that transformers knows. Compare the file with the "
            "original, or update transformers."
        ) from error


def _count(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:  # it differs between layers, and the config is asked for all of them
        return None


def _slides(config: Any) -> bool:
    # Without layers that slide, any number says that there is no window.
    return not isinstance(getattr(config, "sliding_window", None), int) or "sliding_attention" in (
        getattr(config, "layer_types", None) or ["sliding_attention"]
    )
