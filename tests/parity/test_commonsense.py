"""The commonsense sets as the harness scores them and as LLM-Adapters reads them, and what is kept of answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cloq_export.errors import DataError, FormatError, RunDirectoryError, UsageError
from cloq_export.parity.answers import INVALID, AnswerStore, Respondent
from cloq_export.parity.commonsense import COMMONSENSE_SETS, first_label, harness_definition, stated_label
from cloq_export.parity.task_kinds import ChoiceTask
from cloq_export.parity.task_report import task_entry
from cloq_export.parity.tasks import (
    GROUPS,
    expand_names,
    find_task,
    gate_key,
    load_questions,
    task_names,
)

# Set -> (a row of the hub, contexts, continuations, right choice, instruction of LLM-Adapters, right label).
ROWS: dict[str, tuple[dict[str, Any], Sequence[str], Sequence[str], int, str, str]] = {
    "boolq": (
        {"passage": "Water boils at 100 C.", "question": "does water boil", "label": 1},
        ["Water boils at 100 C.\nQuestion: does water boil?\nAnswer:"] * 2,
        [" no", " yes"],
        1,
        "Please answer the following question with true or false, question: does water boil?\n\n"
        "Answer format: true/false",
        "true",
    ),
    "piqa": (
        {"goal": "Make a pillow.", "sol1": "Blow into a can.", "sol2": "Blow into a bag.", "label": 1},
        ["Question: Make a pillow.\nAnswer:"] * 2,
        [" Blow into a can.", " Blow into a bag."],
        1,
        "Please choose the correct solution to the question: Make a pillow.\n\nSolution1: Blow into a can.\n\n"
        "Solution2: Blow into a bag.\n\nAnswer format: solution1/solution2",
        "solution2",
    ),
    "siqa": (
        {
            "context": "Robin cut the bread.",
            "question": "What did Robin need?",
            "answerA": "a knife",
            "answerB": "a car",
            "answerC": "a hat",
            "label": "1",
        },
        ["Q: Robin cut the bread. What did Robin need?\nA:"] * 3,
        [" a knife", " a car", " a hat"],
        0,
        "Please choose the correct answer to the question: Robin cut the bread. What did Robin need?\n\n"
        "Answer1: a knife Answer2: a car Answer3: a hat\n\nAnswer format: answer1/answer2/answer3",
        "answer1",
    ),
    "hellaswag": (
        {
            "activity_label": "Travel",
            "ctx_a": "[header] How to travel [title] Pack.",
            "ctx_b": "then you",
            "ctx": "[header] How to travel [title] Pack. then you",
            "endings": ["[step] go.", "stay  here.", "sing.", "eat."],
            "label": "2",
        },
        ["Travel: How to travel. Pack. Then you"] * 4,
        # The blank behind what is cut off stays.
        ["  go.", " stay here.", " sing.", " eat."],
        2,
        "Please choose the correct ending to complete the given sentence: Travel: [header] How to travel [title] Pack. "
        "then you\n\nEnding1: [step] go. Ending2: stay  here. Ending3: sing. Ending4: eat.\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        "ending3",
    ),
    "winogrande": (
        {
            "sentence": "The jeans beat the shirt because _ fit well.",
            "option1": "jeans",
            "option2": "shirt",
            "answer": "1",
        },
        ["The jeans beat the shirt because jeans", "The jeans beat the shirt because shirt"],
        [" fit well."] * 2,
        0,
        "Please choose the correct answer to fill in the blank to complete the given sentence: The jeans beat the "
        "shirt because _ fit well.\n\nOption1: jeans Option2: shirt Answer format: option1/option2",
        "option1",
    ),
    "arc-e": (
        {
            "question": "What is wet?",
            "choices": {"text": ["sand", "water", "air"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        ["Question: What is wet?\nAnswer:"] * 3,
        [" sand", " water", " air"],
        1,
        "Please choose the correct answer to the question: What is wet?\n\nAnswer1: sand Answer2: water Answer3: air\n"
        "\nAnswer format: answer1/answer2/answer3",
        "answer2",
    ),
    "obqa": (
        {
            "question_stem": "Summer comes when the sun is",
            "choices": {"text": ["high", "low", "red", "cold"], "label": ["A", "B", "C", "D"]},
            "answerKey": " A",
        },
        ["Summer comes when the sun is"] * 4,
        [" high", " low", " red", " cold"],
        0,
        "Please choose the correct answer to the question: Summer comes when the sun is\n\nAnswer1: high Answer2: low "
        "Answer3: red Answer4: cold\n\nAnswer format: answer1/answer2/answer3/answer4",
        "answer1",
    ),
}
ROWS["arc-c"] = ROWS["arc-e"]


@pytest.mark.parametrize("name", list(COMMONSENSE_SETS))
def test_choices_are_put_as_the_harness_puts_them(name: str) -> None:
    row, contexts, continuations, gold, _, _ = ROWS[name]
    question = find_task(name).read(row, "row")
    assert question.choices is not None
    assert question.choices.pairs == tuple(zip(contexts, continuations, strict=True))
    assert (question.choices.gold, question.gold) == (gold, str(gold))
    chosen = contexts if name == "winogrande" else [text[1:] for text in continuations]
    assert question.choices.lengths == tuple(map(len, chosen))


@pytest.mark.parametrize("name", list(COMMONSENSE_SETS))
def test_instructions_are_those_of_llm_adapters(name: str) -> None:
    row, _, _, _, instruction, label = ROWS[name]
    task = find_task(f"{name}:instruction")
    for each in (row, {"instruction": instruction, "input": "", "output": "", "answer": label}):
        question = task.read(each, "row")
        assert f"\n\n### Instruction:\n{instruction}\n\n### Response:\n" in question.prompt
        assert question.gold == label


def test_the_other_form_of_boolq() -> None:
    row = {"passage": "p", "question": "q", "answer": False}
    choices = find_task("boolq").read(row, "row").choices
    assert choices is not None
    assert choices.gold == 0
    assert find_task("boolq:instruction").read(row, "row").gold == "false"


ANSWER4 = tuple(f"answer{number}" for number in range(1, 6))
# Answer of a model, its labels -> (the first label, the stated label).
LABELS = {
    ("the correct answer is answer3", ANSWER4): ("answer3", "answer3"),
    ("the correct answer is answer3.", ANSWER4): ("answer3", "answer3"),
    (" The correct answer is Answer3", ANSWER4): (INVALID, "answer3"),
    ("answer2", ANSWER4): ("answer2", "answer2"),
    ("the correct answer is answer1, not answer2", ANSWER4): ("answer1", INVALID),
    ("I would not say answer4 but answer1", ANSWER4): ("answer4", INVALID),
    ("the correct answer is 3", ANSWER4): (INVALID, INVALID),
    ("the correct answer is answer9", ANSWER4): (INVALID, INVALID),
    ("the correct answer is answer12", ANSWER4): ("answer1", INVALID),
    ("", ANSWER4): (INVALID, INVALID),
    ("the correct answer is true", ("true", "false")): ("true", "true"),
    ("That is untrue, so false.", ("true", "false")): ("true", INVALID),
    ("False", ("true", "false")): (INVALID, "false"),
    ("the correct answer is\nsolution2\n", ("solution1", "solution2")): ("solution2", "solution2"),
    ("the correct answer is: ending4", ("ending3", "ending4")): ("ending4", "ending4"),
    ("the correct answer is option1 because", ("option1", "option2")): ("option1", INVALID),
}


@pytest.mark.parametrize(("text", "labels"), list(LABELS))
def test_labels_of_an_answer(text: str, labels: tuple[str, ...]) -> None:
    assert (first_label(text, labels), stated_label(text, labels)) == LABELS[text, labels]


@pytest.mark.parametrize("name", list(COMMONSENSE_SETS))
def test_a_row_without_an_answer_is_named(name: str) -> None:
    for field in ("label", "answer", "answerKey"):
        if field in ROWS[name][0]:
            for wrong in (None, "9", "x", -1, 0.5, [1]):
                row = {**ROWS[name][0], field: wrong}
                for task in (name, f"{name}:instruction"):
                    with pytest.raises(DataError, match=r"row 7: no answer can be read out of .*Mend the row"):
                        find_task(task).read(row, "row 7")
    with pytest.raises(DataError, match=r"row 7: no answer can be read out of 'answer7'; one of .* is needed"):
        find_task(f"{name}:instruction").read({"instruction": "a", "answer": "answer7"}, "row 7")


@pytest.mark.parametrize("name", list(COMMONSENSE_SETS))
def test_a_row_of_llm_adapters_has_no_choices_to_score(name: str) -> None:
    with pytest.raises(DataError, match=r"row 7 has no .*fields instruction, answer\. It is a row of LLM-Adapters"):
        find_task(name).read({"instruction": "a", "answer": "answer1"}, "row 7")


def test_a_sentence_without_a_blank() -> None:
    with pytest.raises(DataError, match="row 7: 'sentence' has no blank '_' to fill in"):
        find_task("winogrande").read({**ROWS["winogrande"][0], "sentence": "None."}, "row 7")


def write_definition(folder: Path, name: str, **changes: Any) -> None:
    """Write the set's definition as an installed harness keeps it (JSON is YAML)."""
    chosen = COMMONSENSE_SETS[name]
    (folder / "lm_eval").mkdir(exist_ok=True)
    (folder / "lm_eval" / "__init__.py").write_text("raise AssertionError('nothing of it is imported')")
    path = folder / "lm_eval" / "tasks" / chosen.harness_file
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = {**chosen.harness, "metadata": {"version": 7.0}, **changes}
    calls = {key: value for key, value in lines.items() if str(value).startswith("!function")}
    text = "".join(f"{key}: {value}\n" for key, value in calls.items())
    rest = {key: value for key, value in lines.items() if key not in calls}
    path.write_text(text + "".join(f"{key}: {json.dumps(value)}\n" for key, value in rest.items()))


def test_the_definitions_of_an_installed_harness_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_task("boolq").definition.endswith("as of lm_eval 0.4.13")
    for name in COMMONSENSE_SETS:
        write_definition(tmp_path, name)
    folder = tmp_path / "lm_eval" / "tasks" / "arc"
    (folder / "arc_challenge.yaml").write_text("include: arc_easy.yaml\ntask: arc_challenge\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, chosen in COMMONSENSE_SETS.items():
        version, origin = harness_definition(chosen)
        assert version == "7.0"
        assert origin.startswith("lm_eval ")
        assert find_task(name).version == "7.0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"doc_to_text": "Q: {{goal}}"},
            r"piqa.yaml defines doc_to_text otherwise than it is known here; install lm_eval",
        ),
        ({"metadata": None}, r"piqa.yaml is no task definition as it is known here .*TypeError"),
    ],
)
def test_definitions_of_another_form_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    write_definition(tmp_path, "piqa", **changes)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(FormatError, match=message):
        find_task("piqa")


class Letters:
    """A tokenizer of letters, and a runtime that finds some letters more probable than others."""

    all_special_tokens = ()

    def __init__(self, losses: dict[str, float]) -> None:
        self.losses, self.calls = losses, 0

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def prompt_logprobs(self, token_ids: Any, adapters: Any) -> list[torch.Tensor]:
        self.calls += 1
        assert adapters == [None] * len(token_ids)
        return [torch.tensor([-self.losses.get(chr(number), 1.0) for number in ids[1:]]) for ids in token_ids]


def arc_file(folder: Path, count: int) -> str:
    rows = [
        {"question": f"q{n}", "choices": {"text": ["aaa", "b"], "label": ["A", "B"]}, "answerKey": "AB"[n % 2]}
        for n in range(count)
    ]
    path = folder / "arc.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_most_probable_choice_is_taken(tmp_path: Path) -> None:
    task = find_task("arc-e")
    questions = load_questions(task, arc_file(tmp_path, 5))
    # " aaa" costs 1 + 1.8 and " b" 1 + 1.2; for each letter 2.8 / 3 and 2.2 / 1.
    letters: Any = Letters({"a": 0.6, "b": 1.2})
    found = task.ask(Respondent(letters, letters), questions)
    assert found.extracted == ("1",) * 5
    assert found.correct == (False, True, False, True, False)
    assert found.other == (True, False, True, False, True)
    entry = task_entry(task, questions, {"float": found, "quantized": found}, None)
    assert entry.models["float"].accuracy == 0.4
    assert entry.models["float"].other_accuracy == 0.6
    assert entry.comparisons[0].agreement == entry.comparisons[0].test.p_value == 1
    assert entry.other_rule == "normalised"


def test_answers_go_on_where_they_stopped(tmp_path: Path) -> None:
    task = find_task("arc-e")
    assert isinstance(task, ChoiceTask)
    questions = load_questions(task, arc_file(tmp_path, 600))
    letters: Any = Letters({"a": 0.6, "b": 1.2})
    key = {"model": "m", "questions": questions.sha256}
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done > 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        task.ask(Respondent(letters, letters), questions, store=AnswerStore(tmp_path / "a.json", key), advance=stop)
    assert seen == [(256, 600), (512, 600)]
    assert letters.calls == 2
    resumed = task.ask(Respondent(letters, letters), questions, store=AnswerStore(tmp_path / "a.json", key))
    assert letters.calls == 3
    assert resumed == task.ask(Respondent(letters, letters), questions)
    again = AnswerStore(tmp_path / "a.json", key)
    assert len(again.answers) == 600
    with pytest.raises(RunDirectoryError, match=r"a.json holds answers that were given under another model; choose"):
        AnswerStore(tmp_path / "a.json", {**key, "model": "n"})
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(RunDirectoryError, match=r"a.json holds no answers of `cloq eval`; delete it"):
        AnswerStore(tmp_path / "a.json", key)


def test_names_and_groups() -> None:
    assert len(task_names()) == len(set(map(gate_key, task_names()))) == 24
    assert set(GROUPS["arithmetic"]) == {"gsm8k:instruction", "svamp", "mawps", "aqua"}
    assert expand_names(["commonsense"]) == {f"{name}:instruction": None for name in COMMONSENSE_SETS}
    assert expand_names(["boolq=a.json", "arithmetic", "svamp=b=c.json"])["svamp"] == "b=c.json"
    with pytest.raises(UsageError, match=r"`tasks` is 'bolq'; allowed are ppl, gsm8k, .* did you mean 'boolq'\?"):
        expand_names(["bolq"])
    with pytest.raises(UsageError, match="arithmetic is a group; name a file for each of gsm8k:instruction, svamp"):
        expand_names(["arithmetic=a.json"])


def test_worked_examples_belong_to_some_tasks(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="arc-e takes no worked examples; leave `shots` out"):
        load_questions(find_task("arc-e"), arc_file(tmp_path, 2), shots=2)
    item = load_questions(find_task("word-problems"), None, count=1, shots=2).items[0]
    assert item.prompt.count("Question: ") == 3
    assert item.prompt.count("\n#### ") == 2
