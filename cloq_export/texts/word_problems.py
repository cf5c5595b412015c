"""Grade-school word problems with worked solutions in the form of GSM8K, generated from a seed.

A small model cannot solve GSM8K; these it can learn. A solution has one line for each step, with the calculator mark
`<<a+b=c>>` behind it, and ends with `#### N`. A problem belongs to "train" or to "test" by a hash of its template and
its numbers, so no seed and no count brings a test problem into training, not even under other names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from cloq_export.errors import UsageError
from cloq_export.texts.word_problem_templates import TEMPLATES, Draft, Draw

SPLITS = ("train", "test")
MOST_STEPS = 4

# One problem of so many is for tests.
_TEST_SHARE = 5
# Far fewer than can be drawn of any choice of templates, so that drawing comes to an end.
_MOST_PROBLEMS = 100_000


@dataclasses.dataclass(frozen=True)
class WordProblem:
    """One problem.

    Args:
        question: its text.
        answer: the worked solution, a line for each step and "#### N" last.
        template: what kind of problem it is.
        numbers: the figures that the question gives, in the order in which it gives them.
    """

    question: str
    answer: str
    template: str
    numbers: tuple[int, ...]

    @property
    def steps(self) -> int:
        """Return how many calculations the solution takes."""
        return self.answer.count("<<")


def generate(count: int, *, seed: int = 0, split: str = "train", most_steps: int = MOST_STEPS) -> list[WordProblem]:
    """Return problems, no two of them alike; the first of them do not depend on how many are asked for.

    Args:
        count: how many, 1 to 100000.
        seed: of the draw, 0 or more.
        split: "train" or "test".
        most_steps: leave out templates with more calculations than this, 1 to 4.

    Raises:
        UsageError: a number is out of range, or there is no such split.
    """
    if split not in SPLITS:
        raise UsageError(f"there is no split {split!r} of word problems; there are {', '.join(SPLITS)}.")
    for name, value, least, most in (
        ("count", count, 1, _MOST_PROBLEMS),
        ("seed", seed, 0, math.inf),
        ("most_steps", most_steps, 1, MOST_STEPS),
    ):
        if not least <= value <= most:
            allowed = f"{least} or more" if most == math.inf else f"{least} to {most}"
            raise UsageError(f"{name} of word problems is {value}; allowed is {allowed}.")
    return list(islice(_problems(seed, split, most_steps), count))


def split_of(template: str, numbers: Sequence[int]) -> str:
    """Return the split that a problem with these numbers belongs to, for any seed and any names.

    Args:
        template: what kind of problem it is.
        numbers: its figures.
    """
    digest = hashlib.sha256(f"{template}:{','.join(map(str, numbers))}".encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % _TEST_SHARE == 0 else "train"


_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b,
}


def _problems(seed: int, split: str, most_steps: int) -> Iterator[WordProblem]:
    """Yield different problems without end."""
    names = [name for name, (steps, _) in TEMPLATES.items() if steps <= most_steps]
    draw = Draw(2 * seed + SPLITS.index(split))
    seen: set[str] = set()
    while True:
        name = draw.pick(names)
        draft = TEMPLATES[name][1](draw)
        if split_of(name, draft.numbers) == split and draft.question not in seen:
            seen.add(draft.question)
            yield WordProblem(draft.question, _solution(draft), name, draft.numbers)


def _solution(draft: Draft) -> str:
    lines = []
    for lead, calculation, unit in draft.steps:
        value = _value_of(calculation)
        lines.append(f"{lead} {calculation} = <<{calculation}={value}>>{value} {unit}.")
    return "\n".join([*lines, f"#### {value}"])


def _value_of(calculation: str) -> int:
    sign = next(sign for sign in _OPERATIONS if sign in calculation)
    first, second = calculation.split(sign)
    return _OPERATIONS[sign](int(first), int(second))
