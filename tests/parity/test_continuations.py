"""Which words come next: what is asked about a text, and that a model that knows the text answers right."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cloq_export.errors import CalibrationError, DataError
from cloq_export.parity.answers import Respondent
from cloq_export.parity.continuations import continuation_rows
from cloq_export.parity.tasks import find_task, load_questions


def paragraph(name: str, words: int) -> str:
    return " ".join(f"{name}{number}" for number in range(words))


def text_of(paragraphs: Sequence[str]) -> str:
    return "\n\n".join(paragraphs)


def test_each_of_four_paragraphs_is_asked_about_with_the_endings_of_all() -> None:
    long = [paragraph(name, 28 + extra) for extra, name in enumerate("abcdefg")]
    short, lacking = paragraph("s", 27), long[0].replace("a23", "<unk>")
    rows = list(continuation_rows(text_of([short, *long[:2], lacking, *long[2:]]), "t.txt"))
    # Seven paragraphs: a group of four, and three that are left over.
    assert [where for where, _ in rows] == ["t.txt, line 3", "t.txt, line 5", "t.txt, line 9", "t.txt, line 11"]
    endings = [" ".join(f"{name}{number}" for number in range(20, 28)) for name in "abcd"]
    for label, ((_, row), name) in enumerate(zip(rows, "abcd", strict=True)):
        assert row == {
            "context": " ".join(f"{name}{number}" for number in range(20)),
            "endings": endings,
            "label": label,
        }
    # A word that was left out of the question is no hindrance.
    asked = list(continuation_rows(text_of([part.replace("0 ", "<unk> ", 1) for part in long[:4]]), "t.txt"))
    assert len(asked) == 4


class Knower:
    """A model that finds a token probable behind the one that it follows in the text, and no other."""

    name = "knower"

    def __init__(self, ids: Sequence[int]) -> None:
        self.pairs = set(itertools.pairwise(ids))

    def prompt_logprobs(self, prompts: Sequence[Sequence[int]], adapters: Any) -> list[torch.Tensor]:
        return [
            torch.tensor([-1.0 if pair in self.pairs else -2.0 for pair in itertools.pairwise(ids)]) for ids in prompts
        ]


class Words:
    """A tokenizer of words."""

    all_special_tokens: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.numbers.setdefault(word, len(self.numbers)) for word in text.split()]}


def test_a_model_that_knows_the_text_answers_right(tmp_path: Path) -> None:
    text = text_of([paragraph(name, 30) for name in "abcdefgh"])
    (tmp_path / "t.txt").write_text(text)
    task, tokenizer = find_task("continuations"), Words()
    questions = load_questions(task, str(tmp_path / "t.txt"), count=6)
    assert (len(questions.items), questions.origin) == (6, str(tmp_path / "t.txt"))
    assert [item.gold for item in questions.items] == ["0", "1", "2", "3", "0", "1"]
    knowing = task.ask(Respondent(Knower(tokenizer(text)["input_ids"]), tokenizer), questions)  # type: ignore[arg-type]
    assert knowing.accuracy == knowing.other_accuracy == 1.0
    # Where nothing is known the first choice is taken: right once in four.
    ignorant = task.ask(Respondent(Knower([]), tokenizer), questions)  # type: ignore[arg-type]
    assert [*ignorant.correct] == [True, False, False, False, True, False]


def test_a_text_that_gives_no_question_is_refused(tmp_path: Path) -> None:
    task = find_task("continuations")
    (tmp_path / "short.txt").write_text("Too little.\n")
    with pytest.raises(DataError, match=r"short.txt has no 4 paragraphs of 28 words or more, each on one line; name "):
        load_questions(task, str(tmp_path / "short.txt"))
    with pytest.raises(CalibrationError, match=r"none.txt' is not a readable text file"):
        load_questions(task, str(tmp_path / "none.txt"))


def test_the_text_is_the_test_split_of_wikitext_unless_a_file_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "wikitext2"
    folder.mkdir()
    (folder / "test.txt").write_text(text_of([paragraph(name, 30) for name in "abcd"]))
    monkeypatch.setenv("CLOQ_DATA", str(tmp_path))
    questions = load_questions(find_task("continuations"), None)
    assert len(questions.items) == 4
    assert questions.origin == str(folder / "test.txt")
