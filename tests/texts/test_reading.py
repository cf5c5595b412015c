"""Files of text and of JSON rows: the same texts and the same errors, whatever they are read for."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloq_export.errors import CalibrationError, DataError
from cloq_export.parity.tasks import find_task, load_questions
from cloq_export.texts import reading
from cloq_export.texts.corpora import evaluation_text, load_text
from cloq_export.texts.examples import read_examples
from cloq_export.texts.named_sets import load_examples
from cloq_export.texts.reading import holds_rows, read_rows, read_text

ROWS = [
    {"question": "one\u2028two\u2029three\u0085four", "answer": "a\r\nb\x0b\x0c\x1cc #### 1"},
    {"question": "q", "answer": "#### 2"},
]
LINES = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
MARK = b"\xef\xbb\xbf"


def calibrated(path: Path) -> Any:
    return load_text(str(path)).text


def evaluated(path: Path) -> Any:
    return evaluation_text(str(path)).text


def trained(path: Path) -> Any:
    return read_examples(path).examples


def trained_by_name(path: Path) -> Any:
    return load_examples(str(path)).examples


def asked(path: Path) -> Any:
    return load_questions(find_task("gsm8k"), str(path)).items


def asked_otherwise(path: Path) -> Any:
    return load_questions(find_task("gsm8k:instruction"), str(path)).items


DOORS: list[Callable[[Path], Any]] = [calibrated, evaluated, trained, trained_by_name, asked, asked_otherwise]


@pytest.mark.parametrize(
    "content",
    [
        b"\n".join(LINES),
        b"\r\n".join(LINES) + b"\r\n",
        b"\r".join(LINES) + b"\r",
        MARK + b"\n".join(LINES) + b"\n\n \n",
        MARK + MARK + LINES[0] + b"\n" + MARK + LINES[1] + b"\r\n\r\n",
        b"[" + b",\n".join(LINES) + b"]",
        MARK + b" \t[" + b",".join(LINES) + b"]\r\n",
        json.dumps(ROWS, indent=1).encode(),
        # Pairs of halves are whole signs, and what stands in other fields does not matter.
        b'{"note": "\\ud83d\\ude00", "score": NaN, ' + LINES[0][1:] + b"\n" + LINES[1],
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.ndjson", "ROWS.JSONL"])
def test_every_door_finds_the_same_rows(tmp_path: Path, content: bytes, name: str) -> None:
    plain, other = tmp_path / "plain.jsonl", tmp_path / name
    plain.write_bytes(b"\n".join(LINES) + b"\n")
    other.write_bytes(content)
    for door in DOORS:
        assert door(other) == door(plain), door.__name__
    assert calibrated(other) == "\n\n".join(f"{row['question']}\n{row['answer']}" for row in ROWS)


def test_one_object_over_several_lines_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_bytes(MARK + json.dumps(ROWS[1], indent=2).encode() + b"\n")
    assert [row for _, row in read_rows(path)] == [ROWS[1]]
    assert all(door(path) for door in DOORS)


GOOD = LINES[1] + b"\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            GOOD + b'{"question": "cut',
            r"line 2 of .*rows.jsonl is not a JSON object \(Unterminated string.*column 14\)",
        ),
        (GOOD + b"\r\n" + GOOD, r"line 2 of .*rows.jsonl is empty; each line holds one JSON object\. Delete the line"),
        (GOOD.replace(b"\n", b"\r") + b"3", r"line 2 of .*rows.jsonl is not a JSON object \(it is a JSON int\)"),
        (GOOD + b"\xff\n", r"line 2 of .*rows.jsonl is not UTF-8 text \(byte 1 of the line\); mend the line"),
        (GOOD + b'{"question": "\xed\xa0\x80"}', r"line 2 of .*rows.jsonl is not UTF-8 text \(byte 15 of the line\)"),
        (GOOD + b'{"question": "a\\ud800", "answer": "b"}', r"line 2 of .*: 'question' holds half of a surrogate pair"),
        (GOOD + b'{"question": "a", "answer": [{"\\udc00b": 1}]}', r"line 2 of .*: 'answer' holds half of a surrogate"),
        (GOOD + b'{"question": "a", "question": "b"}', r"line 2 of .* \(the key 'question' occurs twice\)"),
        (GOOD + b"[" * 100_000, r"line 2 of .*rows.jsonl is not a JSON object \(nested too deeply\)"),
        (GOOD + b'{"answer": ' + b"9" * 5000 + b"}", r"line 2 of .*rows.jsonl is not a JSON object \("),
        (GOOD + b"\x1a", r"line 2 of .*rows.jsonl is not a JSON object"),
        (b"[" + LINES[1] + b", 3]", r"item 2 of .*rows.jsonl is not a JSON object \(it is a JSON int\)"),
        (b"[" + LINES[1] + b',{"question": "\\uDFFF"}]', r"item 2 of .*: 'question' holds half of a surrogate pair"),
        (
            b"[" + LINES[1] + b",\n{]",
            r"line 2 of .*rows.jsonl is not valid JSON \(.*, column 2\); a file of rows",
        ),
        (b"[" * 100_000, r"rows.jsonl is not valid JSON \(nested too deeply\)"),
        (b'{\n"question": "q",\n"answer" 3}', r"line 3 of .*rows.jsonl is not valid JSON \(.*, column 10\)"),
        (b'{"question": "q", "answer": NaN}', r"line 1 of .*rows.jsonl.*'?answer'?"),
        ("\ufeff{}".encode("utf-16-le"), r"line 1 of .*rows.jsonl is not UTF-8 text: the file is UTF-16\. Convert it"),
        ('{"question": 1}'.encode("utf-16-be"), r"line 1 of .*rows.jsonl is not UTF-8 text: the file is UTF-16"),
        ("\ufeff{}".encode("utf-32-le"), r"line 1 of .*rows.jsonl is not UTF-8 text: the file is UTF-32"),
        (gzip.compress(GOOD, mtime=0), r"rows.jsonl holds gzip data; unpack it first"),
    ],
)
def test_every_door_refuses_the_same_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    for door in DOORS:
        with pytest.raises(DataError, match=message) as caught:
            door(path)
        assert "\n" not in str(caught.value)
        str(caught.value).encode("utf-8")


def test_lines_and_files_have_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b'{"question": "' + b"b" * 60 + b'"}\n')
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 40)
    for door in DOORS:
        with pytest.raises(DataError, match=r"line 2 of .*rows.jsonl is longer than 40 bytes; that is no example"):
            door(path)
    monkeypatch.undo()
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 40)
    for door in DOORS:
        with pytest.raises(DataError, match=r"rows.jsonl is larger than 40 bytes; give a part of it"):
            door(path)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a", "a.log"])
def test_plain_text_is_the_same_for_calibration_and_training(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(MARK + "Grüße\u2028a\r\n\r\nb\rc\u0085d\ufeffe".encode())
    expected = "Grüße\u2028a\n\nb\nc\u0085d\ufeffe"
    assert read_text(path) == calibrated(path) == evaluated(path) == expected
    assert [example.completion for example in trained(path)] == [expected]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\r\ntwo\rthree \xff", r"line 3 of .*a.txt is not UTF-8 text; mend the line"),
        ("a.txt", "a text".encode("utf-16"), r"line 1 of .*a.txt is not UTF-8 text: the file is UTF-16"),
        ("a.txt", "a text".encode("utf-16-le"), r"a.txt is not UTF-8 text: the file is UTF-16"),
        ("a.txt", gzip.compress(b"a text", mtime=0), r"a.txt holds gzip data; unpack it first"),
        ("a.txt", b"BZh91AY&SY", r"a.txt holds bzip2 data; unpack it first"),
        ("rows", b"PAR1\x15\x04", r"rows holds Parquet data; give plain text .* Convert it first"),
        ("a.txt", b"ARROW1\0\0", r"a.txt holds Arrow data; give"),
        ("a.text", b"SQLite format 3\0", r"a.text holds SQLite data"),
        ("a.md", b"%PDF-1.7\n", r"a.md holds PDF data"),
        ("a.txt", MARK, r"a.txt (holds no example|is empty)"),
        ("a.txt.gz", b"", r"a.txt.gz is a .gz file, which is packed; unpack it first"),
        ("a.csv", b"text\na", r"a.csv is a .csv file; give plain text .* Convert it first"),
        ("rows", MARK + b' {"text": "a"}\n', r"rows begins as JSON does, .*; name it .jsonl to have its rows read"),
        ("rows.data", b'[{"text": "a"}]', r"rows.data begins as JSON does"),
    ],
)
def test_files_that_are_no_text_are_refused_by_every_door(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for door in (calibrated, evaluated, trained, trained_by_name):
        with pytest.raises(DataError, match=message):
            door(path)


def test_errors_of_calibration_are_calibration_errors(tmp_path: Path) -> None:
    # The demo, among others, tells them from those of models.
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{")
    with pytest.raises(CalibrationError, match=r"line 1 of .*rows.jsonl is not a JSON object"):
        load_text(str(path))


def test_files_of_named_sets_are_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOQ_DATA", str(tmp_path))
    (tmp_path / "gsm8k").mkdir()
    for split in ("train", "test"):
        (tmp_path / "gsm8k" / f"{split}.json").write_bytes(MARK + b"[" + b",".join(LINES) + b"]")
    expected = "\n\n".join(f"{row['question']}\n{row['answer']}" for row in ROWS)
    assert load_text("gsm8k").text == evaluation_text("gsm8k").text == expected
    assert len(load_examples("gsm8k").examples) == 2
    assert len(load_questions(find_task("gsm8k"), None, shots=1).items) == 2


def test_the_name_says_what_a_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b'{"text": "a"}\n')
    assert not holds_rows(path)  # it was called plain text
    assert holds_rows(Path("nowhere.JSON"))
