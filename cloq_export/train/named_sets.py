"""Training sets by name: from the data folder or the hub, or generated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from cloq_export.errors import DataError
from cloq_export.run.data_sets import hub_rows, local_file
from cloq_export.train.examples import Example, ExampleSet, example_of, read_examples


@dataclasses.dataclass(frozen=True)
class HubSource:
    """Where a set lies on the hub.

    Args:
        identifier: the data set.
        config: of the data set, None for its own default.
    """

    identifier: str
    config: str | None = None


@dataclasses.dataclass(frozen=True)
class NamedSet:
    """A set that is known by name.

    Args:
        splits: split -> its file in the data folder, without suffix.
        suffixes: what the file may end in.
        hub: where else it is.
    """

    splits: Mapping[str, str]
    suffixes: tuple[str, ...]
    hub: HubSource


NAMED_SETS: Mapping[str, NamedSet] = MappingProxyType(
    {
        "wikitext2": NamedSet(
            {"train": "wikitext2/train", "validation": "wikitext2/valid", "test": "wikitext2/test"},
            (".txt",),
            HubSource("Salesforce/wikitext", "wikitext-2-v1"),
        ),
        "gsm8k": NamedSet(
            {"train": "gsm8k/train", "test": "gsm8k/test"}, (".jsonl", ".json"), HubSource("openai/gsm8k", "main")
        ),
    }
)


def load_named_set(name: str, split: str = "train") -> ExampleSet:
    """Return a set by its name: from the data folder if it has it, else from the hub.

    Args:
        name: a key of `NAMED_SETS`.
        split: one that the set has.

    Raises:
        DataError: there is no such set or split, or it is neither in the data folder nor reachable on the hub.
        MissingPackageError: it is on the hub, and `datasets` is not installed.
    """
    if name not in NAMED_SETS:
        raise DataError(f"there is no data set named {name!r}; there are {', '.join(NAMED_SETS)}.")
    known = NAMED_SETS[name]
    if split not in known.splits:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(known.splits)}.")
    files = [known.splits[split] + suffix for suffix in known.suffixes]
    path = local_file(*files)
    if path is not None:
        return read_examples(path)
    rows = hub_rows(
        known.hub.identifier,
        known.hub.config,
        split,
        remedy=f"Name a file, or put {files[0]} into the folder that the environment variable CLOQ_DATA names.",
    )
    origin = ":".join(part for part in ("hub", known.hub.identifier, known.hub.config, split) if part)
    if known.suffixes == (".txt",):
        # The hub drops the blank that the original file has on empty lines.
        return ExampleSet.of([Example(None, "".join(row["text"] or " \n" for row in rows))], origin)
    return ExampleSet.of((example_of(row, f"row {n} of {origin}") for n, row in enumerate(rows, start=1)), origin)


def load_examples(name: str, split: str | None = None) -> ExampleSet:
    """Return examples by whatever a user names them by.

    Args:
        name: a named set `NAME[:SPLIT]`, a file, or a hub data set `ID[:CONFIG[:SPLIT]]`.
        split: of a set or a hub data set that names none; None is "train". A file has no splits.

    Raises:
        DataError: it cannot be found or read, or a line of it is malformed.
        MissingPackageError: it is on the hub, and `datasets` is not installed.
    """
    first, _, rest = name.partition(":")
    if first in NAMED_SETS:
        return load_named_set(first, rest or split or "train")
    path = Path(name).expanduser()
    if path.exists() or path.suffix or name.startswith((".", "/", "~")) or "/" not in name:
        return read_examples(path)
    config, _, own_split = rest.partition(":")
    chosen = own_split or split or "train"
    rows = hub_rows(first, config or None, chosen, remedy="Name a file instead.")
    origin = ":".join(part for part in ("hub", first, config, chosen) if part)
    return ExampleSet.of((example_of(row, f"row {n} of {origin}") for n, row in enumerate(rows, start=1)), origin)
