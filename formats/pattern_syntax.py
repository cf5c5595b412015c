"""The syntax of name patterns: from the text of a regular expression to its parts."""

from __future__ import annotations

import dataclasses
import re

_MAX_DEPTH = 20
_MAX_COUNT = 255
_COUNTS = re.compile(r"\{(\d{1,9})?(?:(,)(\d{1,9})?)?\}", re.ASCII)
_GROUP_NAME = re.compile(r"\?P<[A-Za-z_]\w*>", re.ASCII)


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """Characters that stand there as they are."""

    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Character:
    """One character: those in ranges and classes ("d" for digits and so on), or, negated, all others."""

    ranges: tuple[tuple[str, str], ...] = ()
    classes: str = ""
    negated: bool = False

    def fits(self, character: str) -> bool:
        """Return whether it is one of these characters."""
        inside = any(first <= character <= last for first, last in self.ranges) or any(
            in_class(character, letter) for letter in self.classes
        )
        return inside is not self.negated


@dataclasses.dataclass(frozen=True, eq=False)
class Sequence:
    """Parts that follow one another."""

    parts: tuple[Node, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """Parts of which one stands there."""

    options: tuple[Node, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Repeat:
    """A part that stands there several times; None means any number."""

    part: Node
    least: int
    most: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class Edge:
    """A place without a character: "^" the start, "$" the end, "b" the edge of a word, "B" none."""

    kind: str


@dataclasses.dataclass(frozen=True, eq=False)
class Look:
    """What must stand, or not stand, ahead of or behind a place."""

    part: Node
    ahead: bool
    wanted: bool


Node = Text | Character | Sequence | Choice | Repeat | Edge | Look
_ANYTHING = Character(negated=True)


class Parser:
    """Reads the text of a pattern; raises ValueError with the reason where it is none that is read."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def parse(self) -> Node:
        """Return the whole pattern.

        Raises:
            ValueError: it is none that is read; the message says why.
        """
        node = self._choice(0)
        if self._at < len(self._text):
            raise ValueError(f"')' at {self._at} closes nothing")
        return node

    def _next(self, count: int = 1) -> str:
        return self._text[self._at : self._at + count]

    def _choice(self, depth: int) -> Node:
        if depth > _MAX_DEPTH:
            raise ValueError(f"its groups are nested more than {_MAX_DEPTH} deep")
        options = [self._sequence(depth)]
        while self._next() == "|":
            self._at += 1
            options.append(self._sequence(depth))
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def _sequence(self, depth: int) -> Node:
        parts: list[Node] = []
        while self._at < len(self._text) and self._next() not in ("|", ")"):
            part = self._repeated(self._part(depth))
            if isinstance(part, Text) and parts and isinstance(parts[-1], Text):
                parts[-1] = Text(parts[-1].text + part.text)
            else:
                parts.append(part)
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def _repeated(self, part: Node) -> Node:
        counts = self._counts()
        if counts is None:
            return part
        if isinstance(part, (Edge, Look)):
            raise ValueError("a place without a character is repeated")
        if self._next() == "?":
            self._at += 1  # the shortest reading first: other readings all the same
        elif self._next() == "+":
            raise ValueError("possessive repetitions are not known here")
        if self._counts() is not None:
            raise ValueError("a repetition is repeated")
        return Repeat(part, *counts)

    def _counts(self) -> tuple[int, int | None] | None:
        """Return (least, most) of a repetition that stands here, or None."""
        simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if self._next() in simple:
            self._at += 1
            return simple[self._text[self._at - 1]]
        counts = self._counted_from(self._at)
        if counts is None:
            return None
        least = int(counts[1] or 0)
        most = None if counts[2] and counts[3] is None else int(counts[3] or least)
        if max(least, most or 0) > _MAX_COUNT or (most is not None and most < least):
            raise ValueError(f"the count {counts[0][:20]} is none up to {_MAX_COUNT}")
        self._at = counts.end()
        return least, most

    def _counted_from(self, at: int) -> re.Match[str] | None:
        """Return the count that stands at a place, such as `{2,3}`; other braces are characters."""
        match = _COUNTS.match(self._text, at)
        return None if match is None or match[0] == "{}" else match

    def _part(self, depth: int) -> Node:
        character = self._next()
        self._at += 1
        if character == "(":
            return self._group(depth)
        if character == "[":
            return self._set()
        if character == ".":
            return _ANYTHING
        if character in "^$":
            return Edge(character)
        if character == "\\":
            return self._escaped()
        if character in "*+?" or (character == "{" and self._counted_from(self._at - 1)):
            raise ValueError(f"nothing stands before the {character!r} at {self._at - 1}")
        return Text(character)

    def _group(self, depth: int) -> Node:
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
        return inner if look is None else Look(inner, *look)

    def _escaped(self) -> Node:
        letter = self._next()
        self._at += 1
        if letter in set("dDwWsS"):
            return Character(classes=letter)
        if letter in ("b", "B"):
            return Edge(letter)
        if letter in ("A", "Z"):
            return Edge("^" if letter == "A" else "$")
        if not letter or letter.isalnum():
            raise ValueError(f"'\\{letter}' is not known here")
        return Text(letter)

    def _set(self) -> Character:
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
        return Character(tuple(ranges), classes, negated)

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


def in_class(character: str, letter: str) -> bool:
    r"""Return whether a character is one of \d, \w, \s, \D, \W or \S."""
    inside = {
        "d": str.isdecimal,
        "w": lambda text: text.isalnum() or text == "_",
        "s": str.isspace,
    }[letter.lower()](character)
    return bool(inside) is letter.islower()
