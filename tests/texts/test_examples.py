"""Training files: every form of a row, and every way in which a line can be broken."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cloq_export.errors import CalibrationError, DataError
from cloq_export.texts.corpora import load_text
from cloq_export.texts.examples import (
    ChatExample,
    Example,
    ExampleSet,
    Message,
    example_of,
    instruction_prompt,
    read_examples,
)

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]


def write_rows(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_chats_of_another_form_and_where_they_stand(tmp_path: Path) -> None:
    turns = [
        {"from": who, "value": turn["content"]} for who, turn in zip(("system", "human", "gpt"), CHAT, strict=True)
    ]
    expected = ChatExample(tuple(Message(turn["role"], turn["content"]) for turn in CHAT))
    rows = [{"conversations": turns}, {"conversations": CHAT}, {"messages": turns, "tools": [], "id": 3}]
    rows.append({"messages": [{**turn, "tool_calls": None, "weight": 1, "mask": False, "name": "x"} for turn in CHAT]})
    path = write_rows(tmp_path, *rows)
    found = read_examples(path)
    assert found.examples == (expected,) * 4
    assert [each.where for each in found.examples if isinstance(each, ChatExample)] == [
        f"line {number} of {path}" for number in range(1, 5)
    ]
    # Where they stand is not what they are.
    assert found.sha256 == ExampleSet.of([expected] * 4, "").sha256


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": CHAT, "tools": [{"name": "f"}]},
            "row has 'tools', which cannot be learned with: it would stand before the answer",
        ),
        ({"prompt": "a", "completion": "b", "system": "Be brief."}, "'system', .* Make it the first message"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "'history', .* Write it into the prompt"),
        ({"messages": [CHAT[1], {**CHAT[2], "train": False}]}, "message 2 has 'train'"),
        (
            {"messages": [{**CHAT[1], "content": [{"type": "text"}]}, CHAT[2]]},
            "message 1: 'content' is a list of parts",
        ),
        (
            {"messages": [CHAT[1], {**CHAT[2], "tool_calls": [{}]}]},
            "message 2 has 'tool_calls', which cannot be learned",
        ),
        ({"messages": [CHAT[1], {**CHAT[2], "reasoning_content": "so"}]}, "message 2 has 'reasoning_content'"),
        ({"messages": [CHAT[1], {**CHAT[2], "weight": 0}]}, "message 2 has 'weight'"),
        ({"messages": [CHAT[1], {**CHAT[2], "loss": False}]}, "message 2 has 'loss'"),
        ({"messages": [CHAT[1], {**CHAT[2], "mask": True}]}, "message 2 has 'mask'"),
        ({"messages": [CHAT[1], {**CHAT[2], "refusal": "no"}]}, "message 2 has 'refusal'"),
        ({"messages": CHAT, "images": ["a.png"]}, "row has 'images', which cannot be learned with"),
        ({"question": "a", "answer": "b", "context": "c"}, "row has 'context', .* Write it into the prompt"),
        ({"question": "a", "answer": "b", "choices": ["b", "c"]}, "row has 'choices'"),
        ({"prompt": "a", "completion": "b", "label": False}, "row has 'label': false, .* Delete the row"),
        (
            {"messages": [{**CHAT[1], "from": "gpt"}, CHAT[2]]},
            "message 1 has 'role' and 'from', two words for one thing",
        ),
        ({"messages": [CHAT[1], {**CHAT[2], "value": "5"}]}, "message 2 has 'content' and 'value'"),
        (
            {"conversations": [{"from": "tool", "value": "a"}]},
            "message 1 is from 'tool'; allowed are system, human, user",
        ),
        ({"conversations": [{"from": "human"}]}, "message 1: 'value' is no text"),
        (
            {"conversations": "a"},
            "row: 'conversations' is no list of messages; each has 'role' and 'content', or 'from'",
        ),
        ({"conversation": CHAT}, "row has the fields conversation; a row holds 'messages' or 'conversations'"),
        ({"prompt": CHAT[:2], "completion": CHAT[2:]}, "row: 'prompt' is no text; .* A chat goes into 'messages'"),
    ],
)
def test_chats_that_are_not_learned_are_refused_by_name(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        example_of(row, "row")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": " a text\n"}, Example(None, " a text\n")),
        ({"prompt": "2+2=", "completion": "4"}, Example("2+2=", "4")),
        ({"question": "2+2?", "answer": "It is 4.\n#### 4"}, Example("Question: 2+2?\nAnswer:", " It is 4.\n#### 4")),
        ({"text": "a", "context": "a note", "label": False}, Example(None, "a")),
        ({"prompt": "a", "completion": "b", "label": True, "images": []}, Example("a", "b")),
        ({"messages": CHAT}, ChatExample(tuple(Message(turn["role"], turn["content"]) for turn in CHAT))),
        # As Math10K and Commonsense170K come: a short answer beside the output, and an empty input.
        (
            {"instruction": "2+2?", "input": "", "output": "It is 4.", "answer": "4.0"},
            Example(instruction_prompt("2+2?"), "It is 4."),
        ),
        ({"instruction": "Add.", "input": None, "output": "4"}, Example(instruction_prompt("Add."), "4")),
        ({"instruction": "Add.", "input": "2 2", "output": "4"}, Example(instruction_prompt("Add.", "2 2"), "4")),
    ],
)
def test_forms_of_a_row(tmp_path: Path, row: dict[str, Any], expected: Any) -> None:
    assert example_of(row, "row") == expected
    assert read_examples(write_rows(tmp_path, row)).examples == (expected,)


ALPACA = {"instruction": "Add.", "input": "2 2", "output": "4", "text": instruction_prompt("Add.", "2 2") + "4"}


def test_a_text_beside_what_it_was_made_of_is_no_second_form() -> None:
    assert example_of(ALPACA, "row") == Example(instruction_prompt("Add.", "2 2"), "4")
    assert example_of({"text": None, "prompt": "a", "completion": "b"}, "row") == Example("a", "b")


@pytest.mark.parametrize(
    ("row", "forms"),
    [
        ({"text": "t", "messages": CHAT}, "'messages' or by 'text'"),
        ({"conversations": CHAT, "messages": CHAT}, "'messages' or by 'conversations'"),
        (
            {"prompt": "a", "completion": "b", "question": "c", "answer": "d"},
            "'prompt' and 'completion' or by 'question' and 'answer'",
        ),
        ({**ALPACA, "text": "another"}, "'instruction' and 'output' or by 'text'"),
        ({"question": "a", "answer": "b", "text": "t"}, "'question' and 'answer' or by 'text'"),
    ],
)
def test_a_row_of_two_forms_is_refused_at_every_door(tmp_path: Path, row: dict[str, Any], forms: str) -> None:
    path = write_rows(tmp_path, {"text": "one"}, row)
    message = f"line 2 of .* can be read in two ways, by {forms}, and they say different things; .* Take the fields"
    with pytest.raises(DataError, match=message):
        read_examples(path)
    with pytest.raises(CalibrationError, match=message):
        load_text(str(path))


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_text_is_refused_at_every_door(tmp_path: Path, text: str) -> None:
    path = write_rows(tmp_path, {"text": "one"}, {"text": text})
    message = "line 2 of .*: 'text' is empty; mend the line, or delete it"
    with pytest.raises(DataError, match=message):
        read_examples(path)
    with pytest.raises(CalibrationError, match=message):
        load_text(str(path))


def test_instruction_prompts_are_those_of_alpaca() -> None:
    assert instruction_prompt("Add.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert "\n\n### Instruction:\nAdd.\n\n### Input:\n2 2\n\n### Response:\n" in instruction_prompt("Add.", "2 2")


def test_a_text_file_is_one_example(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffGrüße\n\n\nzwei".encode())
    found = read_examples(path)
    assert found.examples == (Example(None, "Grüße\n\n\nzwei"),)
    assert found.origin == str(path)


def test_a_json_list_gives_what_json_lines_give(tmp_path: Path) -> None:
    rows = [{"prompt": "a\u2028b", "completion": "c"}, {"text": "t"}]
    (tmp_path / "list.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "lines.jsonl").write_text(
        "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n \n\n", encoding="utf-8"
    )
    one, other = read_examples(tmp_path / "list.json"), read_examples(str(tmp_path / "lines.jsonl"))
    assert one.examples == other.examples == (Example("a\u2028b", "c"), Example(None, "t"))
    assert one.sha256 == other.sha256


def test_the_hash_tells_order_and_kind() -> None:
    a, b = Example(None, "a"), Example("a", "b")
    hashes = {
        ExampleSet.of(chosen, "").sha256
        for chosen in ([a], [b], [a, b], [b, a], [Example("", "a")], [ChatExample((Message("assistant", "a"),))])
    }
    assert len(hashes) == 6


GOOD = b'{"text": "good"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + b"\n" + GOOD, r"line 2 of .*rows.jsonl is empty; each line holds one JSON object\. Delete the line"),
        (GOOD + b" \n\t\n" + GOOD, "line 2 of .* is empty"),
        (GOOD + b'{"text": "cut', r"line 2 of .* is not a JSON object \(Unterminated string"),
        (GOOD + b"[1]\n", "line 2 of .* is not a JSON object"),
        (GOOD + b"[" * 100_000 + b"\n", "line 2 of .* is not a JSON object"),
        (GOOD + b'{"text": "a", "text": "b"}\n', "line 2 of .* is not a JSON object"),
        (GOOD + b'{"text": "\xff"}\n', r"line 2 of .* is not UTF-8 text \(byte 11 of the line\)"),
        (GOOD + b'{"text": "\\ud800"}\n', "line 2 of .*: 'text' holds half of a surrogate pair"),
        (GOOD + b'{"text": " "}\n', "line 2 of .*: 'text' is empty; mend the line, or delete it"),
        (GOOD + b'{"text": 3}\n', "line 2 of .*: 'text' is no text"),
        (
            GOOD + b'{"text": ' + b"9" * 5000 + b"}\n",
            r"line 2 of .* is not a JSON object \(a number in it has more than \d+ digits\)",
        ),
        (GOOD + b'{"prompt": "a"}\n', r"line 2 of .* has the fields prompt; a row holds 'messages'.* or 'text'"),
        (GOOD + b"{}\n", "line 2 of .* has the fields none;"),
        (GOOD + b'{"prompt": "", "completion": "a"}\n', "line 2 of .*: 'prompt' is empty"),
        (GOOD + b'{"prompt": "a", "completion": ""}\n', "line 2 of .*: 'completion' is empty"),
        (GOOD + b'{"instruction": "a", "input": 3, "output": "b"}\n', "line 2 of .*: 'input' is no text"),
        (GOOD + b'{"messages": []}\n', "line 2 of .*: 'messages' is no list of messages"),
        (
            GOOD + b'{"messages": ["a"]}\n',
            "line 2 of .*, message 1 has the role 'None'; allowed are system, user",
        ),
        (GOOD + b'{"messages": [{"role": "tool", "content": "a"}]}\n', "line 2 of .*, message 1 has the role 'tool'"),
        (GOOD + b'{"messages": [{"role": ["a"], "content": "a"}]}\n', "line 2 of .*, message 1 has the role"),
        (GOOD + b'{"messages": [{"role": "user", "content": "a"}]}\n', "line 2 of .*: the last message is the user's"),
        (
            GOOD + b'{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}\n',
            "line 2 of .*, message 2 is a system message behind others",
        ),
        (
            GOOD + b'{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}]}\n',
            "line 2 of .*, message 1: 'content' is empty",
        ),
        (b"", r"rows.jsonl holds no example; give plain text"),
        (b"\n \n", r"rows.jsonl holds no example"),
    ],
)
def test_a_broken_line_is_named_with_its_number(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_examples(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a"}, 3]', r"item 2 of .*a.json is not a JSON object"),
        ("a.json", b'[{"text": "a"}, {"completion": "b"}]', r"item 2 of .*a.json has the fields completion"),
        ("a.json", b"[]", r"a.json holds no example"),
        ("a.json", b"[" * 100_000, r"a.json is not valid JSON"),
        ("a.txt", b" \n\n", r"a.txt holds no example"),
        ("a.txt", b"one\ntwo \xff", r"line 2 of .*a.txt is not UTF-8 text"),
        ("a.parquet", b"PAR1", r"a.parquet is a .parquet file; give plain text \(.txt\), or JSON lines"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_examples(tmp_path / name)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.jsonl does not exist; check the path"):
        read_examples(tmp_path / "nowhere.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match=r"folder.jsonl cannot be read \(Is a directory\)"):
        read_examples(tmp_path / "folder.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=r"pipe.jsonl is no ordinary file"):
        read_examples(tmp_path / "pipe.jsonl")
