"""GSM8K as lm-evaluation-harness defines it: prompts, where an answer ends, and how its number is read."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cloq_export.errors import DataError, FormatError
from cloq_export.parity.runtime import Ended, ServedModel, TransformersModel
from cloq_export.run.data_sets import hub_rows, local_file

MAX_NEW_TOKENS = 256
INVALID = "[invalid]"
HUB_ID = "openai/gsm8k"

_FILES = {"test": "gsm8k/test.jsonl", "train": "gsm8k/train.jsonl"}
_HARNESS_PACKAGE = "lm_eval"
_HARNESS_FILE = "tasks/gsm8k/gsm8k.yaml"
# How the harness joins problems with their answers, and examples with each other.
_TARGET_DELIMITER, _EXAMPLE_DELIMITER = " ", "\n\n"
# The harness's own seed for drawing examples.
_EXAMPLE_SEED = 1234
_MAX_FILE_BYTES = 256 * 1024 * 1024


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
        shown = [f"{_question(example)}{_TARGET_DELIMITER}{example.answer}{_EXAMPLE_DELIMITER}" for example in examples]
        return "".join(shown) + _question(problem)

    def cut(self, text: str) -> str:
        """Return what stands before the first text that ends an answer."""
        for end in self.until:
            text = text.split(end, 1)[0]
        return text

    def is_ended(self, text: str) -> bool:
        """Return whether an answer has come to its end."""
        return any(end in text for end in self.until)

    def extract(self, text: str, *, strict: bool = False) -> str:
        """Return the number that an answer gives as its author wrote it, "[invalid]" if there is none."""
        found = re.findall(self.strict if strict else self.flexible, text)
        if not found:
            return INVALID
        match = found[0 if strict else -1]
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
    origin="lm-evaluation-harness gsm8k, as of lm_eval 0.4.13",
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
    spec = importlib.util.find_spec(_HARNESS_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    for folder in folders:
        path = Path(folder) / _HARNESS_FILE
        if path.is_file():
            return read_definition(path)
    return EMBEDDED


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
            origin=f"{_HARNESS_PACKAGE} {_harness_version()}, gsm8k",
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
            "lm_eval 0.4.13, or none: its rules are kept here too."
        ) from None
    if not known:
        raise FormatError(
            f"{path} defines gsm8k with other prompts, filters or metrics than are known here; install lm_eval 0.4.13, "
            "or none: its rules are kept here too."
        )
    return definition


def load_problems(name: str | None = None, *, split: str = "test") -> tuple[list[Problem], str]:
    """Return problems and where they are from.

    Args:
        name: a JSON-lines file with "question" and "answer" in each line; None takes the data folder's own (the one
            that CLOQ_DATA names), else the hub's.
        split: "test" or "train", of the data folder and the hub.

    Returns:
        (problems, origin).

    Raises:
        DataError: the file is missing or empty, or a line of it is broken: the message gives its number.
        MissingPackageError: the problems are on the hub, and `datasets` is not installed.
    """
    if name is not None:
        return read_problems(Path(name).expanduser()), name
    local = local_file(_FILES[split])
    if local is not None:
        return read_problems(local), str(local)
    return _hub_problems(split), f"hub:{HUB_ID}:main:{split}"


def read_problems(path: Path) -> list[Problem]:
    """Return the problems of a JSON-lines file.

    Raises:
        DataError: it is missing, unreadable or empty, or a line of it is broken.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        text = data.decode("utf-8")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; give a JSON-lines file with 'question' and 'answer'.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path.") from None
    except UnicodeDecodeError as error:
        broken = data[: error.start].count(b"\n") + 1
        raise DataError(f"line {broken} of {path} is not UTF-8 text; mend the line, or fetch the file again.") from None
    if len(data) > _MAX_FILE_BYTES:
        raise DataError(f"{path} is larger than {_MAX_FILE_BYTES >> 20} MiB; that is no file of problems.")
    problems = []
    # Not splitlines, which also breaks at signs that may stand inside a JSON text.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            problems.append(_problem_of(line, number, path))
    if not problems:
        raise DataError(f"{path} holds no problem; give a JSON-lines file with 'question' and 'answer'.")
    return problems


def choose_examples(problems: Sequence[Problem], count: int, number: int) -> list[Problem]:
    """Return the worked examples that stand before a problem: drawn from the training problems, seeded.

    Args:
        problems: the training problems.
        count: how many.
        number: of the problem that they stand before; the same number always gives the same examples.

    Raises:
        DataError: there are fewer training problems than examples.
    """
    if count > len(problems):
        raise DataError(
            f"{count} worked examples were asked for, and there are {len(problems)} training problems; choose fewer "
            "with --shots."
        )
    return random.Random(_EXAMPLE_SEED * 100_003 + number).sample(list(problems), count)


@dataclasses.dataclass(frozen=True)
class Answers:
    """What one model answered.

    Args:
        texts: the answers, cut where they end.
        extracted: the number of each, by the filter "flexible-extract".
        correct: whether it is right.
        strict: whether the filter "strict-match" finds the right number.
    """

    texts: tuple[str, ...]
    extracted: tuple[str, ...]
    correct: tuple[bool, ...]
    strict: tuple[bool, ...]

    @property
    def accuracy(self) -> float:
        """Return the share of right answers."""
        return sum(self.correct) / len(self.correct)

    @property
    def strict_accuracy(self) -> float:
        """Return the share of right answers in the form that the problems' own solutions have."""
        return sum(self.strict) / len(self.strict)


def ask(
    model: ServedModel,
    tokenizer: Any,
    definition: Definition,
    problems: Sequence[Problem],
    prompts: Sequence[str],
    adapter: str | None,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Answers:
    """Let a model answer, greedily, and judge the answers.

    Args:
        model: the runtime.
        tokenizer: of the model.
        definition: the rules.
        problems: the problems.
        prompts: what stands before each answer.
        adapter: name of the adapter, or None.
        max_new_tokens: where an answer is cut that has not ended by itself.

    Returns:
        Answers: one for each problem.
    """
    ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in prompts]
    options: dict[str, Any] = {}
    if isinstance(model, TransformersModel):
        # The answer is the same without: what comes behind its end is cut off below.
        options["ended"] = _ended(tokenizer, definition)
    continued = model.generate(ids, [adapter] * len(ids), max_new_tokens, **options)
    return judge(definition, problems, [_text_of(tokenizer, definition, new) for new in continued])


def judge(definition: Definition, problems: Sequence[Problem], texts: Iterable[str]) -> Answers:
    """Return the verdict on raw answers.

    Args:
        definition: the rules.
        problems: the problems.
        texts: what a model wrote behind each prompt.
    """
    cut = tuple(definition.cut(text) for text in texts)
    extracted = tuple(definition.extract(text) for text in cut)
    strict = tuple(definition.extract(text, strict=True) for text in cut)
    return Answers(
        cut,
        extracted,
        tuple(definition.is_correct(answer, problem) for answer, problem in zip(extracted, problems, strict=True)),
        tuple(definition.is_correct(answer, problem) for answer, problem in zip(strict, problems, strict=True)),
    )


def agreement(definition: Definition, first: Answers, second: Answers) -> float:
    """Return the share of problems on which two models give the same number, right or wrong."""
    pairs = list(zip(first.extracted, second.extracted, strict=True))
    return sum(definition.normal_form(a) == definition.normal_form(b) for a, b in pairs) / len(pairs)


def _question(problem: Problem) -> str:
    return f"Question: {problem.question}\nAnswer:"


def _text_of(tokenizer: Any, definition: Definition, new: Sequence[int]) -> str:
    """Return what a model wrote, without special tokens; one of them may be what ends the answer."""
    text = definition.cut(tokenizer.decode(list(new), skip_special_tokens=False))
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, "")
    return text


def _ended(tokenizer: Any, definition: Definition) -> Ended:
    # The longest end has a dozen letters: the last tokens are enough, and an end is looked for every few of them.
    return lambda new: definition.is_ended(tokenizer.decode(list(new)[-24:], skip_special_tokens=False))


def _problem_of(line: str, number: int, path: Path) -> Problem:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, Mapping):
        raise DataError(
            f"line {number} of {path} is not a JSON object; each line holds one with 'question' and 'answer'. Mend the "
            "line, or fetch the file again."
        )
    for field in ("question", "answer"):
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise DataError(
                f"line {number} of {path} has no text {field!r}; each line holds 'question' and 'answer'. Mend the "
                "line, or fetch the file again."
            )
    if "####" not in row["answer"]:
        raise DataError(
            f"line {number} of {path} has an answer without '#### NUMBER' at its end; mend the line, or fetch the file "
            "again."
        )
    return Problem(row["question"], row["answer"])


def _hub_problems(split: str) -> list[Problem]:
    rows = hub_rows(
        HUB_ID,
        "main",
        split,
        remedy="Give a JSON-lines file with --gsm8k, or put gsm8k/test.jsonl into the folder that the environment "
        "variable CLOQ_DATA names.",
    )
    return [Problem(str(row["question"]), str(row["answer"])) for row in rows]


def _harness_version() -> str:
    try:
        return importlib.metadata.version(_HARNESS_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
