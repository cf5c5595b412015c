"""The eight commonsense sets: as lm-evaluation-harness scores them, and as LLM-Adapters puts and reads them.

The harness takes the choice whose continuation is the most probable. LLM-Adapters (Hu et al., arXiv:2304.01933; its
commonsense_evaluate.py), and the paper with it, lets the model write and takes the first label of the text.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from cloq_export.errors import DataError, FormatError
from cloq_export.parity.answers import INVALID

# The release of the harness whose definitions are kept here.
HARNESS_RELEASE = "0.4.13"
_HARNESS_PACKAGE = "lm_eval"


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


@dataclasses.dataclass(frozen=True)
class CommonsenseSet:
    """One of the eight sets.

    Args:
        hub: identifier, config (None for the set's own default) and split on the hub.
        folder: what LLM-Adapters calls it.
        harness_file: its definition in the harness.
        harness: what that definition must say for `choices` to be its meaning.
        version: of the definition.
        choices: from a row and its place to the question as the harness puts it.
        instruction: from a row and its place to (instruction, right label), as LLM-Adapters puts it.
        labels: what an answer can be, in LLM-Adapters.
    """

    hub: tuple[str, str | None, str]
    folder: str
    harness_file: str
    harness: Mapping[str, Any]
    version: str
    choices: Callable[[Mapping[str, Any], str], Choices]
    instruction: Callable[[Mapping[str, Any], str], tuple[str, str]]
    labels: tuple[str, ...]


def first_label(text: str, labels: Sequence[str]) -> str:
    """Return the first label that occurs in a text, in lower case as it is asked for; else "[invalid]"."""
    found = re.search("|".join(map(re.escape, labels)), text)
    return found[0] if found else INVALID


def stated_label(text: str, labels: Sequence[str]) -> str:
    """Return the label that a text states as the correct answer and nothing else, whatever its case; else "[invalid]".

    A text states it with the words that the training set ends with, "the correct answer is LABEL", or is the label.
    """
    found = re.fullmatch(
        rf"\s*(?:the\s+correct\s+answer\s+is\s*:?\s*)?(?P<label>{'|'.join(map(re.escape, labels))})\s*\.?\s*",
        text,
        re.IGNORECASE,
    )
    return found["label"].lower() if found else INVALID


def harness_definition(chosen: CommonsenseSet) -> tuple[str, str]:
    """Return (version, origin) of a set's definition: the installed harness's if there is one, else the one kept here.

    Only the definition's file is read: nothing of the harness is imported, and no network is needed.

    Args:
        chosen: the set.

    Raises:
        FormatError: the installed harness defines the set otherwise than it is known here.
    """
    spec = importlib.util.find_spec(_HARNESS_PACKAGE)
    for folder in list(spec.submodule_search_locations or ()) if spec is not None else []:
        path = Path(folder) / "tasks" / chosen.harness_file
        if path.is_file():
            return _read_definition(path, chosen), f"{_HARNESS_PACKAGE} {_harness_version()}, {chosen.harness_file}"
    return chosen.version, f"lm-evaluation-harness {chosen.harness_file}, as of {_HARNESS_PACKAGE} {HARNESS_RELEASE}"


class _DefinitionLoader(yaml.SafeLoader):
    """A loader that keeps the names of the harness's functions and calls none of them."""


_DefinitionLoader.add_constructor("!function", lambda loader, node: f"!function {loader.construct_scalar(node)}")


def _read_definition(path: Path, chosen: CommonsenseSet) -> str:
    remedy = f"install {_HARNESS_PACKAGE} {HARNESS_RELEASE}, or none: its rules are kept here too."
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=_DefinitionLoader)
        if "include" in found:
            base = yaml.load((path.parent / found["include"]).read_text(encoding="utf-8"), Loader=_DefinitionLoader)
            found = {**base, **found}
        version = str(found["metadata"]["version"])
        differing = [name for name, value in chosen.harness.items() if found.get(name) != value]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{path} is no task definition as it is known here ({type(error).__name__}: {str(error)[:120]}); {remedy}"
        ) from None
    if differing:
        raise FormatError(f"{path} defines {', '.join(differing)} otherwise than it is known here; {remedy}")
    return version


def _harness_version() -> str:
    try:
        return importlib.metadata.version(_HARNESS_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


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


def _labels(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{number}" for number in range(1, count + 1))


def _question_instruction(question: str, choices: Sequence[str]) -> str:
    return (
        f"Please choose the correct answer to the question: {question}\n\n{_listed('Answer', choices)}\n\n"
        f"Answer format: {'/'.join(_labels('answer', len(choices)))}"
    )


def _boolq_answer(row: Mapping[str, Any], where: str) -> int:
    # The hub has it as "answer" (google/boolq) and as "label" (SuperGLUE).
    found = row.get("answer", row.get("label"))
    return int(found) if isinstance(found, bool) else _index(found, 2, where)


def _boolq_choices(row: Mapping[str, Any], where: str) -> Choices:
    context = f"{_text(row, 'passage', where)}\nQuestion: {_text(row, 'question', where)}?\nAnswer:"
    return continued(context, ("no", "yes"), _boolq_answer(row, where))


def _boolq_instruction(row: Mapping[str, Any], where: str) -> tuple[str, str]:
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


def _piqa_choices(row: Mapping[str, Any], where: str) -> Choices:
    goal, solutions, gold = _piqa_parts(row, where)
    return continued(f"Question: {goal}\nAnswer:", solutions, gold)


def _piqa_instruction(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    if "instruction" in row:
        return _adapters_row(row, where, _labels("solution", 2))
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


def _siqa_choices(row: Mapping[str, Any], where: str) -> Choices:
    asked, answers, gold = _siqa_parts(row, where)
    return continued(f"Q: {asked}\nA:", answers, gold)


def _siqa_instruction(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    if "instruction" in row:
        return _adapters_row(row, where, _labels("answer", 3))
    asked, answers, gold = _siqa_parts(row, where)
    return _question_instruction(asked, answers), f"answer{gold + 1}"


def _cleaned(text: str) -> str:
    # Brackets are what scraping has left in the texts from WikiHow.
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _hellaswag_choices(row: Mapping[str, Any], where: str) -> Choices:
    endings = [_cleaned(ending) for ending in _texts(row, "endings", where)]
    context = f"{_text(row, 'ctx_a', where)} {_text(row, 'ctx_b', where).capitalize()}"
    query = _cleaned(f"{_text(row, 'activity_label', where)}: {context}")
    return continued(query, endings, _index(row.get("label"), len(endings), where))


def _hellaswag_instruction(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    if "instruction" in row:
        return _adapters_row(row, where, _labels("ending", 4))
    endings = _texts(row, "endings", where)
    asked = (
        "Please choose the correct ending to complete the given sentence: "
        f"{_text(row, 'activity_label', where)}: {_text(row, 'ctx', where)}\n\n{_listed('Ending', endings)}\n\n"
        f"Answer format: {'/'.join(_labels('ending', len(endings)))}"
    )
    return asked, f"ending{_index(row.get('label'), len(endings), where) + 1}"


def _winogrande_parts(row: Mapping[str, Any], where: str) -> tuple[str, list[str], int]:
    sentence = _text(row, "sentence", where)
    if "_" not in sentence:
        raise DataError(f"{where}: 'sentence' has no blank '_' to fill in; mend the row, or name another file.")
    options = [_text(row, field, where) for field in ("option1", "option2")]
    return sentence, options, _index(row.get("answer"), 2, where, first=1)


def _winogrande_choices(row: Mapping[str, Any], where: str) -> Choices:
    sentence, options, gold = _winogrande_parts(row, where)
    before, _, after = sentence.partition("_")
    contexts = [before + option for option in options]
    # The choices are the beginnings here, and what follows the blank is scored behind each.
    pairs = tuple((context, f" {after.strip()}") for context in contexts)
    return Choices(pairs, tuple(len(context) for context in contexts), gold)


def _winogrande_instruction(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    if "instruction" in row:
        return _adapters_row(row, where, _labels("option", 2))
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


def _arc_choices(row: Mapping[str, Any], where: str) -> Choices:
    question, choices, gold = _lettered_parts(row, "question", where)
    return continued(f"Question: {question}\nAnswer:", choices, gold)


def _obqa_choices(row: Mapping[str, Any], where: str) -> Choices:
    return continued(*_lettered_parts(row, "question_stem", where))


def _lettered_instruction(field: str) -> Callable[[Mapping[str, Any], str], tuple[str, str]]:
    def instruction(row: Mapping[str, Any], where: str) -> tuple[str, str]:
        if "instruction" in row:
            return _adapters_row(row, where, _labels("answer", 5))
        question, choices, gold = _lettered_parts(row, field, where)
        return _question_instruction(question, choices), f"answer{gold + 1}"

    return instruction


_ARC = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{choices.label.index(answerKey)}}",
    "doc_to_choice": "{{choices.text}}",
}

COMMONSENSE_SETS: Mapping[str, CommonsenseSet] = MappingProxyType(
    {
        "boolq": CommonsenseSet(
            ("aps/super_glue", "boolq", "validation"),
            "boolq",
            "super_glue/boolq/default.yaml",
            {
                "output_type": "multiple_choice",
                "doc_to_text": "{{passage}}\nQuestion: {{question}}?\nAnswer:",
                "doc_to_target": "label",
                "doc_to_choice": ["no", "yes"],
            },
            "2.0",
            _boolq_choices,
            _boolq_instruction,
            ("true", "false"),
        ),
        "piqa": CommonsenseSet(
            ("baber/piqa", None, "validation"),
            "piqa",
            "piqa/piqa.yaml",
            {
                "output_type": "multiple_choice",
                "doc_to_text": "Question: {{goal}}\nAnswer:",
                "doc_to_target": "label",
                "doc_to_choice": "{{[sol1, sol2]}}",
            },
            "1.0",
            _piqa_choices,
            _piqa_instruction,
            _labels("solution", 2),
        ),
        "siqa": CommonsenseSet(
            ("lighteval/siqa", None, "validation"),
            "social_i_qa",
            "siqa/siqa.yaml",
            {
                "output_type": "multiple_choice",
                "doc_to_text": "Q: {{context}} {{question}}\nA:",
                "target_delimiter": " ",
                "doc_to_target": "{{ (label|int) - 1 }}",
                "doc_to_choice": "{{[answerA, answerB, answerC]}}",
            },
            "0.0",
            _siqa_choices,
            _siqa_instruction,
            _labels("answer", 5),
        ),
        "hellaswag": CommonsenseSet(
            ("Rowan/hellaswag", None, "validation"),
            "hellaswag",
            "hellaswag/hellaswag.yaml",
            {
                "output_type": "multiple_choice",
                "process_docs": "!function utils.process_docs",
                "doc_to_text": "{{query}}",
                "doc_to_target": "{{label}}",
                "doc_to_choice": "choices",
            },
            "1.0",
            _hellaswag_choices,
            _hellaswag_instruction,
            _labels("ending", 4),
        ),
        "winogrande": CommonsenseSet(
            ("allenai/winogrande", "winogrande_xl", "validation"),
            "winogrande",
            "winogrande/default.yaml",
            {
                "output_type": "multiple_choice",
                "doc_to_text": "!function preprocess_winogrande.doc_to_text",
                "doc_to_target": "!function preprocess_winogrande.doc_to_target",
                "doc_to_choice": "!function preprocess_winogrande.doc_to_choice",
            },
            "1.0",
            _winogrande_choices,
            _winogrande_instruction,
            _labels("option", 2),
        ),
        "arc-e": CommonsenseSet(
            ("allenai/ai2_arc", "ARC-Easy", "test"),
            "ARC-Easy",
            "arc/arc_easy.yaml",
            _ARC,
            "1.0",
            _arc_choices,
            _lettered_instruction("question"),
            _labels("answer", 5),
        ),
        "arc-c": CommonsenseSet(
            ("allenai/ai2_arc", "ARC-Challenge", "test"),
            "ARC-Challenge",
            "arc/arc_challenge.yaml",
            _ARC,
            "1.0",
            _arc_choices,
            _lettered_instruction("question"),
            _labels("answer", 5),
        ),
        "obqa": CommonsenseSet(
            ("allenai/openbookqa", "main", "test"),
            "openbookqa",
            "openbookqa/openbookqa.yaml",
            {
                "output_type": "multiple_choice",
                "doc_to_text": "question_stem",
                "doc_to_target": "{{choices.label.index(answerKey.lstrip())}}",
                "doc_to_choice": "{{choices.text}}",
            },
            "1.0",
            _obqa_choices,
            _lettered_instruction("question_stem"),
            _labels("answer", 5),
        ),
    }
)
