"""Which module a target of compressed-tensors means: a name, the class `Linear`, or a regular expression.

Regular expressions are compared by `cloq_export.formats.patterns`, whose cost is bounded.
"""

from __future__ import annotations

import collections
from collections.abc import Collection
from typing import Generic, TypeVar

from cloq_export.errors import FormatError
from cloq_export.formats.patterns import MAX_NAME, NamePattern, PatternBudget

REGEX_MARK = "re:"
LINEAR = "Linear"

# Patterns times names, in characters: a few seconds at the most. Real files stay far below it.
_MAX_CHARACTERS = 20_000_000

Value = TypeVar("Value")


class TargetMap(Generic[Value]):
    """Values that targets give to modules.

    Args:
        source: the file, for messages.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._budget = PatternBudget(source)
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
                pattern = NamePattern(target.removeprefix(REGEX_MARK), source=self._source, budget=self._budget)
                self._patterns[target] = (pattern, {value})

    def check_cost(self, modules: Collection[str]) -> None:
        """Refuse names and patterns that would take long to compare.

        Raises:
            FormatError: a name is too long, or there are too many patterns for so many names.
        """
        cost = sum(pattern.cost for pattern, _ in self._patterns.values())
        longest = max(modules, key=len, default="")
        if cost and len(longest) > MAX_NAME:
            raise FormatError(
                f"{self._source}: the module name {longest!r:.40} has {len(longest)} characters; names that "
                f"patterns are compared with have at most {MAX_NAME}."
            )
        if cost * len(modules) > _MAX_CHARACTERS:
            raise FormatError(
                f"{self._source}: {cost} characters of patterns over {len(modules)} modules are too many to compare; "
                "name the modules in full."
            )

    def by_name(self, module: str) -> set[Value]:
        """Return the values that a module has by its name, and not only as a linear layer."""
        rules = set(self.names.get(module, ()))
        for pattern, values in self._patterns.values():
            if not values <= rules and pattern.matches(module):
                rules |= values
        return rules
