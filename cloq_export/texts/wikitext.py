"""WikiText-2 in its two forms: the word-level text, and the raw one, whose rows papers join by two line feeds."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType

from cloq_export.errors import DataError
from cloq_export.texts.data_sets import hub_rows, local_file
from cloq_export.texts.reading import read_text

_HUB = "Salesforce/wikitext"
_FILES = MappingProxyType({"train": "train.txt", "validation": "valid.txt", "test": "test.txt"})


@dataclasses.dataclass(frozen=True)
class WikiText:
    """One form of WikiText-2.

    Args:
        folder: of its files in the data folder.
        config: of the data set on the hub.
        between: what stands between two lines, each with its own line feed, when they are joined.
        blank: what a line of nothing but blanks reads as.
    """

    folder: str
    config: str
    between: str
    blank: str


# The hub drops the blank that the original file has on empty lines. Of the raw form its rows are what everyone since
# OPTQ joins: lines with their line feed, empty lines as empty texts, two line feeds between any two.
WIKITEXTS: Mapping[str, WikiText] = MappingProxyType(
    {
        "wikitext2": WikiText("wikitext2", "wikitext-2-v1", "", " \n"),
        "wikitext2-raw": WikiText("wikitext2-raw", "wikitext-2-raw-v1", "\n\n", ""),
    }
)


def wikitext_files(name: str) -> dict[str, tuple[str, ...]]:
    """Return split -> what it may be called in the data folder."""
    return {split: (f"{WIKITEXTS[name].folder}/{file}",) for split, file in _FILES.items()}


def read_wikitext(name: str, split: str, *, remedy: str) -> tuple[str, str]:
    """Return (the text of a split, where it came from): from the data folder if it has it, else from the hub.

    Args:
        name: in `WIKITEXTS`.
        split: train, validation or test.
        remedy: what a user can do without the hub, a sentence.

    Raises:
        DataError: there is no such split, or it cannot be found or read.
        MissingPackageError: it is on the hub, and `datasets` is not installed.
    """
    form = WIKITEXTS[name]
    if split not in _FILES:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(_FILES)}.")
    path = local_file(*wikitext_files(name)[split])
    if path is None:
        rows = [row["text"] for row in hub_rows(_HUB, form.config, split, remedy=remedy)]
        return form.between.join(row or form.blank for row in rows), f"hub:{_HUB}:{form.config}:{split}"
    text = read_text(path)
    if form.between:
        # Not `splitlines`, which also parts a line at rarer separators.
        lines = re.findall(r"[^\n]*\n|[^\n]+$", text)
        text = form.between.join(line if line.strip() else form.blank for line in lines)
    return text, str(path)
