"""What the questions of a task can show: which stand there twice, which were trained on, and what a test could find."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import unicodedata
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from scipy.stats import beta

from cloq_export.parity.plain import Result
from cloq_export.texts.examples import instruction_prompt, question_prompt

# How many questions are asked unless a number is typed.
DEFAULT_QUESTIONS = 100
POWER = 0.8
# What a question is about, and the question itself, as the rows of data sets call them.
_ABOUT = ("context", "passage", "Body", "body", "support", "ctx")
_ASKED = ("question", "Question", "query", "problem", "instruction", "goal", "sentence")


def normal_text(text: str) -> str:
    """Return a text in which neither case nor blanks nor the normal form of its letters tells two questions apart."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def question_hash(text: str) -> str:
    """Return the hexadecimal SHA-256 of a question's normal text; examples of a training are hashed alike."""
    return hashlib.sha256(normal_text(text).encode("utf-8", "surrogatepass")).hexdigest()


def row_hashes(prompt: str, row: Mapping[str, Any]) -> frozenset[str]:
    """Return the hashes that a question may have among examples: of what is put to a model, and of the row's own text.

    A row's question counts with what it is about, since "What will they do next?" alone is no question.

    Args:
        prompt: what a model is given.
        row: the row that the question was read from.
    """

    def joined(names: Iterable[str]) -> str:
        return " ".join(value for name in names if isinstance(value := row.get(name), str) and value.strip())

    own = " ".join(filter(None, (joined(_ABOUT), joined(_ASKED))))
    # As the examples of a training are written where their rows hold a bare question.
    written = (own, question_prompt(own), instruction_prompt(own)) if own else ()
    return frozenset(question_hash(text) for text in (prompt, *written) if text.strip())


class TrainedOn:
    """What a training has seen, as its record keeps it: the first digits of each hash, joined and sorted.

    Args:
        joined: from `TrainedOn.of`.
    """

    _DIGITS = 12  # of two different questions among ten million one pair in a few would agree by chance

    def __init__(self, joined: str) -> None:
        step = self._DIGITS
        self._known = frozenset(joined[start : start + step] for start in range(0, len(joined), step))

    @classmethod
    def of(cls, texts: Iterable[str]) -> str:
        """Return what a record keeps of the prompts that were trained on; they cannot be read back from it."""
        return "".join(sorted({question_hash(text)[: cls._DIGITS] for text in texts if text.strip()}))

    def __contains__(self, digest: object) -> bool:
        """Return whether a question of this `question_hash` was trained on."""
        return isinstance(digest, str) and digest[: self._DIGITS] in self._known


def questions_seen(questions: Sequence[Iterable[str]], hashes: Container[str]) -> list[int]:
    """Return the numbers of the questions that a training has seen.

    Args:
        questions: for each question the hashes that it may have (`row_hashes`).
        hashes: of the examples that were trained on (`question_hash` of each text).
    """
    return [number for number, own in enumerate(questions) if any(each in hashes for each in own)]


def repeated_questions(keys: Sequence[str]) -> list[int]:
    """Return the numbers of the questions that stand there once more, from the hashes of all that is put."""
    seen: set[str] = set()
    repeated = []
    for number, key in enumerate(keys):
        if key in seen:
            repeated.append(number)
        seen.add(key)
    return repeated


def answers_needed(limit: float) -> int | None:
    """Return how many answers, all lost or all won, bring the p-value of McNemar's exact test below a limit.

    With d differing answers that all fall to one side `p = min(1, 2 * 2**-d)`.

    Args:
        limit: smallest p-value that is allowed.

    Returns:
        int: the smallest d; None if there is none, as for a limit of zero.
    """
    if limit <= 0:
        return None
    needed = max(1, math.floor(1 - math.log2(limit)) - 1)
    while min(1.0, 2 * 0.5**needed) >= limit:
        if 0.5**needed == 0.0:
            return None
        needed += 1
    return needed


def smallest_drop(questions: int, limit: float, power: float = POWER) -> float | None:
    """Return the smallest loss of accuracy that the test finds with some probability.

    Of n questions each is lost with probability q and none is won; the test finds the loss if at least d of them are
    lost, d the number of `answers_needed`: the smallest q with `P(X >= d) >= power`, `X ~ Binomial(n, q)`.

    Args:
        questions: n.
        limit: of the p-value.
        power: probability with which the loss is to be found.

    Returns:
        float: a share of the questions; None if no loss can be found.
    """
    needed = answers_needed(limit)
    if needed is None or needed > questions:
        return None

    # P(X >= d) as a function of q is the distribution function of Beta(d, n - d + 1).
    return float(beta.ppf(power, needed, questions - needed + 1))


@dataclasses.dataclass(frozen=True)
class Power(Result):
    """What McNemar's test can find.

    Args:
        limit: smallest p-value that is allowed.
        answers_needed: how many answers must be lost; None if no number is enough.
        smallest_drop: of accuracy that it finds; None if it finds none.
        probability: with which it finds that.
    """

    limit: float
    answers_needed: int | None
    smallest_drop: float | None
    probability: float


@dataclasses.dataclass(frozen=True)
class QuestionFacts(Result):
    """What a report says of the questions themselves.

    Args:
        missing: that were typed for and are not there.
        repeated: that stand there once more.
        seen: that the adapter was trained on; None where its examples are not known.
        power: what the test can find.
    """

    missing: int
    repeated: int
    seen: int | None
    power: Power


def question_facts(
    keys: Sequence[str],
    hashes: Sequence[Iterable[str]],
    trained: Container[str] | None,
    *,
    asked: int | None,
    limit: float,
) -> QuestionFacts:
    """Return what a report says of the questions themselves.

    Args:
        keys: of each question, as `repeated_questions` takes them.
        hashes: of each question, as `questions_seen` takes them.
        trained: hashes of the examples that the adapter was trained on; None if they are not known.
        asked: how many were typed; None if none were.
        limit: smallest p-value that is allowed.
    """
    return QuestionFacts(
        missing=max(0, (asked or 0) - len(keys)),
        repeated=len(repeated_questions(keys)),
        seen=None if trained is None else len(questions_seen(hashes, trained)),
        power=Power(limit, answers_needed(limit), smallest_drop(len(keys), limit), POWER),
    )


def blindness(count: int, limit: float) -> str | None:
    """Return why no answer to so many questions could miss a limit of the p-value; None if one could."""
    needed = answers_needed(limit)
    if needed is not None and needed <= count:
        return None
    if needed is None:
        return f"no p-value is below {limit}, so that the test cannot miss; choose a limit such as 0.01, or null"
    return (
        f"with {count} question{'s' if count != 1 else ''} the p-value is never below {min(1.0, 2 * 0.5**count):g}, so "
        f"that the test cannot miss the limit {limit}; ask {needed} questions or more, or drop the limit with null"
    )
