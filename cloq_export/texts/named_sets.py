"""Training sets by name: from the data folder or the hub, or generated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from itertools import islice
from types import MappingProxyType
from typing import Any

from cloq_export.errors import DataError, UsageError
from cloq_export.files.spelled_paths import expand_user
from cloq_export.texts.data_sets import hub_rows, local_file
from cloq_export.texts.examples import Example, ExampleSet, example_of, numbered_rows, question_prompt, read_examples
from cloq_export.texts.word_problems import MOST_STEPS, generate

WORD_PROBLEMS = "word-problems"
# Name -> the most calculations that a problem takes; the short ones are within a small model's reach.
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

    @property
    def is_text(self) -> bool:
        """Return whether a split is one plain text."""
        return all(name.endswith(".txt") for names in self.files.values() for name in names)


def _json_names(name: str) -> tuple[str, ...]:
    return (f"{name}.jsonl", f"{name}.json")


NAMED_SETS: Mapping[str, NamedSet] = MappingProxyType(
    {
        "wikitext2": NamedSet(
            {
                "train": ("wikitext2/train.txt",),
                "validation": ("wikitext2/valid.txt",),
                "test": ("wikitext2/test.txt",),
            },
            ("Salesforce/wikitext", "wikitext-2-v1"),
            "WikiText-2, word-level form",
        ),
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
    """Return the names that `load_named_set` knows."""
    return (*NAMED_SETS, *WORD_PROBLEM_SETS)


def load_named_set(name: str, split: str = "train", *, count: int | None = None) -> ExampleSet:
    """Return a set by its name: from the data folder if it has it, else from the hub; word problems are generated.

    Args:
        name: one of `set_names()`.
        split: one that the set has.
        count: only so many examples, from the start; None takes all, and of the word problems 2000 for training and
            500 for tests.

    Raises:
        DataError: there is no such set or split, or it is neither in the data folder nor reachable on the hub.
        UsageError: less than one example is asked for.
        MissingPackageError: it is on the hub, and `datasets` is not installed.
    """
    _check_count(count)
    if name in WORD_PROBLEM_SETS:
        return _word_problems(name, split, count)
    if name not in NAMED_SETS:
        raise DataError(f"there is no data set named {name!r}; there are {', '.join(set_names())}.")
    known = NAMED_SETS[name]
    if split not in known.files:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(known.files)}.")
    path = local_file(*known.files[split])
    if path is not None:
        return _first(read_examples(path), count)
    rows = hub_rows(
        *known.hub,
        split,
        remedy=f"Name a file, or put {known.files[split][0]} into the folder that the environment variable CLOQ_DATA "
        "names.",
    )
    origin = _hub_origin(*known.hub, split)
    if known.is_text:
        # The hub drops the blank that the original file has on empty lines.
        return ExampleSet.of([Example(None, "".join(row["text"] or " \n" for row in rows))], origin)
    return _of_rows(rows, origin, count)


def load_examples(name: str, split: str | None = None, *, count: int | None = None) -> ExampleSet:
    """Return examples by whatever a user names them by.

    Args:
        name: a named set `NAME[:SPLIT]`, a file, or a hub data set `ID[:CONFIG[:SPLIT]]`.
        split: of a set or a hub data set that names none; None is "train". A file has no splits.
        count: only so many examples, from the start.

    Raises:
        DataError: it cannot be found or read, or a line of it is malformed.
        UsageError: less than one example is asked for.
        MissingPackageError: it is on the hub, and `datasets` is not installed.
    """
    _check_count(count)
    first, _, rest = name.partition(":")
    if first in set_names():
        return load_named_set(first, rest or split or "train", count=count)
    path = expand_user(name)
    if path.is_file():
        return _first(read_examples(path), count)
    if path.exists() or path.suffix or "/" not in name or name.startswith((".", "/", "~")):
        raise DataError(
            f"{name!r} is no file and no data set that is known by name ({', '.join(set_names())}); check the path, or "
            "name a data set of the hub as ORGANISATION/NAME."
        )
    config, _, own_split = rest.partition(":")
    chosen = own_split or split or "train"
    rows = hub_rows(first, config or None, chosen, remedy="Name a file instead.")
    return _of_rows(rows, _hub_origin(first, config or None, chosen), count)


def _word_problems(name: str, split: str, count: int | None) -> ExampleSet:
    if split not in WORD_PROBLEM_COUNTS:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(WORD_PROBLEM_COUNTS)}.")
    problems = generate(count or WORD_PROBLEM_COUNTS[split], split=split, most_steps=WORD_PROBLEM_SETS[name])
    examples = [Example(question_prompt(problem.question), f" {problem.answer}") for problem in problems]
    return ExampleSet.of(examples, f"generated ({name}, {split})")


def _of_rows(rows: Iterable[Mapping[str, Any]], origin: str, count: int | None) -> ExampleSet:
    chosen = islice(numbered_rows(rows, origin), count)
    return ExampleSet.of((example_of(row, where) for where, row in chosen), origin)


def _first(whole: ExampleSet, count: int | None) -> ExampleSet:
    if count is None or count >= len(whole.examples):
        return whole
    return ExampleSet.of(whole.examples[:count], whole.origin)


def _hub_origin(identifier: str, config: str | None, split: str) -> str:
    return ":".join(part for part in ("hub", identifier, config, split) if part)


def _check_count(count: int | None) -> None:
    if count is not None and count < 1:
        raise UsageError(f"{count} examples were asked for; at least 1 is needed.")
