"""Word problems: right by an evaluator of its own, never in both splits, the same on every Python."""

from __future__ import annotations

import ast
import hashlib
import operator
import re
from fractions import Fraction

import pytest

from cloq_export.errors import UsageError
from cloq_export.texts.word_problem_templates import TEMPLATES
from cloq_export.texts.word_problems import SPLITS, WordProblem, generate, split_of

_MARK = re.compile(r"<<([^=>]*)=([^>]*)>>(\S+)")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def exact(text: str) -> Fraction:
    """Compute a calculation in exact fractions, by Python's own grammar and not by the generator's."""

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        assert isinstance(node, ast.BinOp)
        first, second = value(node.left), value(node.right)
        return _OPERATORS[type(node.op)](first, second)

    return value(ast.parse(text, mode="eval").body)


def final(problem: WordProblem) -> int:
    return int(problem.answer.rpartition("\n#### ")[2])


# What the question of a template asks for, written down from its numbers alone: (numbers) -> answer.
MEANT = {
    "gain": lambda a, b: a + b,
    "loss": lambda a, b: a - b,
    "packs": lambda a, b: a * b,
    "share": lambda a, b: Fraction(a, b),
    "more than": lambda a, b: 2 * a + b,
    "times as many": lambda a, k: a * (k + 1),
    "change": lambda n, price, paid: paid - n * price,
    "packs left": lambda n, each, sold: n * each - sold,
    "wages": lambda hours, days, wage: hours * days * wage,
    "bus": lambda start, off, on: start - off + on,
    "ages": lambda age, older, years: age + older + years,
    "half used": lambda has, more: Fraction(has, 2) + more,
    "two kinds": lambda a, b, c, d: a * b + c * d,
    "reading": lambda book, pages, days, sunday: book - pages * days - sunday,
    "pooled": lambda a, b, friends, lost: Fraction(a + b, friends) - lost,
    "shopping": lambda money, a, p, b, q: money - a * p - b * q,
    "bakery": lambda a, b, c, d, sold: a * b + c * d - sold,
}


@pytest.fixture(scope="module")
def problems() -> list[WordProblem]:
    return generate(3000, seed=5)


def test_answers_are_what_the_questions_ask_for(problems: list[WordProblem]) -> None:
    assert set(MEANT) == set(TEMPLATES) == {problem.template for problem in problems}
    for problem in problems:
        assert final(problem) == MEANT[problem.template](*problem.numbers), problem


def test_every_line_is_a_true_calculation_over_known_numbers(problems: list[WordProblem]) -> None:
    for problem in problems:
        known = {str(number) for number in (*problem.numbers, 2)}
        lines = problem.answer.split("\n")
        assert len(lines) == problem.steps + 1 == TEMPLATES[problem.template][0] + 1
        for line in lines[:-1]:
            ((calculation, value, shown),) = _MARK.findall(line)
            assert exact(calculation) == Fraction(value), line
            assert shown == value
            assert f"{calculation} = <<" in line
            # A line uses what the question gives or what a line before has found, and nothing else.
            assert set(re.findall(r"\d+", calculation)) <= known, problem
            known.add(value)
        assert lines[-1] == f"#### {value}"


def test_questions_give_their_numbers_in_order(problems: list[WordProblem]) -> None:
    for problem in problems:
        assert tuple(map(int, re.findall(r"\d+", problem.question))) == problem.numbers
        assert problem.question.endswith("?")


def test_numbers_are_positive_and_sane(problems: list[WordProblem]) -> None:
    for problem in problems:
        values = [int(text) for text in re.findall(r"\d+", problem.answer)]
        # From 2 on, every noun is a plural.
        assert min(*values, *problem.numbers) >= 2
        assert max(values) <= 999
        assert "-" not in re.sub(r"\d-\d", "", problem.answer)


def test_all_numbers_of_steps_occur(problems: list[WordProblem]) -> None:
    assert {problem.steps for problem in problems} == {1, 2, 3, 4}
    assert len(TEMPLATES) >= 12
    assert {problem.steps for problem in generate(200, most_steps=2)} == {1, 2}


def test_train_and_test_share_no_numbers_whatever_the_seed() -> None:
    train = {(p.template, p.numbers) for seed in range(4) for p in generate(1500, seed=seed)}
    test = {(p.template, p.numbers) for seed in range(4) for p in generate(400, seed=seed, split="test")}
    assert not train & test
    assert all(split_of(*key) == "train" for key in train)
    assert all(split_of(*key) == "test" for key in test)


def test_no_question_twice(problems: list[WordProblem]) -> None:
    assert len({problem.question for problem in problems}) == len(problems)


def test_the_first_problems_do_not_depend_on_the_count() -> None:
    assert generate(300, seed=3)[:40] == generate(40, seed=3)
    assert generate(40, seed=3) != generate(40, seed=4)


@pytest.mark.parametrize(
    ("split", "digest"),
    [("train", "c855cf92cf723661"), ("test", "777c7c71eca4d7bf")],
)
def test_a_seed_gives_the_same_bytes_everywhere(split: str, digest: str) -> None:
    text = "\n\n".join(f"{p.question}\n{p.answer}" for p in generate(500, seed=11, split=split))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


def test_requests_that_cannot_be_met() -> None:
    with pytest.raises(UsageError, match=r"there is no split 'dev' of word problems; there are train, test"):
        generate(3, split="dev")
    with pytest.raises(UsageError, match="count of word problems is 0; allowed is 1 to 100000"):
        generate(0)
    with pytest.raises(UsageError, match="seed of word problems is -1; allowed is 0 or more"):
        generate(1, seed=-1)
    with pytest.raises(UsageError, match="most_steps of word problems is 5; allowed is 1 to 4"):
        generate(1, most_steps=5)
    assert SPLITS == ("train", "test")
