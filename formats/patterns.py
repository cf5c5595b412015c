"""Regular expressions of files that nobody vouches for, matched against the names of modules in bounded time.

A regular expression can keep an engine that goes back and tries again busy for ever. Here all readings of a name are
followed at once: a set of places in the name goes into a part of the pattern, and the set of places that it can lead to
comes out. Without references to groups that answers as `re` does, and no pattern can make it try the same thing twice;
what nested repetitions cost all the same is counted, and limited.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from cloq_export.errors import FormatError
from cloq_export.formats.pattern_syntax import (
    Character,
    Choice,
    Edge,
    Look,
    Node,
    Parser,
    Repeat,
    Sequence,
    Text,
    in_class,
)

MAX_PATTERN = 2000
MAX_NAME = 512
# Parts of patterns that are followed for one file: a few seconds at the most. Real files stay far below it.
_MAX_STEPS = 4_000_000
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
            self._root = Parser(text).parse()
        except ValueError as error:
            raise FormatError(
                f"{source}: the pattern {text!r:.80} is not read ({error}); name the modules in full."
            ) from None

    def matches(self, name: str) -> bool:
        """Return whether it matches from the start of a name, as `re.match` does."""
        return bool(self._follow(name, 1))

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


class _Reading:
    """One name that a pattern is compared with; bit i of a set of places is the place before character i."""

    def __init__(self, name: str, pattern: NamePattern) -> None:
        self._name, self._pattern = name, pattern
        self._everywhere = (1 << (len(name) + 1)) - 1
        self._masks: dict[int, int] = {}

    def follow(self, node: Node, places: int) -> int:
        """Return the places that can be reached from some places by reading a part of the pattern."""
        self._pattern._budget.spend(1, self._pattern.text)
        if not places:
            return 0
        if isinstance(node, Text):
            return (places & self._mask(node)) << len(node.text)
        if isinstance(node, Character):
            return (places & self._mask(node)) << 1
        if isinstance(node, Sequence):
            for part in node.parts:
                places = self.follow(part, places)
                if not places:
                    break
            return places
        if isinstance(node, Choice):
            reached = 0
            for option in node.options:
                reached |= self.follow(option, places)
            return reached
        if isinstance(node, Repeat):
            return self._repeat(node, places)
        if isinstance(node, Edge):
            return places & self._mask(node)
        return self._look(node, places)

    def _repeat(self, node: Repeat, places: int) -> int:
        if isinstance(node.part, Character) and node.most is None and node.least < 2:
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

    def _look(self, node: Look, places: int) -> int:
        if not node.ahead:
            reached = self.follow(node.part, self._everywhere)
            return places & reached if node.wanted else places & ~reached
        kept = 0
        for place in range(len(self._name) + 1):
            if places >> place & 1 and bool(self.follow(node.part, 1 << place)) is node.wanted:
                kept |= 1 << place
        return kept

    def _mask(self, node: Text | Character | Edge) -> int:
        """Return the places where a part that looks at the name alone fits."""
        known = self._masks.get(id(node))
        if known is None:
            known = self._masks[id(node)] = sum(1 << place for place in self._places_of(node))
        return known

    def _places_of(self, node: Text | Character | Edge) -> Iterable[int]:
        name = self._name
        if isinstance(node, Character):
            return [place for place, character in enumerate(name) if node.fits(character)]
        if isinstance(node, Text):
            return [place for place in range(len(name)) if name.startswith(node.text, place)]
        if node.kind == "^":
            return [0]
        if node.kind == "$":
            return [len(name)]
        inside = [False, *(in_class(character, "w") for character in name), False]
        edges = {place for place in range(len(name) + 1) if inside[place] is not inside[place + 1]}
        return edges if node.kind == "b" else set(range(len(name) + 1)) - edges
