"""Which words come next: questions out of any text, for models that the usual tasks are too hard for.

A paragraph's first words are the question; the choices are the words that follow them, and those that stand at the
same place of the paragraphs around it. The form is that of SWAG and HellaSwag (Zellers et al., arXiv:1808.05326 and
1905.07830); nothing is drawn at random.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from cloq_export.parity.commonsense_rows import Choices, continued

CHOICES = 4
_CONTEXT_WORDS = 20
PARAGRAPH_WORDS = _CONTEXT_WORDS + 8
# What stands in WikiText for a word that was left out.
_LEFT_OUT = "<unk>"


def continuation_rows(text: str, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (place, {"context", "endings", "label"}) of every question that a text gives.

    A paragraph is a line. Those that are long enough come four at a time: each is asked about once, with the endings of
    all four, so that every ending is right as often as any other. What is left behind the last four is not asked.

    Args:
        text: any text; in WikiText a paragraph whose ending lacks a word is passed over.
        where: what it is called in messages.
    """
    paragraphs = _paragraphs(text)
    while len(group := list(islice(paragraphs, CHOICES))) == CHOICES:
        endings = [ending for _, _, ending in group]
        for label, (line, context, _) in enumerate(group):
            yield f"{where}, line {line}", {"context": context, "endings": endings, "label": label}


def read_continuation(row: Mapping[str, Any], where: str) -> Choices:
    """Return the question of a row as its choices are scored.

    Args:
        row: as `continuation_rows` gives it.
        where: which row it is; nothing can be missing in these.
    """
    return continued(row["context"], row["endings"], row["label"])


def _paragraphs(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line, first words, next words) of the paragraphs that are long enough."""
    for number, line in enumerate(text.split("\n"), start=1):
        words = line.split()
        ending = words[_CONTEXT_WORDS:PARAGRAPH_WORDS]
        if len(words) >= PARAGRAPH_WORDS and _LEFT_OUT not in ending:
            yield number, " ".join(words[:_CONTEXT_WORDS]), " ".join(ending)
