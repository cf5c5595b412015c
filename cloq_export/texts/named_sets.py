"""Training sets by name: from the data folder or the hub, or generated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from cloq_export.errors import DataError
from cloq_export.files.spelled_paths import expand_user
from cloq_export.texts.data_sets import hub_rows, local_file
from cloq_export.texts.examples import Example, ExampleSet, example_of, numbered_rows, question_prompt, read_examples
from cloq_export.texts.wikitext import WIKITEXTS, read_wikitext, wikitext_files
from cloq_export.texts.word_problems import MOST_STEPS, generate

WORD_PROBLEMS = "word-problems"
# Name -> the most calculations that a problem takes; a small model can learn the short ones.
WORD_PROBLEM_SETS = {WORD_PROBLEMS: MOST_STEPS, "short-word-problems": 2}
WORD_PROBLEM_COUNTS = {"train": 2000, "test": 500}


@dataclasses.dataclass(frozen=True)
class NamedSet:
    """A set that is known by name.

    Args:
        files: split -> what it may be called in the data folder, the preferred name first.
        hub: where it lies on the hub: identifier and config, None for the set's own default.
        origin: who published it, for documentation.
    """

    files: Mapping[str, tuple[str, ...]]
    hub: tuple[str, str | None]
    origin: str


def _json_names(name: str) -> tuple[str, ...]:
    return (f"{name}.jsonl", f"{name}.json")


NAMED_SETS: Mapping[str, NamedSet] = MappingProxyType(
    {
        **{
            name: NamedSet(wikitext_files(name), ("Salesforce/wikitext", form.config), f"WikiText-2, {called}")
            for (name, form), called in zip(WIKITEXTS.items(), ("word-level form", "raw form"), strict=True)
        },
        "gsm8k": NamedSet(
            {split: _json_names(f"gsm8k/{split}") for split in ("train", "test")},
            ("openai/gsm8k", "main"),
            "GSM8K",
        ),
        "math10k": NamedSet(
            {"train": (*_json_names("math10k/train"), "math_10k.json")},
            ("lmms-lab/Math10K", None),
            "Math10K of LLM-Adapters",
        ),
        "commonsense170k": NamedSet(
            {"train": (*_json_names("commonsense170k/train"), "commonsense_170k.json")},
            ("zwhe99/commonsense_170k", None),
            "Commonsense170K of LLM-Adapters",
        ),
    }
)


def set_names() -> tuple[str, ...]:
    """Return the names that `load_examples` knows."""
    return (*NAMED_SETS, *WORD_PROBLEM_SETS)


def load_examples(name: str) -> ExampleSet:
    """Return the examples that a user names.

    A set by name is read from the data folder if it has it, else from the hub; word problems are generated.

    Args:
        name: a named set `NAME[:SPLIT]`, a file, or a hub data set `ID[:CONFIG[:SPLIT]]`; the split is "train" unless
            named.

    Raises:
        DataError: it cannot be found or read, or a line of it is malformed.
        MissingPackageError: it is on the hub, and `datasets` is not installed.
    """
    first, _, rest = name.partition(":")
    if first in WORD_PROBLEM_SETS:
        return _word_problems(first, rest or "train")
    if first in NAMED_SETS:
        return _named_set(first, rest or "train")
    path = expand_user(name)
    if path.is_file():
        return read_examples(path)
    if path.exists() or path.suffix or "/" not in name or name.startswith((".", "/", "~")):
        raise DataError(
            f"{name!r} is no file and no data set that is known by name ({', '.join(set_names())}); check the path, or "
            "name a data set of the hub as ORGANISATION/NAME."
        )
    config, _, split = rest.partition(":")
    split = split or "train"
    rows = hub_rows(first, config or None, split, remedy="Name a file instead.")
    return _of_rows(rows, _hub_origin(first, config or None, split))


def _named_set(name: str, split: str) -> ExampleSet:
    known = NAMED_SETS[name]
    _check_split(name, split, known.files)
    remedy = (
        f"Name a file, or put {known.files[split][0]} into the folder that the environment variable CLOQ_DATA names."
    )
    if name in WIKITEXTS:
        text, origin = read_wikitext(name, split, remedy=remedy)
        return ExampleSet.of([Example(None, text)] if text.strip() else [], origin)
    path = local_file(*known.files[split])
    if path is not None:
        return read_examples(path)
    return _of_rows(hub_rows(*known.hub, split, remedy=remedy), _hub_origin(*known.hub, split))


def _word_problems(name: str, split: str) -> ExampleSet:
    _check_split(name, split, WORD_PROBLEM_COUNTS)
    problems = generate(WORD_PROBLEM_COUNTS[split], split=split, most_steps=WORD_PROBLEM_SETS[name])
    examples = [Example(question_prompt(problem.question), f" {problem.answer}") for problem in problems]
    return ExampleSet.of(examples, f"generated ({name}, {split})")


def _check_split(name: str, split: str, splits: Mapping[str, object]) -> None:
    if split not in splits:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(splits)}.")


def _of_rows(rows: Iterable[Mapping[str, Any]], origin: str) -> ExampleSet:
    return ExampleSet.of((example_of(row, where) for where, row in numbered_rows(rows, origin)), origin)


def _hub_origin(identifier: str, config: str | None, split: str) -> str:
    return ":".join(part for part in ("hub", identifier, config, split) if part)
