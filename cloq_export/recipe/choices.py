"""Values of options that other rooms add, and where what does them is found."""

from __future__ import annotations

import importlib
from typing import Any

from cloq_export.recipe.options import CHOICES

# (option, choice) -> "module:attribute" of what does it.
_REGISTERED: dict[tuple[str, str], str] = {}


def register_choice(name: str, choice: str, home: str) -> None:
    """Let an option have one more value.

    Args:
        name: an option of a recipe that allows only some values.
        choice: the value.
        home: what does it, as "module:attribute"; it is imported when it is needed.
    """
    _REGISTERED[name, choice] = home
    CHOICES[name] = tuple(dict.fromkeys((*CHOICES[name], choice)))


def registered_choice(name: str, choice: str) -> Any:
    """Return what does a registered value of an option."""
    module, _, attribute = _REGISTERED[name, choice].partition(":")
    return getattr(importlib.import_module(module), attribute)
