"""What questions can show: repeated ones, ones that were trained on, and the power of the test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cloq_export.parity.quality import mcnemar
from cloq_export.parity.questions import (
    answers_needed,
    blindness,
    question_hash,
    questions_seen,
    repeated_questions,
    row_hashes,
    smallest_drop,
)
from cloq_export.parity.tasks import find_task, load_questions
from cloq_export.texts.examples import instruction_prompt, question_prompt


def test_questions_are_equal_whatever_their_case_and_blanks() -> None:
    assert question_hash("How  many\nEGGS?") == question_hash("how many eggs?")
    assert question_hash("caf\u00e9") == question_hash("cafe\u0301")
    assert question_hash("3 - 4") != question_hash("3 + 4")
    assert repeated_questions(["a", "b", "a", "a"]) == [2, 3]


@pytest.mark.parametrize("limit", [0.5, 0.05, 0.01, 1e-3, 1e-9])
def test_as_many_answers_are_needed_as_the_test_itself_needs(limit: float) -> None:
    needed = answers_needed(limit)
    assert needed is not None
    assert mcnemar([True] * needed, [False] * needed).p_value < limit
    assert mcnemar([True] * (needed - 1), [False] * (needed - 1)).p_value >= limit
    assert blindness(needed, limit) is None
    assert f"ask {needed} questions or more" in str(blindness(needed - 1, limit))


def test_a_limit_of_zero_needs_what_cannot_be() -> None:
    assert answers_needed(0.0) is None
    assert smallest_drop(100, 0.0) is None
    assert "no p-value is below 0.0" in str(blindness(1000, 0.0))


def test_the_smallest_drop_shrinks_with_the_questions() -> None:
    drops = [smallest_drop(count, 0.01) for count in (7, 8, 100, 1000)]
    assert drops[0] is None
    # Eight of eight must be lost, with a probability of 0.8.
    assert drops[1] == pytest.approx(0.8 ** (1 / 8), abs=1e-4)
    assert 0.09 < float(drops[2] or 0) < 0.11
    assert 0.009 < float(drops[3] or 0) < 0.011


def test_a_question_is_seen_as_a_training_wrote_it() -> None:
    row = {"question": "How many eggs?", "answer": "#### 3"}
    own = row_hashes(question_prompt("How many eggs?"), row)
    for written in ("how many eggs?", question_prompt("How many eggs?"), instruction_prompt("How many eggs?")):
        assert questions_seen([own, row_hashes("Other?", {})], {question_hash(written)}) == [0]
    # A question that stands in many rows is none without what it is about.
    alike = {"context": "Ann fell.", "question": "What will she do next?"}
    assert question_hash("What will she do next?") not in row_hashes("Ann fell. What will she do next?", alike)


def test_questions_carry_their_hashes_without_worked_examples(tmp_path: Path) -> None:
    rows = [{"question": f"w{n}?", "answer": f"so\n#### {n}"} for n in (1, 2, 1)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_questions(find_task("gsm8k"), str(tmp_path / "p.jsonl"))
    assert repeated_questions(found.keys) == [2]
    assert questions_seen(found.hashes, {question_hash("w2?")}) == [1]


@pytest.mark.parametrize("name", ["word-problems", "continuations"])
def test_our_own_questions_do_not_repeat(name: str, tmp_path: Path) -> None:
    file = None
    if name == "continuations":
        words = [" ".join(f"w{(17 * line + step) % 997}" for step in range(80)) for line in range(400)]
        (tmp_path / "t.txt").write_text("\n".join(words))
        file = str(tmp_path / "t.txt")
    assert repeated_questions(load_questions(find_task(name), file, count=100).keys) == []
