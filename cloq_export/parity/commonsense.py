"""The eight commonsense sets: as lm-evaluation-harness scores them, and as LLM-Adapters puts and reads them.

The harness takes the choice whose continuation is the most probable. LLM-Adapters (Hu et al., arXiv:2304.01933; its
commonsense_evaluate.py), and the paper with it, lets the model write and takes the first label of the text.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from cloq_export.errors import FormatError
from cloq_export.parity.answers import INVALID
from cloq_export.parity.commonsense_rows import (
    Choices,
    numbered_labels,
    read_arc_choices,
    read_boolq_choices,
    read_boolq_instruction,
    read_hellaswag_choices,
    read_hellaswag_instruction,
    read_lettered_instruction,
    read_obqa_choices,
    read_piqa_choices,
    read_piqa_instruction,
    read_siqa_choices,
    read_siqa_instruction,
    read_winogrande_choices,
    read_winogrande_instruction,
)
from cloq_export.parity.harness import RELEASE, installed_definition, installed_release


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
    match = re.search("|".join(map(re.escape, labels)), text)
    return match[0] if match else INVALID


def stated_label(text: str, labels: Sequence[str]) -> str:
    """Return the label that a text states as the correct answer and nothing else, in any case; else "[invalid]".

    A text states it with the words that the training set ends with, "the correct answer is LABEL", or is the label.
    """
    match = re.fullmatch(
        rf"\s*(?:the\s+correct\s+answer\s+is\s*:?\s*)?(?P<label>{'|'.join(map(re.escape, labels))})\s*\.?\s*",
        text,
        re.IGNORECASE,
    )
    return match["label"].lower() if match else INVALID


def harness_definition(chosen: CommonsenseSet) -> tuple[str, str]:
    """Return (version, origin) of a set's definition: the installed harness's if there is one, else the one kept here.

    Only the definition's file is read: nothing of the harness is imported, and no network is needed.

    Args:
        chosen: the set.

    Raises:
        FormatError: the installed harness defines the set otherwise than it is known here.
    """
    path = installed_definition(chosen.harness_file)
    if path is not None:
        return _read_definition(path, chosen), f"{installed_release()}, {chosen.harness_file}"
    return chosen.version, f"lm-evaluation-harness {chosen.harness_file}, as of {RELEASE}"


class _DefinitionLoader(yaml.SafeLoader):
    """A loader that keeps the names of the harness's functions and calls none of them."""


_DefinitionLoader.add_constructor("!function", lambda loader, node: f"!function {loader.construct_scalar(node)}")


def _read_definition(path: Path, chosen: CommonsenseSet) -> str:
    remedy = f"install {RELEASE}, or none: its rules are kept here too."
    try:
        definition = yaml.load(path.read_text(encoding="utf-8"), Loader=_DefinitionLoader)
        if "include" in definition:
            base = yaml.load(
                (path.parent / definition["include"]).read_text(encoding="utf-8"), Loader=_DefinitionLoader
            )
            definition = {**base, **definition}
        version = str(definition["metadata"]["version"])
        differing = [name for name, value in chosen.harness.items() if definition.get(name) != value]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{path} is no task definition as it is known here ({type(error).__name__}: {str(error)[:120]}); {remedy}"
        ) from None
    if differing:
        raise FormatError(f"{path} defines {', '.join(differing)} otherwise than it is known here; {remedy}")
    return version


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
            read_boolq_choices,
            read_boolq_instruction,
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
            read_piqa_choices,
            read_piqa_instruction,
            numbered_labels("solution", 2),
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
            read_siqa_choices,
            read_siqa_instruction,
            numbered_labels("answer", 5),
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
            read_hellaswag_choices,
            read_hellaswag_instruction,
            numbered_labels("ending", 4),
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
            read_winogrande_choices,
            read_winogrande_instruction,
            numbered_labels("option", 2),
        ),
        "arc-e": CommonsenseSet(
            ("allenai/ai2_arc", "ARC-Easy", "test"),
            "ARC-Easy",
            "arc/arc_easy.yaml",
            _ARC,
            "1.0",
            read_arc_choices,
            read_lettered_instruction("question"),
            numbered_labels("answer", 5),
        ),
        "arc-c": CommonsenseSet(
            ("allenai/ai2_arc", "ARC-Challenge", "test"),
            "ARC-Challenge",
            "arc/arc_challenge.yaml",
            _ARC,
            "1.0",
            read_arc_choices,
            read_lettered_instruction("question"),
            numbered_labels("answer", 5),
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
            read_obqa_choices,
            read_lettered_instruction("question_stem"),
            numbered_labels("answer", 5),
        ),
    }
)
