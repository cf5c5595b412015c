"""Numbers and letters out of answers as models write them, by the rule of LLM-Adapters and as stated."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from cloq_export.errors import DataError
from cloq_export.parity.answers import INVALID
from cloq_export.parity.arithmetic import (
    first_letter,
    gold_letter,
    gold_number,
    is_number_right,
    last_number,
    number_form,
    number_value,
    read_aqua,
    stated_letter,
    stated_number,
)
from cloq_export.parity.tasks import find_task

# Answer of a model -> (the last number, the stated number).
NUMBERS = {
    "She played with 14 + 8 = 22 kids on Monday. The answer is 22.": ("22.", "22"),
    "14 + 8 = 22 kids": ("22", INVALID),
    "The answer is 22": ("22", "22"),
    "the answer is: 22 kids.": ("22", "22"),
    "The answer is 2 feet.": ("2", "2"),
    "The answer is 1 inch. It was 14 before.": ("14", "1"),
    # Thousands, currency, units.
    "In total that is 1,234 books.": ("1234", INVALID),
    "The answer is 1,234,567.": ("1234567.", "1234567"),
    "The answer is $27180.": ("27180.", "27180"),
    "The answer is $ 1,250.75 per week.": ("1250.75", "1250.75"),
    "The answer is £30": ("30", "30"),
    "The answer is 15%.": ("15", "15"),
    "The answer is Rs. 450": ("450", "450"),
    "It costs $5, so 3 cost $15.": ("15.", INVALID),
    # Signs, decimals, fractions.
    "The answer is -5.": ("-5.", "-5"),
    "The answer is -$5.": ("5.", "-5"),
    "The answer is −5": ("5", "-5"),
    "The answer is 0.5 hours": ("0.5", "0.5"),
    "The answer is .25": ("25", ".25"),
    "The answer is 3/4 of the cake.": ("4", "3/4"),
    "The answer is 3.0": ("3.0", "3.0"),
    "19 - 70 = -51 cakes": ("-51", INVALID),
    "10-3=7": ("7", INVALID),
    # Marks that models put around numbers.
    "**Answer: 42**": ("42", "42"),
    "The answer is **12** apples.": ("12", "12"),
    r"Thus \boxed{18}.": ("18", "18"),
    r"The answer is $\$18$.": ("18", "18"),
    "So she has <<16-3=13>>13 left.\n#### 13": ("13", "13"),
    "#### 1,000": ("1000", "1000"),
    "Answer = 7": ("7", "7"),
    "The answer should be 7": ("7", INVALID),
    # Several statements: the last one counts.
    "The answer is 3. No, wait, the answer is 4.": ("4.", "4"),
    "The answer is 12.\n\nProblem 2: 5 + 6 = 11": ("11", "12"),
    "The final answer is: 18 dollars, or 9 for each of the 2.": ("2.", "18"),
    # None at all.
    "The answer is unknown.": (INVALID, INVALID),
    "": (INVALID, INVALID),
    "I do not know...": (INVALID, INVALID),
    "The answer is forty-two.": (INVALID, INVALID),
}


@pytest.mark.parametrize("text", list(NUMBERS))
def test_numbers_of_an_answer(text: str) -> None:
    assert (last_number(text), stated_number(text)) == NUMBERS[text]


@pytest.mark.parametrize(
    ("extracted", "gold", "right"),
    [
        ("22.", "22", True),
        ("22.0005", "22", True),
        ("22.002", "22", False),
        ("3/4", "0.75", True),
        ("0.333", "1/3", True),
        ("-5", "5", False),
        (".5", "0.50", True),
        ("1/0", "0", False),
        (INVALID, "0", False),
        ("9" * 39, "9" * 39, True),
        ("9" * 5000, "9" * 5000, False),
    ],
)
def test_numbers_are_compared_by_value(extracted: str, gold: str, right: bool) -> None:
    assert is_number_right(extracted, gold) is right


def test_equal_numbers_have_one_form() -> None:
    assert number_form("22.") == number_form("22.00") == number_form("44/2") == "22"
    assert number_form(INVALID) == INVALID
    assert number_value("1e9") is None


# Answer of a model -> (the first letter, the stated letter).
LETTERS = {
    "60% of 30% of 1400 grams is 252 gms.The answer is (C).": ("C", "C"),
    "The answer is (C).": ("C", "C"),
    "The answer is C": ("C", "C"),
    "The correct answer is option D.": ("D", "D"),
    "Answer: (e)": ("A", "E"),
    r"\boxed{B}": ("B", "B"),
    "(B) 100 gms": ("B", INVALID),
    "C": ("C", INVALID),
    # The rule of LLM-Adapters takes a letter wherever it stands.
    "Because 2 + 2 = 4, the answer is (D).": ("B", "D"),
    "Each child gets 5. The answer is B.": ("E", "B"),
    "The answer is a number near 5.": (INVALID, "A"),
    "The answer is Always 5.": ("A", INVALID),
    "The answer is (A). No, the answer is (B).": ("A", "B"),
    "it is 5": (INVALID, INVALID),
    "": (INVALID, INVALID),
}


@pytest.mark.parametrize("text", list(LETTERS))
def test_letters_of_an_answer(text: str) -> None:
    assert (first_letter(text), stated_letter(text)) == LETTERS[text]


@pytest.mark.parametrize(
    ("found", "value"),
    [
        (22, "22"),
        (22.0, "22"),
        ([8.0], "8"),
        ("1,234.50", "2469/2"),
        ("$18", "18"),
        ("so 9.\n#### 1,000", "1000"),
        (-0.25, "-1/4"),
        ("3/4", "3/4"),
    ],
)
def test_right_answers_of_rows(found: Any, value: str) -> None:
    assert gold_number(found, "row") == str(Fraction(value))


@pytest.mark.parametrize("found", [None, "", "forty", [], True, float("nan"), float("inf"), "1e999999999", {"a": 1}])
def test_a_row_without_an_answer_is_named(found: Any) -> None:
    with pytest.raises(DataError, match=r"row 7: no answer can be read out of .*a number is needed.*Mend the row"):
        gold_number(found, "row 7")


def test_right_letters_of_rows() -> None:
    assert [gold_letter(found, "row") for found in ("C", ["d"], "(E)")] == ["C", "D", "E"]
    for found in (None, "F", "AB", "", []):
        with pytest.raises(DataError, match=r"row 7: no answer can be read out of .*the letters A to E is needed"):
            gold_letter(found, "row 7")


# Task -> rows as they come, and the (instruction, right answer) that both are.
ROWS: dict[str, tuple[list[dict[str, Any]], tuple[str, str]]] = {
    "gsm8k:instruction": (
        [{"question": "2+2?", "answer": "It is 4.\n#### 4"}, {"instruction": "2+2?", "answer": "4"}],
        ("2+2?", "4"),
    ),
    "svamp": (
        [
            {"Body": "Tom has 2 cakes. He eats 1", "Question": "How many are left?", "Answer": "1.0", "Type": "x"},
            {"instruction": "Tom has 2 cakes. He eats 1. How many are left?", "input": "", "answer": [1.0]},
        ],
        ("Tom has 2 cakes. He eats 1. How many are left?", "1"),
    ),
    "mawps": (
        [
            {"question": "2 1/2 of 4?", "result": "10", "result_float": 10.0, "chain": ""},
            {"instruction": "2 1/2 of 4?", "answer": 10.0},
        ],
        ("2 1/2 of 4?", "10"),
    ),
    "aqua": (
        [
            {"question": "2+2?", "options": ["A)3", "B)4 km", "C) (x)"], "rationale": "", "correct": "B"},
            {"instruction": "2+2? Answer Choices: (A) 3 (B) 4 km (C) (x)", "answer": ["B"]},
        ],
        ("2+2? Answer Choices: (A) 3 (B) 4 km (C) (x)", "B"),
    ),
}


@pytest.mark.parametrize("name", list(ROWS))
def test_rows_of_the_hub_and_of_llm_adapters_are_the_same_question(name: str) -> None:
    task, (rows, (instruction, gold)) = find_task(name), ROWS[name]
    for row in rows:
        question = task.read(row, "row")
        assert f"\n\n### Instruction:\n{instruction}\n\n### Response:\n" in question.prompt
        assert question.gold == gold


@pytest.mark.parametrize("name", list(ROWS))
def test_rows_of_another_kind_are_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"row 3 has no text .*; it has the fields text"):
        find_task(name).read({"text": "a"}, "row 3")


def test_options_that_are_no_texts() -> None:
    with pytest.raises(DataError, match="row 3: 'options' is no list of texts"):
        read_aqua({"question": "q", "options": "A)3", "correct": "A"}, "row 3")
