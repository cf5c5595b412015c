"""Which module a target of compressed-tensors means: a name, the class `Linear`, or a regular expression.

A regular expression from a file that nobody vouches for can run for ever, so none is given to an engine that goes
back and tries again. Those that people write in these files are simple; they are matched here by following all
readings of a name at once, in time that grows with the length of the pattern. Anything richer is refused by name.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Collection
from typing import Generic, TypeVar

from cloq_export.errors import FormatError

REGEX_MARK = "re:"
LINEAR = "Linear"

_MAX_PATTERN = 2000
_MAX_NAME = 512
# Patterns times names, in steps of the matcher: a few seconds at the most. Real files stay far below it.
_MAX_STEPS = 20_000_000

_WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
_DIGITS = frozenset("0123456789")
_ANY = None
_CLASS = re.compile(r"\[((?:[\w.]-[\w.]|[\w.])+)\]", re.ASCII)
_ALTERNATIVES = re.compile(r"\((?:\?:)?([^()]*)\)")

Value = TypeVar("Value")

# One character: the set of those that fit, or None for any; and how often: "", "?", "*" or "+".
_Atom = tuple[frozenset[str] | None, str]


class NamePattern:
    r"""A regular expression of a restricted kind, matched from the start of a name as `re.match` does.

    Known are letters, digits, `_` and `-`; `.`, `\.`, `\d`, `\w` and sets such as `[a-z.]`, each with `*`, `+` or
    `?` behind it if wanted; groups of alternatives such as `(q|k|v)`, not nested and not repeated; `^` in front and
    `$` at the end.

    Args:
        text: the expression.
        source: the file, for messages.

    Raises:
        FormatError: it is of another kind.
    """

    def __init__(self, text: str, *, source: str) -> None:
        self._steps: list[list[list[_Atom]]] = []
        self.cost = len(text)
        body = text.removeprefix("^")
        self._to_the_end = body.endswith("$") and not body.endswith("\\$")
        body = body[:-1] if self._to_the_end else body
        try:
            if len(text) > _MAX_PATTERN:
                raise ValueError
            self._steps = _parse(body)
        except ValueError:
            raise FormatError(
                f"{source}: the pattern {text!r:.80} is not one of the simple ones that are read here (names, '.', "
                "'.*', '\\d+', '[a-z]', '(q|k|v)', '^' and '$'); name the modules in full."
            ) from None

    def matches(self, name: str) -> bool:
        """Return whether the pattern matches from the start of a name."""
        # Bit i of `places` says that the pattern so far can have read the first i characters.
        masks: dict[str, int] = {}
        for index, character in enumerate(name):
            masks[character] = masks.get(character, 0) | 1 << index
        everything = (1 << len(name)) - 1
        places = 1
        for alternatives in self._steps:
            reached = 0
            for atoms in alternatives:
                reached |= _follow(atoms, places, masks, everything)
            places = reached
            if not places:
                return False
        return bool(places >> len(name)) if self._to_the_end else True


class TargetMap(Generic[Value]):
    """Values that targets give to modules.

    Args:
        source: the file, for messages.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self.names: dict[str, set[Value]] = collections.defaultdict(set)
        self._patterns: dict[str, tuple[NamePattern, set[Value]]] = {}
        self.of_linear: set[Value] = set()

    def add(self, targets: object, value: Value) -> None:
        """Give a value to what a list of targets means.

        Raises:
            FormatError: it is no list of texts, or a pattern is of a kind that is not read.
        """
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise FormatError(f"{self._source} holds {targets!r:.80}; expected a list of names.")
        for target in targets:
            if target == LINEAR:
                self.of_linear.add(value)
            elif not target.startswith(REGEX_MARK):
                self.names[target].add(value)
            elif target in self._patterns:
                self._patterns[target][1].add(value)
            else:
                pattern = NamePattern(target.removeprefix(REGEX_MARK), source=self._source)
                self._patterns[target] = (pattern, {value})

    def check_cost(self, modules: Collection[str]) -> None:
        """Refuse names and patterns that would take long to compare.

        Raises:
            FormatError: a name is too long, or there are too many patterns for so many names.
        """
        cost = sum(pattern.cost for pattern, _ in self._patterns.values())
        longest = max(modules, key=len, default="")
        if cost and len(longest) > _MAX_NAME:
            raise FormatError(
                f"{self._source}: the module name {longest!r:.40} has {len(longest)} characters; names that "
                f"patterns are compared with have at most {_MAX_NAME}."
            )
        if cost * len(modules) > _MAX_STEPS:
            raise FormatError(
                f"{self._source}: {cost} characters of patterns over {len(modules)} modules are too many to compare; "
                "name the modules in full."
            )

    def by_name(self, module: str) -> set[Value]:
        """Return the values that a module has by its name, and not only as a linear layer."""
        found = set(self.names.get(module, ()))
        for pattern, values in self._patterns.values():
            if not values <= found and pattern.matches(module):
                found |= values
        return found


def _parse(body: str) -> list[list[list[_Atom]]]:
    """Return the pattern as a sequence of alternatives, each a sequence of atoms."""
    steps: list[list[list[_Atom]]] = []
    at = 0
    while at < len(body):
        if body[at] == "(":
            group = _ALTERNATIVES.match(body, at)
            if group is None or body[group.end() : group.end() + 1] in ("*", "+", "?", "{"):
                raise ValueError
            steps.append([_parse_atoms(alternative) for alternative in group[1].split("|")])
            at = group.end()
        else:
            end = body.find("(", at)
            end = len(body) if end < 0 else end
            steps.append([_parse_atoms(body[at:end])])
            at = end
    return steps


def _parse_atoms(text: str) -> list[_Atom]:
    atoms: list[_Atom] = []
    at = 0
    while at < len(text):
        fits, length = _parse_character(text, at)
        at += length
        often = text[at] if text[at : at + 1] in ("*", "+", "?") and at < len(text) else ""
        at += len(often)
        atoms.append((fits, often))
    return atoms


def _parse_character(text: str, at: int) -> tuple[frozenset[str] | None, int]:
    """Return the characters that fit, and the length of what says so."""
    character = text[at]
    if character == ".":
        return _ANY, 1
    if character in _WORD or character == "-":
        return frozenset(character), 1
    if character == "\\":
        escaped = text[at + 1 : at + 2]
        known = {"d": _DIGITS, "w": _WORD, ".": frozenset("."), "-": frozenset("-"), "_": frozenset("_")}
        if escaped in known:
            return known[escaped], 2
    if character == "[":
        held = _CLASS.match(text, at)
        if held is not None:
            return _characters(held[1]), len(held[0])
    raise ValueError


def _characters(text: str) -> frozenset[str]:
    found: set[str] = set()
    for piece in re.findall(r".-.|.", text):
        first, last = piece[0], piece[-1]
        if first > last:
            raise ValueError
        found.update(chr(code) for code in range(ord(first), ord(last) + 1))
    return frozenset(found)


def _follow(atoms: list[_Atom], places: int, masks: dict[str, int], everything: int) -> int:
    """Return the places that can be reached from some places by reading atoms."""
    for fits, often in atoms:
        if not places:
            return 0
        mask = everything if fits is None else sum(masks.get(character, 0) for character in fits)
        once = (places & mask) << 1
        if often in ("*", "+"):
            start = places if often == "*" else once
            # Adding carries the lowest place of each run of fitting characters through to the end of the run.
            places = start | (((start & mask) + mask) ^ mask)
        else:
            places = once | places if often == "?" else once
    return places
