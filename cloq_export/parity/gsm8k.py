"""GSM8K as lm-evaluation-harness defines it: prompts, where an answer ends, and how its number is read."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cloq_export.errors import DataError, FormatError
from cloq_export.parity.answers import INVALID
from cloq_export.parity.harness import RELEASE, installed_definition, installed_release
from cloq_export.texts.examples import question_prompt

_HARNESS_FILE = "gsm8k/gsm8k.yaml"
# How the harness joins problems with their answers, and examples with each other.
_TARGET_DELIMITER, _EXAMPLE_DELIMITER = " ", "\n\n"
# The harness's own seed for drawing examples.
_EXAMPLE_SEED = 1234


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem.

    Args:
        question: its text.
        answer: the worked solution, the number behind "####" last.
    """

    question: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Definition:
    """What makes a score comparable: every rule of the task, with the version that the harness gives it.

    Args:
        version: of the task.
        origin: where the rules were read.
        until: texts that end an answer.
        strict: the regular expression whose first match is the answer of the filter "strict-match".
        flexible: that whose last match is the answer of the filter "flexible-extract".
        ignored: what is taken out of both answers before they are compared, in this order.
    """

    version: str
    origin: str
    until: tuple[str, ...]
    strict: str
    flexible: str
    ignored: tuple[str, ...]

    def prompt(self, problem: Problem, examples: Sequence[Problem] = ()) -> str:
        """Return the text that a model continues: examples with their answers, then the problem."""
        return self.worked(examples) + question_prompt(problem.question)

    def worked(self, examples: Sequence[Problem]) -> str:
        """Return examples with their answers as they stand before a problem."""
        return "".join(
            f"{question_prompt(each.question)}{_TARGET_DELIMITER}{each.answer}{_EXAMPLE_DELIMITER}" for each in examples
        )

    def extract(self, text: str, *, strict: bool = False) -> str:
        """Return the number that an answer gives as its author wrote it, "[invalid]" if there is none."""
        matches = re.findall(self.strict if strict else self.flexible, text)
        if not matches:
            return INVALID
        match = matches[0 if strict else -1]
        if isinstance(match, tuple):
            match = next((part for part in match if part), INVALID)
        return str(match).strip()

    def normal_form(self, answer: str) -> str:
        """Return an extracted answer, or a worked solution, in the form in which answers are compared."""
        for pattern in self.ignored:
            answer = re.sub(pattern, "", answer)
        return answer.lower()

    def is_correct(self, extracted: str, problem: Problem) -> bool:
        """Return whether an extracted answer is the problem's own."""
        return self.normal_form(extracted) == self.normal_form(problem.answer)


EMBEDDED = Definition(
    version="3.0",
    origin=f"lm-evaluation-harness gsm8k, as of {RELEASE}",
    until=("Question:", "</s>", "<|im_end|>"),
    strict=r"#### (\-?[0-9\.\,]+)",
    flexible=r"(-?[$0-9.,]{2,})|(-?[0-9]+)",
    ignored=(",", r"\$", r"(?s).*#### ", r"\.$"),
)


def task_definition() -> Definition:
    """Return the rules of the installed lm-evaluation-harness, or those of its version 3.0 of the task, kept here.

    Only the task's file is read: nothing of the harness is imported, and no network is needed.

    Raises:
        FormatError: the installed harness defines the task in a form that is not known here.
    """
    path = installed_definition(_HARNESS_FILE)
    return EMBEDDED if path is None else read_definition(path)


def read_definition(path: Path) -> Definition:
    """Return the rules that a task file of the harness gives.

    Args:
        path: gsm8k.yaml of the harness.

    Raises:
        FormatError: it is not the task as it is known here: other prompts, filters or metrics.
    """
    try:
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
        filters = {entry["name"]: entry["filter"] for entry in task["filter_list"]}
        strict, flexible = (
            next(step for step in filters[name] if step["function"] == "regex")
            for name in ("strict-match", "flexible-extract")
        )
        metric = task["metric_list"][0]
        known = (
            task["doc_to_text"] == "Question: {{question}}\nAnswer:"
            and task["doc_to_target"] == "{{answer}}"
            and metric["metric"] == "exact_match"
            and metric["ignore_case"] is True
            and metric["ignore_punctuation"] is False
            and strict.get("group_select", 0) == 0
            and flexible.get("group_select", 0) == -1
        )
        definition = Definition(
            version=str(task["metadata"]["version"]),
            origin=f"{installed_release()}, gsm8k",
            until=tuple(task["generation_kwargs"]["until"]),
            strict=strict["regex_pattern"],
            flexible=flexible["regex_pattern"],
            ignored=tuple(metric["regexes_to_ignore"]),
        )
        for pattern in (definition.strict, definition.flexible, *definition.ignored):
            re.compile(pattern)
    except (OSError, yaml.YAMLError, KeyError, TypeError, IndexError, StopIteration, AttributeError, re.error) as error:
        raise FormatError(
            f"{path} does not define gsm8k as it is known here ({type(error).__name__}: {str(error)[:120]}); install "
            f"{RELEASE}, or none: its rules are kept here too."
        ) from None
    if not known:
        raise FormatError(
            f"{path} defines gsm8k with other prompts, filters or metrics than are known here; install {RELEASE}, "
            "or none: its rules are kept here too."
        )
    return definition


def problem_of(row: Mapping[str, Any], where: str) -> Problem:
    """Return the problem that a row holds.

    Args:
        row: with "question" and "answer".
        where: which row it is, for messages.

    Raises:
        DataError: one of the two is missing, or no answer can be read out of the solution.
    """
    for field in ("question", "answer"):
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise DataError(
                f"{where} has no text {field!r}; each row holds 'question' and 'answer'. Mend it, or fetch the file "
                "again."
            )
    if "####" not in row["answer"]:
        raise DataError(f"{where} has an answer without '#### NUMBER' at its end; mend it, or fetch the file again.")
    return Problem(row["question"], row["answer"])


def choose_examples(problems: Sequence[Problem], count: int, number: int) -> list[Problem]:
    """Return the worked examples that stand before a problem, the same ones that lm-evaluation-harness draws.

    The harness draws for one problem after the other, from the first on, with one generator
    (lm_eval/api/samplers.py: ContextSampler.sample; lm_eval/defaults.py: DEFAULT_OTHER_SEED).

    Args:
        problems: the training problems, in the order of the data set.
        count: how many.
        number: of the problem that they stand before, counted from 0.

    Raises:
        DataError: there are fewer training problems than examples.
    """
    if count > len(problems):
        raise DataError(
            f"{count} worked examples were asked for, and there are {len(problems)} training problems; choose fewer "
            "`shots`."
        )
    draw = random.Random(_EXAMPLE_SEED)
    places = [draw.sample(range(len(problems)), count) for _ in range(number + 1)]
    return [problems[place] for place in places[-1]]
