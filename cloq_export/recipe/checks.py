"""One option with its default, its meaning and its allowed values, and the message for any other value."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cloq_export.errors import RecipeError


@dataclasses.dataclass(frozen=True)
class ValueRule:
    """What a value of the right type must be.

    Args:
        holds: tells whether it is.
        wanted: in words, for a message.
        choices: all values, where they are that few.
    """

    holds: Callable[[Any], bool]
    wanted: str
    choices: tuple[str, ...] = ()


def option(default: Any, text: str, *rules: ValueRule, **shown: str) -> Any:
    """Return a field of a dataclass of options.

    Args:
        default: its value unless another is given.
        text: its meaning, for people.
        rules: what its values must satisfy besides their type; the first broken rule is reported.
        shown: how a command line has it: "metavar" stands for its value in the help; "flag" is its flag if that is
            not its name; "separator" stands between the parts of a value that is typed in one word.
    """
    return dataclasses.field(default=default, metadata={"help": text, "rules": rules, **shown})


def at_least(least: int) -> ValueRule:
    """Return the rule of a smallest value."""
    return ValueRule(lambda value: bool(value >= least), f"it must be at least {least}")


def one_of(choices: Iterable[str]) -> ValueRule:
    """Return the rule of a value that is one of a few."""
    known = tuple(choices)
    return ValueRule(known.__contains__, f"allowed are {joined_names(known)}", choices=known)


def between(least: float, most: float) -> ValueRule:
    """Return the rule of a smallest and a largest value."""
    return ValueRule(lambda value: bool(least <= value <= most), f"it must be between {least} and {most}")


def below_power_of_two(exponent: int) -> ValueRule:
    """Return the rule of a number that so many bits hold."""
    return ValueRule(lambda value: bool(value < 2**exponent), f"it must be below 2**{exponent}")


def matching(pattern: str, wanted: str) -> ValueRule:
    """Return the rule of a text that a regular expression describes as a whole."""
    return ValueRule(lambda value: re.fullmatch(pattern, value) is not None, wanted)


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]i?B|B|)", re.IGNORECASE)

ABOVE_ZERO = ValueRule(lambda value: bool(value > 0), "it must be above 0")
SHARE = between(0, 1)
SHRINK = ValueRule(lambda value: bool(0 < value <= 1), "it must be above 0 and at most 1")
FILE_NAME = matching(
    r"[A-Za-z0-9][A-Za-z0-9._-]*", "letters, digits, '.', '_' and '-' are allowed, a letter or digit first"
)


class Options:
    """The options of one dataclass: their fields, and the values of those that allow only some.

    Args:
        owner: the dataclass; every field is an `option`, or has checks of its own.
    """

    def __init__(self, owner: type) -> None:
        self.fields: dict[str, dataclasses.Field[Any]] = {field.name: field for field in dataclasses.fields(owner)}
        kinds = typing.get_type_hints(owner)
        self.choices: dict[str, tuple[str, ...]] = {
            name: typing.get_args(kind) for name, kind in kinds.items() if typing.get_origin(kind) is typing.Literal
        }

    def faults(self, name: str, value: Any, *, shown: str = "") -> list[str]:
        """Return what is wrong with one option, as clauses of a sentence.

        Args:
            name: of the option.
            value: its value.
            shown: what a message calls it; the name unless given.
        """
        wanted = self._type_fault(name, value)
        if not wanted:
            rules: Iterable[ValueRule] = self.fields[name].metadata.get("rules", ())
            broken = next((rule for rule in rules if not rule.holds(value)), None)
            wanted = broken.wanted + near(str(value), broken.choices) if broken else ""
        return [f"{shown or name} is {value!r}; {wanted}"] if wanted else []

    def number_of(self, name: str, value: Any) -> Any:
        """Return a value in the type of its option: whole numbers are numbers."""
        return float(value) if self.fields[name].type == "float" else value

    def parse(self, name: str, text: str, *, shown: str = "") -> Any:
        """Return a text as the type of its option; other kinds than numbers and booleans stay text.

        Args:
            name: of the option.
            text: its value.
            shown: what a message calls it; the name unless given.

        Raises:
            RecipeError: the text is not of that type.
        """
        return parse_value(shown or name, self.fields[name].type, text)

    def _type_fault(self, name: str, value: Any) -> str:
        """Return what a value of the wrong type should have been, or an empty text."""
        kind = self.fields[name].type
        if kind == "int" and (not isinstance(value, int) or isinstance(value, bool)):
            return "a whole number is needed"
        if kind == "float" and (
            not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value)
        ):
            return "a number is needed"
        if kind == "bool" and not isinstance(value, bool):
            return "true or false is needed"
        if name in self.choices and value not in self.choices[name]:
            return f"allowed are {joined_names(self.choices[name])}{near(str(value), self.choices[name])}"
        if kind == "str" and not isinstance(value, str):
            return "a text is needed"
        return ""


def bytes_of_size(text: str) -> int | None:
    """Return a size such as 500MB or 5GiB in bytes, None if the text is none."""
    match = _SIZE.fullmatch(text)
    return int(float(match[1]) * _UNITS[match[2].upper()]) if match else None


def mapping_faults(name: str, value: Any, wanted: str) -> list[str]:
    """Return what is wrong with an option that must be a mapping."""
    return [] if isinstance(value, Mapping) else [f"{name} is {value!r}; a mapping of {wanted} is needed"]


def parse_value(name: str, kind: Any, text: str) -> Any:
    """Return a text as the type of its option; other kinds than numbers and booleans stay text."""
    if kind == "bool":
        lowered = text.lower()
        if lowered in ("true", "yes", "on", "1"):
            return True
        if lowered in ("false", "no", "off", "0"):
            return False
        raise RecipeError(f"{name} is {text!r}; allowed are true and false.")
    reader: Callable[[str], Any] | None = {"int": int, "float": float}.get(kind)
    if reader is None:
        return text
    try:
        return reader(text)
    except ValueError:
        wanted = "a whole number" if kind == "int" else "a number"
        raise RecipeError(f"{name} is {text!r}; {wanted} is needed.") from None


def recipe_error(faults: list[str]) -> RecipeError:
    """Return the error that tells all faults at once."""
    if len(faults) == 1:
        return RecipeError(f"{faults[0]}.")
    return RecipeError(
        f"{len(faults)} faults: " + "; ".join(f"({i}) {fault}" for i, fault in enumerate(faults, 1)) + "."
    )


def near(name: str, known: Iterable[str]) -> str:
    """Return the known name that is most like one, as a question in brackets, or an empty text."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def joined_names(names: Iterable[str]) -> str:
    """Return names as a message lists them."""
    return ", ".join(names)
