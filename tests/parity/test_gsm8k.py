"""GSM8K: prompts, ends and numbers as lm-evaluation-harness defines them, on answers as models write them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from cloq_export.errors import DataError, FormatError
from cloq_export.parity import gsm8k
from cloq_export.parity.answers import INVALID, Respondent, agreement
from cloq_export.parity.gsm8k import EMBEDDED, Problem
from cloq_export.parity.task_kinds import Question, Questions, WrittenTask
from cloq_export.parity.tasks import find_task, load_questions

EGGS = Problem("How many eggs are left of 16 after 3 and 4?", "She has 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n#### 9")
MONEY = Problem("What does the house cost?", "It costs 80,000+50,000=$<<80000+50000=130000>>130,000\n#### 130,000")

# Answer of a model -> what the filters of lm_eval 0.4.13 make of it ("flexible-extract", "strict-match").
ANSWERS = {
    " 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n#### 9": ("9", "9"),
    " She sells 9 eggs for $2 each, so she makes $18 every day.": ("$18", INVALID),
    " The total is $1,234.50.": ("$1,234.50.", INVALID),
    " 2/2=1 bolt. 2+1=3 bolts.\n\nThe answer is 3.": ("3.", INVALID),
    "\n#### 70000 dollars, or 70,000": ("70,000", "70000"),
    " #### -3": ("-3", "-3"),
    " A 10% raise gives 5 more. Thus 15%": ("15", INVALID),
    " Let x be the number of eggs": (INVALID, INVALID),
    " It is 12:30 ...": ("...", INVALID),
}


@pytest.mark.parametrize("text", list(ANSWERS))
def test_numbers_are_read_as_the_harness_reads_them(text: str) -> None:
    assert (EMBEDDED.extract(text), EMBEDDED.extract(text, strict=True)) == ANSWERS[text]


@pytest.mark.parametrize(
    ("extracted", "problem", "right"),
    [
        ("9", EGGS, True),
        ("9.", EGGS, True),
        ("$9", EGGS, True),
        ("9.0", EGGS, False),
        (INVALID, EGGS, False),
        ("130000", MONEY, True),
        ("$130,000.", MONEY, True),
        ("13", MONEY, False),
    ],
)
def test_answers_are_compared_as_the_harness_compares_them(extracted: str, problem: Problem, right: bool) -> None:
    assert EMBEDDED.is_correct(extracted, problem) is right


def test_prompts() -> None:
    assert EMBEDDED.prompt(EGGS) == f"Question: {EGGS.question}\nAnswer:"
    assert EMBEDDED.prompt(EGGS, [MONEY]) == (
        f"Question: {MONEY.question}\nAnswer: {MONEY.answer}\n\nQuestion: {EGGS.question}\nAnswer:"
    )


def questions_of(*problems: Problem) -> Questions:
    items = tuple(Question(EMBEDDED.prompt(problem), None, problem.answer) for problem in problems)
    return Questions(items, "test", "00", 0)


@pytest.fixture
def task() -> WrittenTask:
    found = find_task("gsm8k")
    assert isinstance(found, WrittenTask)
    return found


def test_an_answer_ends_where_the_next_question_begins(task: WrittenTask) -> None:
    text = " 9\n\nQuestion: How many? 17"
    found = task.judge(questions_of(EGGS, EGGS), [text, " 9<|im_end|>17"])
    assert found.texts == (" 9\n\n", " 9")
    assert found.correct == (True, True)
    assert found.other == (False, False)
    assert (found.accuracy, found.other_accuracy) == (1.0, 0.0)


def test_agreement_is_on_numbers_right_or_wrong(task: WrittenTask) -> None:
    questions = questions_of(EGGS, EGGS, MONEY)
    first = task.judge(questions, [" 9", " so 7.", " 1,000"])
    second = task.judge(questions, [" it is $9", " 8", " 1000."])
    assert agreement(first, second, task.normal_form) == 2 / 3


class Echo:
    """A tokenizer of letters, and a runtime that answers each prompt with a text of its own."""

    all_special_tokens = ("<end>",)

    def __init__(self, texts: list[str]) -> None:
        self.texts, self.asked = texts, ""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        self.asked = text
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(number) for number in ids)

    def generate(self, token_ids: Any, adapters: Any, max_new_tokens: int) -> list[list[int]]:
        assert adapters == ["a"] * len(token_ids)
        return [[ord(letter) for letter in text[:max_new_tokens]] for text in self.texts]


def test_asking_a_runtime(task: WrittenTask) -> None:
    echo = Echo([" 9<end>", " 9\nQuestion: 17"])
    model: Any = echo
    found = task.ask(Respondent(model, echo, "a"), questions_of(EGGS, EGGS))
    assert found.texts == (" 9", " 9\n")
    assert found.correct == (True, True)
    assert echo.asked.endswith("\nAnswer:")


def test_worked_examples_are_drawn_once_for_each_problem() -> None:
    pool = [Problem(f"question {n}", f"#### {n}") for n in range(50)]
    assert gsm8k.choose_examples(pool, 5, 3) == gsm8k.choose_examples(pool, 5, 3)
    assert gsm8k.choose_examples(pool, 5, 3) != gsm8k.choose_examples(pool, 5, 4)
    # As lm_eval 0.4.13 draws: ContextSampler.sample, one generator for all problems, seeded with 1234.
    draw = random.Random(1234)
    assert [gsm8k.choose_examples(pool, 5, number) for number in range(4)] == [draw.sample(pool, 5) for _ in range(4)]
    assert len({example.question for example in gsm8k.choose_examples(pool, 50, 0)}) == 50
    with pytest.raises(DataError, match="51 worked examples were asked for, and there are 50"):
        gsm8k.choose_examples(pool, 51, 0)


def test_problems_come_from_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: WrittenTask) -> None:
    (tmp_path / "gsm8k").mkdir()
    rows = [{"question": f"two\u2028lines {n}", "answer": f"#### {n}"} for n in range(3)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "gsm8k" / "test.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "gsm8k" / "train.jsonl").write_text(text.replace("lines", "examples"), encoding="utf-8")
    monkeypatch.setenv("CLOQ_DATA", str(tmp_path))
    found = load_questions(task, None, count=2, shots=1)
    assert found.origin == str(tmp_path / "gsm8k" / "test.jsonl")
    assert found.shots == 1
    for number, item in enumerate(found.items):
        example, question = item.prompt.split("\n\n")
        assert example.startswith("Question: two\u2028examples")
        assert question == f"Question: two\u2028lines {number}\nAnswer:"
        assert item.gold == f"#### {number}"
    assert load_questions(task, None).sha256 != load_questions(task, None, count=2).sha256 != found.sha256


GOOD = b'{"question": "q", "answer": "#### 1"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + b'{"question": "q", "ans', "line 2 of .* is not a JSON object"),
        (GOOD + b"\n" + GOOD, "line 2 of .* is empty"),
        (GOOD + b'{"question": "q"}', "line 2 of .* has no text 'answer'"),
        (GOOD + b'{"question": 3, "answer": "#### 1"}', "line 2 of .* has no text 'question'"),
        (GOOD + b'{"question": "q", "answer": "1"}', "line 2 of .* has an answer without '#### NUMBER'"),
        (GOOD + b'{"question": "\xff"}', "line 2 of .* is not UTF-8"),
        (b"\n \n", "holds no question of gsm8k; name another file with `tasks=gsm8k=FILE`"),
    ],
)
def test_a_broken_line_is_named_with_its_number(
    tmp_path: Path, content: bytes, message: str, task: WrittenTask
) -> None:
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_questions(task, str(tmp_path / "p.jsonl"), count=1)


def test_a_missing_file(tmp_path: Path, task: WrittenTask) -> None:
    with pytest.raises(DataError, match=r"nowhere.jsonl does not exist"):
        load_questions(task, str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(DataError, match="cannot be read"):
        load_questions(task, str(tmp_path))


def task_file(folder: Path, **changes: Any) -> Path:
    """Write the task as the harness keeps it (JSON is YAML)."""
    task: dict[str, Any] = {
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "metric_list": [
            {
                "metric": "exact_match",
                "ignore_case": True,
                "ignore_punctuation": False,
                "regexes_to_ignore": list(EMBEDDED.ignored),
            }
        ],
        "generation_kwargs": {"until": list(EMBEDDED.until)},
        "filter_list": [
            {"name": "strict-match", "filter": [{"function": "regex", "regex_pattern": EMBEDDED.strict}]},
            {
                "name": "flexible-extract",
                "filter": [{"function": "regex", "group_select": -1, "regex_pattern": EMBEDDED.flexible}],
            },
        ],
        "metadata": {"version": 3.0},
    }
    path = folder / "gsm8k.yaml"
    path.write_text(json.dumps({**task, **changes}))
    return path


def test_the_rules_of_an_installed_harness_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = gsm8k.read_definition(task_file(tmp_path, metadata={"version": 4.0}))
    assert found.version == "4.0"
    assert (found.until, found.strict, found.flexible, found.ignored) == (
        EMBEDDED.until,
        EMBEDDED.strict,
        EMBEDDED.flexible,
        EMBEDDED.ignored,
    )
    home = tmp_path / "lm_eval" / "tasks" / "gsm8k"
    home.mkdir(parents=True)
    (tmp_path / "lm_eval" / "__init__.py").write_text("raise AssertionError('nothing of it is imported')")
    task_file(home)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert gsm8k.task_definition().origin.startswith("lm_eval ")


@pytest.mark.parametrize(
    "changes",
    [
        {"doc_to_text": "Q: {{question}}"},
        {"filter_list": []},
        {"metadata": None},
        {"metric_list": [{"metric": "bleu"}]},
        {"generation_kwargs": "x"},
    ],
)
def test_rules_of_another_form_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=r"install lm_eval 0\.4\.13, or none: its rules are kept here too"):
        gsm8k.read_definition(task_file(tmp_path, **changes))
