"""Regular expressions of files that nobody vouches for, matched against the names of modules in bounded time.

A regular expression can keep an engine that goes back and tries again busy for ever. Here all readings of a name are
followed at once: a set of places in the name goes into a part of the pattern, and the set of places that it can lead to
comes out. Without references to groups that answers as `re` does, and no pattern can make it try the same thing twice;
what nested repetitions cost all the same is counted, and limited.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from cloq_export.errors import FormatError

MAX_PATTERN = 2000
MAX_NAME = 512

_MAX_DEPTH = 20
_MAX_COUNT = 255
# Parts of patterns that are followed for one file: a few seconds at the most. Real files stay far below it.
_MAX_STEPS = 4_000_000
_COUNTS = re.compile(r"\{(\d{1,9})?(?:(,)(\d{1,9})?)?\}", re.ASCII)
_GROUP_NAME = re.compile(r"\?P<[A-Za-z_]\w*>", re.ASCII)
_LITERAL = re.compile(r"\^?((?:[\w-]|\\[^A-Za-z0-9])+)\$?", re.ASCII)


class PatternBudget:
    """How many steps the patterns of one file may still take.

    Args:
        source: the file, for messages.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._left = _MAX_STEPS

    def spend(self, steps: int, pattern: str) -> None:
        """Count steps.

        Raises:
            FormatError: they are too many.
        """
        self._left -= steps
        if self._left < 0:
            raise FormatError(
                f"{self.source}: its patterns take too long to compare with the names of modules ({pattern!r:.80} was "
                "reached); name the modules in full."
            )


class NamePattern:
    r"""A regular expression in the syntax of Python's `re`, compared in bounded time.

    Known are characters, `.`, sets, `\d \w \s \b` and their opposites, groups of alternatives, `* + ?` and counts
    behind any of them, `^` and `$`, and looking ahead or behind. References to groups, flags and possessive repetitions
    are not.

    Args:
        text: the expression.
        source: the file, for messages.
        budget: of the file; None gives the pattern one of its own.

    Raises:
        FormatError: it is none, too long, or of a kind that is not read.
    """

    def __init__(self, text: str, *, source: str, budget: PatternBudget | None = None) -> None:
        self.text = text
        self.cost = len(text)
        self._budget = budget or PatternBudget(source)
        try:
            if len(text) > MAX_PATTERN:
                raise ValueError(f"it has {len(text)} characters, and {MAX_PATTERN} are the most")
            self._root = _Parser(text).parse()
        except ValueError as error:
            raise FormatError(
                f"{source}: the pattern {text!r:.80} is not read ({error}); name the modules in full."
            ) from None

    def matches(self, name: str) -> bool:
        """Return whether it matches from the start of a name, as `re.match` does."""
        return bool(self._follow(name, 1))

    def matches_whole(self, name: str) -> bool:
        """Return whether it matches a whole name, as `re.fullmatch` does."""
        return bool(self._follow(name, 1) >> len(name))

    def found_in(self, name: str) -> bool:
        """Return whether it matches somewhere in a name, as `re.search` does."""
        return bool(self._follow(name, (1 << (len(name) + 1)) - 1))

    def _follow(self, name: str, places: int) -> int:
        if len(name) > MAX_NAME:
            raise FormatError(
                f"{self._budget.source}: the module name {name!r:.40} has {len(name)} characters; names that patterns "
                f"are compared with have at most {MAX_NAME}."
            )
        return _Reading(name, self).follow(self._root, places)


def literal_name(pattern: str) -> str | None:
    r"""Return the only name that a pattern such as `^model\.layers\.0$` matches, or None if it may match others."""
    match = _LITERAL.fullmatch(pattern)
    if match is None or not (pattern.startswith("^") and pattern.endswith("$")):
        return None
    return re.sub(r"\\(.)", r"\1", match[1])


@dataclasses.dataclass(frozen=True, eq=False)
class _Text:
    """Characters that stand there as they are."""

    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class _Character:
    """One character: those in ranges and classes ("d" for digits and so on), or, negated, all others."""

    ranges: tuple[tuple[str, str], ...] = ()
    classes: str = ""
    negated: bool = False

    def fits(self, character: str) -> bool:
        inside = any(first <= character <= last for first, last in self.ranges) or any(
            _in_class(character, letter) for letter in self.classes
        )
        return inside is not self.negated


@dataclasses.dataclass(frozen=True, eq=False)
class _Sequence:
    parts: tuple[_Node, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Choice:
    options: tuple[_Node, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Repeat:
    part: _Node
    least: int
    most: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class _Edge:
    """A place without a character: "^" the start, "$" the end, "b" the edge of a word, "B" none."""

    kind: str


@dataclasses.dataclass(frozen=True, eq=False)
class _Look:
    """What must stand, or not stand, ahead of or behind a place."""

    part: _Node
    ahead: bool
    wanted: bool


_Node = _Text | _Character | _Sequence | _Choice | _Repeat | _Edge | _Look
_ANYTHING = _Character(negated=True)


class _Reading:
    """One name that a pattern is compared with; bit i of a set of places is the place before character i."""

    def __init__(self, name: str, pattern: NamePattern) -> None:
        self._name, self._pattern = name, pattern
        self._everywhere = (1 << (len(name) + 1)) - 1
        self._masks: dict[int, int] = {}

    def follow(self, node: _Node, places: int) -> int:
        """Return the places that can be reached from some places by reading a part of the pattern."""
        self._pattern._budget.spend(1, self._pattern.text)
        if not places:
            return 0
        if isinstance(node, _Text):
            return (places & self._mask(node)) << len(node.text)
        if isinstance(node, _Character):
            return (places & self._mask(node)) << 1
        if isinstance(node, _Sequence):
            for part in node.parts:
                places = self.follow(part, places)
                if not places:
                    break
            return places
        if isinstance(node, _Choice):
            reached = 0
            for option in node.options:
                reached |= self.follow(option, places)
            return reached
        if isinstance(node, _Repeat):
            return self._repeat(node, places)
        if isinstance(node, _Edge):
            return places & self._mask(node)
        return self._look(node, places)

    def _repeat(self, node: _Repeat, places: int) -> int:
        if isinstance(node.part, _Character) and node.most is None and node.least < 2:
            mask = self._mask(node.part)
            start = places if node.least == 0 else (places & mask) << 1
            # Adding carries the lowest place of each run of fitting characters through to the end of the run.
            return start | (((start & mask) + mask) ^ mask)
        for _ in range(node.least):
            places = self.follow(node.part, places)
        reached, count = places, node.least
        while places and (node.most is None or count < node.most):
            places = self.follow(node.part, places) & ~reached
            reached |= places
            count += 1
        return reached

    def _look(self, node: _Look, places: int) -> int:
        if not node.ahead:
            found = self.follow(node.part, self._everywhere)
            return places & found if node.wanted else places & ~found
        kept = 0
        for place in range(len(self._name) + 1):
            if places >> place & 1 and bool(self.follow(node.part, 1 << place)) is node.wanted:
                kept |= 1 << place
        return kept

    def _mask(self, node: _Text | _Character | _Edge) -> int:
        """Return the places where a part that looks at the name alone fits."""
        known = self._masks.get(id(node))
        if known is None:
            known = self._masks[id(node)] = sum(1 << place for place in self._places_of(node))
        return known

    def _places_of(self, node: _Text | _Character | _Edge) -> Iterable[int]:
        name = self._name
        if isinstance(node, _Character):
            return [place for place, character in enumerate(name) if node.fits(character)]
        if isinstance(node, _Text):
            return [place for place in range(len(name)) if name.startswith(node.text, place)]
        if node.kind == "^":
            return [0]
        if node.kind == "$":
            return [len(name)]
        inside = [False, *(_in_class(character, "w") for character in name), False]
        edges = {place for place in range(len(name) + 1) if inside[place] is not inside[place + 1]}
        return edges if node.kind == "b" else set(range(len(name) + 1)) - edges


class _Parser:
    """Reads the text of a pattern; raises ValueError with the reason where it is none that is read."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def parse(self) -> _Node:
        node = self._choice(0)
        if self._at < len(self._text):
            raise ValueError(f"')' at {self._at} closes nothing")
        return node

    def _next(self, count: int = 1) -> str:
        return self._text[self._at : self._at + count]

    def _choice(self, depth: int) -> _Node:
        if depth > _MAX_DEPTH:
            raise ValueError(f"its groups are nested more than {_MAX_DEPTH} deep")
        options = [self._sequence(depth)]
        while self._next() == "|":
            self._at += 1
            options.append(self._sequence(depth))
        return options[0] if len(options) == 1 else _Choice(tuple(options))

    def _sequence(self, depth: int) -> _Node:
        parts: list[_Node] = []
        while self._at < len(self._text) and self._next() not in ("|", ")"):
            part = self._repeated(self._part(depth))
            if isinstance(part, _Text) and parts and isinstance(parts[-1], _Text):
                parts[-1] = _Text(parts[-1].text + part.text)
            else:
                parts.append(part)
        return parts[0] if len(parts) == 1 else _Sequence(tuple(parts))

    def _repeated(self, part: _Node) -> _Node:
        counts = self._counts()
        if counts is None:
            return part
        if isinstance(part, (_Edge, _Look)):
            raise ValueError("a place without a character is repeated")
        if self._next() == "?":
            self._at += 1  # the shortest reading first: other readings all the same
        elif self._next() == "+":
            raise ValueError("possessive repetitions are not known here")
        if self._counts() is not None:
            raise ValueError("a repetition is repeated")
        return _Repeat(part, *counts)

    def _counts(self) -> tuple[int, int | None] | None:
        """Return (least, most) of a repetition that stands here, or None."""
        simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if self._next() in simple:
            self._at += 1
            return simple[self._text[self._at - 1]]
        found = self._counted_from(self._at)
        if found is None:
            return None
        least = int(found[1] or 0)
        most = None if found[2] and found[3] is None else int(found[3] or least)
        if max(least, most or 0) > _MAX_COUNT or (most is not None and most < least):
            raise ValueError(f"the count {found[0][:20]} is none up to {_MAX_COUNT}")
        self._at = found.end()
        return least, most

    def _counted_from(self, at: int) -> re.Match[str] | None:
        """Return the count that stands at a place, such as `{2,3}`; other braces are characters."""
        found = _COUNTS.match(self._text, at)
        return None if found is None or found[0] == "{}" else found

    def _part(self, depth: int) -> _Node:
        character = self._next()
        self._at += 1
        if character == "(":
            return self._group(depth)
        if character == "[":
            return self._set()
        if character == ".":
            return _ANYTHING
        if character in "^$":
            return _Edge(character)
        if character == "\\":
            return self._escaped()
        if character in "*+?" or (character == "{" and self._counted_from(self._at - 1)):
            raise ValueError(f"nothing stands before the {character!r} at {self._at - 1}")
        return _Text(character)

    def _group(self, depth: int) -> _Node:
        look: tuple[bool, bool] | None = None
        if self._next() == "?":
            kinds = {"?=": (True, True), "?!": (True, False), "?<=": (False, True), "?<!": (False, False)}
            mark = next((mark for mark in kinds if self._text.startswith(mark, self._at)), None)
            named = _GROUP_NAME.match(self._text, self._at)
            if mark is not None:
                look = kinds[mark]
                self._at += len(mark)
            elif self._text.startswith("?:", self._at):
                self._at += 2
            elif named is not None:
                self._at = named.end()
            else:
                raise ValueError(f"groups such as '({self._next(3)}' are not known here")
        inner = self._choice(depth + 1)
        if self._next() != ")":
            raise ValueError("a group is not closed")
        self._at += 1
        return inner if look is None else _Look(inner, *look)

    def _escaped(self) -> _Node:
        letter = self._next()
        self._at += 1
        if letter in set("dDwWsS"):
            return _Character(classes=letter)
        if letter in ("b", "B"):
            return _Edge(letter)
        if letter in ("A", "Z"):
            return _Edge("^" if letter == "A" else "$")
        if not letter or letter.isalnum():
            raise ValueError(f"'\\{letter}' is not known here")
        return _Text(letter)

    def _set(self) -> _Character:
        negated = self._next() == "^"
        self._at += negated
        ranges: list[tuple[str, str]] = []
        classes = ""
        first = True
        while first or self._next() != "]":
            first = False
            low = self._member()
            if len(low) == 2:
                classes += low[1]
            elif self._next() == "-" and self._next(2)[1:] not in ("]", ""):
                self._at += 1
                high = self._member()
                if len(high) == 2 or high < low:
                    raise ValueError("a range in a set goes backwards")
                ranges.append((low, high))
            else:
                ranges.append((low, low))
        self._at += 1
        return _Character(tuple(ranges), classes, negated)

    def _member(self) -> str:
        r"""Return a character of a set, or a class as `\d`."""
        character = self._next()
        self._at += 1
        if not character:
            raise ValueError("a set is not closed")
        if character != "\\":
            return character
        letter = self._next()
        self._at += 1
        if letter in set("dDwWsS"):
            return "\\" + letter
        if not letter or letter.isalnum():
            raise ValueError(f"'\\{letter}' is not known here")
        return letter


def _in_class(character: str, letter: str) -> bool:
    r"""Return whether a character is one of \d, \w, \s, \D, \W or \S."""
    inside = {
        "d": str.isdecimal,
        "w": lambda text: text.isalnum() or text == "_",
        "s": str.isspace,
    }[letter.lower()](character)
    return bool(inside) is letter.islower()
