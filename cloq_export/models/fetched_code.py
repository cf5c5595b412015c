"""Configs that would make transformers fetch code and run it, without its being part of the model's folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloq_export.errors import UnsupportedModelError

# transformers takes `owner/name` under such a key for kernels on the hub.
_KEY_END = "_implementation"


def refuse_fetched_code(config: Mapping[str, Any], source: str) -> None:
    """Refuse a config that names kernels on the hub as its implementation of attention or experts.

    Args:
        config: content of config.json.
        source: the file, for the message.

    Raises:
        UnsupportedModelError: it does; the message names the key.
    """
    parts: list[Any] = [config]
    # Without recursion: an untrusted config may be nested to any depth.
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        if not isinstance(part, Mapping):
            continue
        parts += part.values()
        for key, value in part.items():
            if str(key).endswith(_KEY_END):
                names = value.values() if isinstance(value, Mapping) else (value,)
                named = next((name for name in names if isinstance(name, str) and ("/" in name or "|" in name)), None)
                if named is not None:
                    raise UnsupportedModelError(
                        f"{source} sets {str(key)[:40]} to {named[:80]!r}, which transformers would fetch from the hub "
                        "and run; no code of a model is run. Take that line out of the file."
                    )
