"""What a table is asked for: one mapping in YAML, checked as a whole before anything is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cloq_export.errors import RecipeError
from cloq_export.recipe import SUPPORTED_BITS, read_recipe_file

Fits = Callable[[Any], bool]
_FULL = "full"
_RECIPES = Path(__file__).with_name("recipes")


def read_table_recipe(
    name: str,
    kind: str,
    needed: Mapping[str, tuple[Fits, str]],
    faults: Callable[[Mapping[str, Any]], Iterable[str]],
    *,
    full: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the content of a recipe whose values have the form that is needed.

    Args:
        name: a YAML file, or the name of a recipe of the package.
        kind: of the table; the package's own recipes of it lie in the folder of that name.
        needed: key -> whether a value has the form, and the form in words.
        faults: finds what is wrong between the values, once each has its form.
        full: with what the section `full` says instead.
        changes: taken instead of what the file says.

    Raises:
        RecipeError: it cannot be read, or a value is missing, unknown or wrong; the message lists all faults.
    """
    content = _content_of(name, kind)
    larger = content.pop(_FULL, None) or {}
    if not isinstance(larger, Mapping):
        raise RecipeError(f"{name}: {_FULL} is {larger!r}; a mapping of options is needed.")
    content |= {**(larger if full else {}), **(changes or {})}
    clauses = [f"{key!r} is missing" for key in needed if key not in content]
    clauses += [f"{key!r} is not an option of a {kind} recipe" for key in content if key not in needed]
    clauses += [
        f"{key} is {content[key]!r}; {wanted} is needed"
        for key, (fits, wanted) in needed.items()
        if key in content and not fits(content[key])
    ]
    if not clauses:
        clauses = list(faults(content))
    if clauses:
        raise RecipeError(f"{name}: {'; '.join(clauses)}.")
    return content


def _content_of(name: str, kind: str) -> dict[str, Any]:
    """Return what a YAML file holds, or one of the package's by its name."""
    if Path(name).is_file() or Path(name).suffix or "/" in name:
        return read_recipe_file(name)[0]
    known = {path.stem: path for path in (_RECIPES / kind).glob("*.yaml")}
    if name not in known:
        raise RecipeError(
            f"there is no {kind} recipe {name!r}, and no file of that name; there are {', '.join(known)}."
        )
    return read_recipe_file(known[name])[0]


def is_text(value: Any) -> bool:
    """Return whether a value is a text that is not blank."""
    return isinstance(value, str) and bool(value.strip())


def is_mapping(value: Any) -> bool:
    """Return whether a value is a mapping."""
    return isinstance(value, Mapping)


def is_width(value: Any) -> bool:
    """Return whether a value is a number of bits that codes can have."""
    return isinstance(value, int) and value in SUPPORTED_BITS


def is_positive(value: Any) -> bool:
    """Return whether a value is a finite number above 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def whole(least: int) -> Fits:
    """Return what tells whole numbers of at least `least`."""
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least


def list_of(fits: Fits, *, least: int = 1) -> Fits:
    """Return what tells lists of at least so many values that each have a form."""
    return lambda value: isinstance(value, list) and len(value) >= least and all(map(fits, value))
