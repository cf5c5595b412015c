"""Lengths at which a model turns to other rotary frequencies, so that no two rows of a batch lie on two sides of one.

transformers chooses the frequencies of LongRoPE, and of dynamic NTK scaling, by the longest row of a batch: a short row
beside a long one would be computed with those of the long one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

_RESETS = "_cloq_resets_rotary"


@dataclasses.dataclass(frozen=True)
class RotarySwitch:
    """Where the rotary frequencies of a model depend on the length of what it reads.

    Args:
        at: lengths up to which the short factors of LongRoPE serve, and beyond which the long ones do.
        grows: lengths beyond which dynamic scaling gives every length frequencies of its own.
    """

    at: tuple[int, ...] = ()
    grows: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> RotarySwitch:
        """Return the switch of a transformers model, from its configuration; empty if it has none."""
        config = getattr(model, "config", None)
        text_config = config.get_text_config() if hasattr(config, "get_text_config") else config  # type: ignore[union-attr]
        at, grows = set(), set()
        for settings in _rotary_settings(getattr(text_config, "rope_parameters", None)):
            kind = settings.get("rope_type")
            if kind == "longrope":
                at.add(settings.get("original_max_position_embeddings"))
            elif isinstance(kind, str) and "dynamic" in kind:
                grows.add(getattr(text_config, "max_position_embeddings", None))
        return cls(_numbers(at), _numbers(grows))

    def __bool__(self) -> bool:
        return bool(self.at or self.grows)

    def side(self, length: int) -> tuple[int, ...]:
        """Return what is equal for two lengths exactly if the frequencies are."""
        return (*(int(length > place) for place in self.at), *(max(length, place) for place in self.grows))

    def apart(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return the numbers of rows that may be computed together, in the order of their first.

        Args:
            lengths: tokens of each row.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, length in enumerate(lengths):
            groups.setdefault(self.side(length), []).append(row)
        return list(groups.values())

    def stretches(self, length: int, new: int) -> Iterator[int]:
        """Yield how many of so many new tokens are computed with one set of LongRoPE's factors, behind so many.

        Args:
            length: tokens that are read before the first new one.
            new: how many follow.
        """
        while new > 0:
            # The token behind n others is computed from n of them.
            ahead = [place - length + 1 for place in self.at if place >= length]
            stretch = min([new, *ahead])
            yield stretch
            length, new = length + stretch, new - stretch


def forget_lengths(model: nn.Module) -> None:
    """Let rotary frequencies that scale with the length depend on what is read now, and on nothing read before.

    transformers keeps those of the longest text so far until a text comes that needs no scaling.

    Args:
        model: a transformers model; from here on each of its rotary modules starts afresh at every call.
    """
    if not RotarySwitch.of(model).grows or getattr(model, _RESETS, False):
        return
    for module in model.modules():
        if hasattr(module, "max_seq_len_cached") and hasattr(module, "original_max_seq_len"):
            module.register_forward_pre_hook(_begin_anew)
    object.__setattr__(model, _RESETS, True)


def _begin_anew(module: Any, _: Any) -> None:
    for name in [name for name, _ in module.named_buffers(recurse=False) if name.endswith("original_inv_freq")]:
        prefix = name.removesuffix("original_inv_freq")
        module.register_buffer(f"{prefix}inv_freq", getattr(module, name), persistent=False)
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _rotary_settings(parameters: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the rotary settings of a configuration: one for all layers, or one for each kind of them."""
    if not isinstance(parameters, Mapping):
        return
    if "rope_type" in parameters:
        yield parameters
    for own in parameters.values():
        yield from _rotary_settings(own)


def _numbers(found: Iterable[Any]) -> tuple[int, ...]:
    return tuple(sorted(number for number in found if isinstance(number, int)))
