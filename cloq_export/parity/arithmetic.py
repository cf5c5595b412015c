"""Answers to arithmetic problems: the number or the letter that a text gives, by the rules of LLM-Adapters and stated.

The paper measures the arithmetic sets as LLM-Adapters does (Hu et al., arXiv:2304.01933; its evaluate.py): the last
number of the text is the answer, and for AQuA the first of the letters A to E, wherever it stands. Beside them the
stated answer is read: what follows "the answer is", "####" or a box, and nothing where a text states none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from cloq_export.errors import DataError
from cloq_export.parity.answers import INVALID

# An answer is right that is this close (evaluate.py of LLM-Adapters).
TOLERANCE = Fraction(1, 1000)
LETTERS = "ABCDE"

_LAST_NUMBER = re.compile(r"-?\d+\.?\d*")
_NUMBER = r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:\s*/\s*\d+(?:\.\d+)?)?"
# Currency and the like that may stand between the statement and the number.
_BEFORE = r"[\s:=≈*_$€£(\[]*(?:\\?\$|\\text\{|USD|Rs\.?)?[\s*_]*"
_STATED = re.compile(
    rf"(?:\banswer(?:\s+(?:here|choice))?\s*(?:is|are|was|will\s+be|equals|:|=)|####|\\boxed\{{)(?:\s+(?:about|exactly))?{_BEFORE}"
    rf"(?P<sign>-\s*\$\s*)?(?P<number>{_NUMBER})",
    re.IGNORECASE,
)
# Neither exponents nor thousands of digits: what a file holds must not cost memory.
_VALUE = re.compile(r"(?P<above>-?(?:\d{1,40}(?:\.\d{1,40})?|\.\d{1,40}))\.?(?:/(?P<below>\d{1,40}(?:\.\d{1,40})?))?")
_FIRST_LETTER = re.compile("|".join(LETTERS))
_STATED_LETTER = re.compile(
    rf"(?:\banswer(?:\s+choice)?\s*(?:is|:|=)(?:\s+option)?|\\boxed\{{)[\s*_(\[]*(?P<letter>[{LETTERS}])(?![\w'])",
    re.IGNORECASE,
)


def last_number(text: str) -> str:
    """Return the last number of a text as it is written there, without commas; "[invalid]" if there is none."""
    numbers = _LAST_NUMBER.findall(text.replace(",", ""))
    return numbers[-1] if numbers else INVALID


def stated_number(text: str) -> str:
    """Return the number that a text states as its answer, the last one if it states several; else "[invalid]"."""
    statements = list(_STATED.finditer(text))
    if not statements:
        return INVALID
    number = re.sub(r"[,\s+]", "", statements[-1]["number"]).replace("−", "-")
    return f"-{number}" if statements[-1]["sign"] else number


def number_value(text: str) -> Fraction | None:
    """Return the value of a number or a fraction, exactly; None if it is none.

    Args:
        text: as an extraction rule gives it.
    """
    match = _VALUE.fullmatch(text.strip())
    if match is None or Fraction(match["below"] or 1) == 0:
        return None
    return Fraction(match["above"]) / Fraction(match["below"] or 1)


def is_number_right(extracted: str, gold: str) -> bool:
    """Return whether two numbers differ by no more than a thousandth."""
    first, second = number_value(extracted), number_value(gold)
    return first is not None and second is not None and abs(first - second) <= TOLERANCE


def number_form(text: str) -> str:
    """Return a number in the form in which answers are compared."""
    value = number_value(text)
    return text if value is None else str(value)


def first_letter(text: str) -> str:
    """Return the first of the letters A to E in a text, even inside a word; "[invalid]" if there is none."""
    match = _FIRST_LETTER.search(text)
    return match[0] if match else INVALID


def stated_letter(text: str) -> str:
    """Return the letter that a text states as its answer, the last one if it states several; else "[invalid]"."""
    letters = _STATED_LETTER.findall(text)
    return letters[-1].upper() if letters else INVALID


def gold_number(answer: Any, where: str) -> str:
    """Return the right answer of a row as an exact number.

    Args:
        answer: a number, a text with one, a worked solution that ends with "#### NUMBER", or a list whose last is one.
        where: which row it is, for messages.

    Raises:
        DataError: no number can be read out of it.
    """
    if isinstance(answer, list) and answer:
        answer = answer[-1]
    text = str(answer).rpartition("####")[2].replace(",", "").replace("$", "").strip()
    if isinstance(answer, float):
        text = format(answer, ".6f")
    value = None if isinstance(answer, bool) else number_value(text)
    if value is None:
        raise DataError(
            f"{where}: no answer can be read out of {str(answer)[:60]!r}; a number is needed, or a solution that ends "
            "with '#### NUMBER'. Mend the row, or name another file."
        )
    return str(value)


def gold_letter(answer: Any, where: str) -> str:
    """Return the right answer of a row as a letter.

    Args:
        answer: a letter of A to E, or a list whose last is one.
        where: which row it is, for messages.

    Raises:
        DataError: it is no such letter.
    """
    if isinstance(answer, list) and answer:
        answer = answer[-1]
    letter = str(answer).strip(" ().").upper()
    if len(letter) != 1 or letter not in LETTERS:
        raise DataError(
            f"{where}: no answer can be read out of {str(answer)[:60]!r}; one of the letters {LETTERS[0]} to "
            f"{LETTERS[-1]} is needed. Mend the row, or name another file."
        )
    return letter


def read_svamp(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    """Return (instruction, right answer) of a row of SVAMP, as it is on the hub or in LLM-Adapters."""
    if "Body" in row:
        body, question = _text(row, "Body", where), _text(row, "Question", where)
        # LLM-Adapters writes both as sentences.
        return f"{body.rstrip('. ')}. {question}", gold_number(row.get("Answer"), where)
    return read_instruction(row, where)


def read_mawps(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    """Return (instruction, right answer) of a row of MAWPS, as it is on the hub or in LLM-Adapters."""
    if "question" in row:
        answer = row.get("result_float", row.get("result", row.get("answer")))
        return _text(row, "question", where), gold_number(answer, where)
    return read_instruction(row, where)


def read_gsm8k(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    """Return (instruction, right answer) of a row of GSM8K, as it is on the hub or in LLM-Adapters."""
    if "question" in row:
        return _text(row, "question", where), gold_number(row.get("answer"), where)
    return read_instruction(row, where)


def read_aqua(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    """Return (instruction, right letter) of a row of AQuA, as it is on the hub or in LLM-Adapters."""
    if "options" in row:
        options = row["options"]
        if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
            raise DataError(f"{where}: 'options' is no list of texts; mend the row, or name another file.")
        choices = " ".join("(" + option.strip().replace(")", ") ", 1).lstrip("(") for option in options)
        choices = re.sub(r"  +", " ", choices)
        question = _text(row, "question", where)
        return f"{question} Answer Choices: {choices}", gold_letter(row.get("correct"), where)
    return _text(row, "instruction", where), gold_letter(row.get("answer"), where)


def read_instruction(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    """Return (instruction, right answer) of a row of LLM-Adapters: "instruction" and "answer", a number."""
    return _text(row, "instruction", where), gold_number(row.get("answer"), where)


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    text = row.get(field)
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            f"{where} has no text {field!r}; it has the fields {', '.join(map(str, row)) or 'none'}. Mend the row, or "
            "name another file."
        )
    return text.strip()
