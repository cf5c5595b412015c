"""Whether a model's head is its embeddings: told by the numbers, and said wherever a config has a word for it."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator, Mapping
from typing import Any

from torch import nn

FLAG = "tie_word_embeddings"


def is_tied(model: Any) -> bool | None:
    """Return whether head and embeddings are one tensor; None for a model that lacks either.

    Args:
        model: a causal language model.
    """
    head, embeddings = (
        getattr(getattr(model, getter, lambda: None)(), "weight", None)
        for getter in ("get_output_embeddings", "get_input_embeddings")
    )
    if head is None or embeddings is None:
        return None
    if head is embeddings:
        return True
    # Two parameters may still be views of one memory; those that hold none have an address of zero.
    return bool(head.device == embeddings.device and head.data_ptr() == embeddings.data_ptr() != 0)


def correct_config(config: Any, *, tied: bool | None) -> bool:
    """Let a model's config say whether head and embeddings are tied, wherever it says otherwise.

    Code that ties them again later (transformers does so in several places) follows the config.

    Args:
        config: of a causal language model.
        tied: from `is_tied`; None changes nothing.

    Returns:
        bool: whether a word was changed.
    """
    if tied is None:
        return False
    wrong = [place for _, place in _places(config) if getattr(place, FLAG, None) is (not tied)]
    for place in wrong:
        setattr(place, FLAG, tied)
    return bool(wrong)


def untied_entries(model: Any, specs: Container[str]) -> dict[str, Any]:
    """Return the entries of a config.json that say that head and embeddings are apart, where both have codes.

    Args:
        model: the float model.
        specs: its quantized modules.
    """
    held_apart = any(
        name.removesuffix(".weight") in specs for name in getattr(model, "all_tied_weights_keys", None) or ()
    )
    if not held_apart:
        return {}
    config = copy.deepcopy(model.config)
    correct_config(config, tied=False)
    return corrected_entries(model.config.to_dict(), config)


def embeddings_in(model: nn.Module, specs: Container[str]) -> tuple[str, ...]:
    """Return the quantized modules of a model that are embeddings."""
    return tuple(name for name, each in model.named_modules() if isinstance(each, nn.Embedding) and name in specs)


def config_of_json(config_class: Any, raw: Mapping[str, Any]) -> Any:
    """Return the config of a class that the content of a config.json describes, read as transformers reads a file.

    Args:
        config_class: a class of transformers.
        raw: content of config.json.
    """
    # Infinity, for example, stands in files as a dictionary.
    return config_class.from_dict(config_class._decode_special_floats(dict(raw)))


def corrected_entries(raw: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Return the entries of a config.json that have to be others for it to say what a config says about the head.

    A file that leaves the word out says what its class does by default, so the file is read as transformers reads it.

    Args:
        raw: content of config.json.
        config: the config in memory, corrected.

    Returns:
        dict: top-level name -> value; empty if the file says the same.
    """
    right = {path: getattr(place, FLAG, None) for path, place in _places(config)}
    said = {path: getattr(place, FLAG, None) for path, place in _places(config_of_json(type(config), raw))}
    if all(said.get(path, value) in (value, None) for path, value in right.items()):
        return {}
    entries: dict[str, Any] = {}
    for path, value in right.items():
        if value is not None:
            entries = _with_flag({**raw, **entries}, path, value, entries)
    return entries


def _with_flag(
    raw: Mapping[str, Any], path: tuple[str, ...], value: bool, entries: Mapping[str, Any]
) -> dict[str, Any]:
    """Return entries with the flag at a path set; a path that the file does not have is left alone."""
    if not path:
        return {**entries, FLAG: value}
    inner = raw.get(path[0])
    # Some old files hold what belongs to the text model at the top.
    if not isinstance(inner, Mapping):
        return dict(entries)
    return {**entries, path[0]: {**inner, **_with_flag(inner, path[1:], value, {})}}


def _places(config: Any) -> list[tuple[tuple[str, ...], Any]]:
    """Return the config and those nested in it down to the text model's, with the names that lead there."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return [((), config), *_way(config, text, ())]


def _way(config: Any, text: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name in getattr(config, "sub_configs", None) or ():
        inner = getattr(config, name, None)
        if inner is None or inner is config or isinstance(inner, Mapping):
            continue
        below = list(_way(inner, text, (*path, name)))
        if inner is text or below:
            yield ((*path, name), inner)
            yield from below
            return
