"""Configs that say two things about rotary embeddings, of which each reader takes one.

transformers 5 keeps everything in `rope_parameters`. Where `rope_scaling`, the older word, stands beside it (people put
it in by hand to read longer texts), transformers takes `rope_scaling` alone and forgets even the base of the
frequencies; where `rope_theta` does, it takes `rope_parameters`. Other readers do otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cloq_export.errors import FormatError

_PARAMETERS, _SCALING, _BASE = "rope_parameters", "rope_scaling", "rope_theta"


def refuse_two_ropes(config: Mapping[str, Any], source: str) -> None:
    """Refuse a config whose `rope_parameters` are not what its `rope_scaling` and `rope_theta` say.

    Args:
        config: content of config.json.
        source: the file, for the message.

    Raises:
        FormatError: they differ; the message names both.
    """
    for part in _parts(config):
        parameters = part.get(_PARAMETERS)
        if not isinstance(parameters, Mapping) or not parameters:
            continue
        # One mapping, or one for each kind of layer.
        nested = [value for value in parameters.values() if isinstance(value, Mapping)]
        said = [_plain(each) for each in nested or [parameters]]
        base, scaling = part.get(_BASE), part.get(_SCALING)
        if isinstance(scaling, Mapping) and scaling:
            whole = _plain({_BASE: base, **scaling} if base is not None else scaling)
            if whole not in said:
                _refuse(_SCALING, {**scaling}, parameters, source)
        elif base is not None and all(each.get(_BASE, base) != base for each in said):
            _refuse(_BASE, base, parameters, source)


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    # Without recursion: an untrusted config may be nested to any depth.
    waiting: list[Any] = [config]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            yield part
            waiting += part.values()


def _plain(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is said of a rope under the newer words, without what is so anyway."""
    words = {"rope_type" if key == "type" else key: value for key, value in said.items() if value is not None}
    return {key: value for key, value in words.items() if (key, value) != ("rope_type", "default")}


def _refuse(word: str, value: Any, parameters: Mapping[str, Any], source: str) -> None:
    raise FormatError(
        f"{source} says {word} = {value!s:.120} beside {_PARAMETERS} = {dict(parameters)!s:.160}, and readers differ "
        f"in which they take. Write all of it into {_PARAMETERS}, and take {word} out."
    )
