"""Rows of the eight commonsense sets: as lm-evaluation-harness puts their questions, and as LLM-Adapters does."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cloq_export.errors import DataError


@dataclasses.dataclass(frozen=True)
class Choices:
    """One question as the harness puts it.

    Args:
        pairs: (context, continuation) of each choice.
        lengths: letters of each choice, by which a log-likelihood is divided for the normalised score.
        gold: number of the right choice.
    """

    pairs: tuple[tuple[str, str], ...]
    lengths: tuple[int, ...]
    gold: int


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    text = row.get(field)
    if not isinstance(text, str):
        raise _lacks(row, field, where)
    return text


def _texts(row: Mapping[str, Any], field: str, where: str) -> list[str]:
    texts = row.get(field)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise _lacks(row, field, where)
    return texts


def _lacks(row: Mapping[str, Any], field: str, where: str) -> DataError:
    hint = (
        " It is a row of LLM-Adapters, which can be asked for as TASK:instruction."
        if "instruction" in row
        else " Mend the row, or name another file."
    )
    return DataError(
        f"{where} has no {field!r} as this task needs it; it has the fields "
        f"{', '.join(str(name)[:40] for name in list(row)[:12]) or 'none'}.{hint}"
    )


def _index(found: Any, count: int, where: str, *, first: int = 0) -> int:
    """Return a choice's number, counted from 0, from the number that a row gives, counted from `first`."""
    try:
        number = int(found) - first
    except (TypeError, ValueError):
        number = -1
    if isinstance(found, float) or not 0 <= number < count:
        raise DataError(
            f"{where}: no answer can be read out of {str(found)[:60]!r}; a number of {first} to {first + count - 1} is "
            "needed. Mend the row, or name another file."
        )
    return number


def continued(context: str, choices: Sequence[str], gold: int) -> Choices:
    """Return a question whose choices all continue one text.

    Args:
        context: the text, without a blank at its end.
        choices: what may follow it.
        gold: number of the right choice.
    """
    return Choices(tuple((context, f" {choice}") for choice in choices), tuple(len(choice) for choice in choices), gold)


def _adapters_row(row: Mapping[str, Any], where: str, labels: Sequence[str]) -> tuple[str, str]:
    label = str(row.get("answer")).strip()
    if label not in labels:
        raise DataError(
            f"{where}: no answer can be read out of {str(row.get('answer'))[:60]!r}; one of {', '.join(labels)} is "
            "needed. Mend the row, or name another file."
        )
    return _text(row, "instruction", where), label


def _listed(word: str, choices: Sequence[str], *, between: str = " ") -> str:
    return between.join(f"{word}{number}: {choice}" for number, choice in enumerate(choices, start=1))


def numbered_labels(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{number}" for number in range(1, count + 1))


def _question_instruction(question: str, choices: Sequence[str]) -> str:
    return (
        f"Please choose the correct answer to the question: {question}\n\n{_listed('Answer', choices)}\n\n"
        f"Answer format: {'/'.join(numbered_labels('answer', len(choices)))}"
    )


def _boolq_answer(row: Mapping[str, Any], where: str) -> int:
    # The hub has it as "answer" (google/boolq) and as "label" (SuperGLUE).
    answer = row.get("answer", row.get("label"))
    return int(answer) if isinstance(answer, bool) else _index(answer, 2, where)


def read_boolq_choices(row: Mapping[str, Any], where: str) -> Choices:
    context = f"{_text(row, 'passage', where)}\nQuestion: {_text(row, 'question', where)}?\nAnswer:"
    return continued(context, ("no", "yes"), _boolq_answer(row, where))


def read_boolq_instruction(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    if "instruction" in row:
        return _adapters_row(row, where, ("true", "false"))
    asked = (
        f"Please answer the following question with true or false, question: {_text(row, 'question', where)}?\n\n"
        "Answer format: true/false"
    )
    return asked, ("false", "true")[_boolq_answer(row, where)]


def _piqa_parts(row: Mapping[str, Any], where: str) -> tuple[str, list[str], int]:
    solutions = [_text(row, field, where) for field in ("sol1", "sol2")]
    return _text(row, "goal", where), solutions, _index(row.get("label"), 2, where)


def read_piqa_choices(row: Mapping[str, Any], where: str) -> Choices:
    goal, solutions, gold = _piqa_parts(row, where)
    return continued(f"Question: {goal}\nAnswer:", solutions, gold)


def read_piqa_instruction(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    if "instruction" in row:
        return _adapters_row(row, where, numbered_labels("solution", 2))
    goal, solutions, gold = _piqa_parts(row, where)
    # PIQA alone has its choices on lines of their own.
    asked = (
        f"Please choose the correct solution to the question: {goal}\n\n"
        f"{_listed('Solution', solutions, between=chr(10) * 2)}\n\nAnswer format: solution1/solution2"
    )
    return asked, f"solution{gold + 1}"


def _siqa_parts(row: Mapping[str, Any], where: str) -> tuple[str, list[str], int]:
    answers = [_text(row, field, where) for field in ("answerA", "answerB", "answerC")]
    asked = f"{_text(row, 'context', where)} {_text(row, 'question', where)}"
    return asked, answers, _index(row.get("label"), 3, where, first=1)


def read_siqa_choices(row: Mapping[str, Any], where: str) -> Choices:
    asked, answers, gold = _siqa_parts(row, where)
    return continued(f"Q: {asked}\nA:", answers, gold)


def read_siqa_instruction(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    if "instruction" in row:
        return _adapters_row(row, where, numbered_labels("answer", 3))
    asked, answers, gold = _siqa_parts(row, where)
    return _question_instruction(asked, answers), f"answer{gold + 1}"


def _cleaned(text: str) -> str:
    # Brackets are what scraping has left in the texts from WikiHow.
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def read_hellaswag_choices(row: Mapping[str, Any], where: str) -> Choices:
    endings = [_cleaned(ending) for ending in _texts(row, "endings", where)]
    context = f"{_text(row, 'ctx_a', where)} {_text(row, 'ctx_b', where).capitalize()}"
    query = _cleaned(f"{_text(row, 'activity_label', where)}: {context}")
    return continued(query, endings, _index(row.get("label"), len(endings), where))


def read_hellaswag_instruction(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    if "instruction" in row:
        return _adapters_row(row, where, numbered_labels("ending", 4))
    endings = _texts(row, "endings", where)
    asked = (
        "Please choose the correct ending to complete the given sentence: "
        f"{_text(row, 'activity_label', where)}: {_text(row, 'ctx', where)}\n\n{_listed('Ending', endings)}\n\n"
        f"Answer format: {'/'.join(numbered_labels('ending', len(endings)))}"
    )
    return asked, f"ending{_index(row.get('label'), len(endings), where) + 1}"


def _winogrande_parts(row: Mapping[str, Any], where: str) -> tuple[str, list[str], int]:
    sentence = _text(row, "sentence", where)
    if "_" not in sentence:
        raise DataError(f"{where}: 'sentence' has no blank '_' to fill in; mend the row, or name another file.")
    options = [_text(row, field, where) for field in ("option1", "option2")]
    return sentence, options, _index(row.get("answer"), 2, where, first=1)


def read_winogrande_choices(row: Mapping[str, Any], where: str) -> Choices:
    sentence, options, gold = _winogrande_parts(row, where)
    before, _, after = sentence.partition("_")
    contexts = [before + option for option in options]
    # The choices are the beginnings here, and what follows the blank is scored behind each.
    pairs = tuple((context, f" {after.strip()}") for context in contexts)
    return Choices(pairs, tuple(len(context) for context in contexts), gold)


def read_winogrande_instruction(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    if "instruction" in row:
        return _adapters_row(row, where, numbered_labels("option", 2))
    sentence, options, gold = _winogrande_parts(row, where)
    asked = (
        f"Please choose the correct answer to fill in the blank to complete the given sentence: {sentence}\n\n"
        f"{_listed('Option', options)} Answer format: option1/option2"
    )
    return asked, f"option{gold + 1}"


def _lettered_parts(row: Mapping[str, Any], field: str, where: str) -> tuple[str, list[str], int]:
    """Return question, choices and right choice of a row of ARC or OpenBookQA."""
    choices = row.get("choices")
    if not isinstance(choices, Mapping):
        raise _lacks(row, "choices", where)
    texts, labels = _texts(choices, "text", where), _texts(choices, "label", where)
    key = str(row.get("answerKey")).strip()
    if key not in labels or len(labels) != len(texts):
        raise DataError(
            f"{where}: no answer can be read out of {key[:60]!r}; one of {', '.join(labels)} is needed. Mend the row, "
            "or name another file."
        )
    return _text(row, field, where), texts, labels.index(key)


def read_arc_choices(row: Mapping[str, Any], where: str) -> Choices:
    question, choices, gold = _lettered_parts(row, "question", where)
    return continued(f"Question: {question}\nAnswer:", choices, gold)


def read_obqa_choices(row: Mapping[str, Any], where: str) -> Choices:
    return continued(*_lettered_parts(row, "question_stem", where))


def read_lettered_instruction(field: str) -> Callable[[Mapping[str, Any], str], tuple[str, str]]:
    def instruction(row: Mapping[str, Any], where: str) -> tuple[str, str]:
        if "instruction" in row:
            return _adapters_row(row, where, numbered_labels("answer", 5))
        question, choices, gold = _lettered_parts(row, field, where)
        return _question_instruction(question, choices), f"answer{gold + 1}"

    return instruction
