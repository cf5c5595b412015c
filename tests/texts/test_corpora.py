"""Texts by name, file and hub, and the windows cut from them."""

from __future__ import annotations

import hashlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from cloq_export.errors import CalibrationError, MissingPackageError
from cloq_export.texts.corpora import (
    CalibrationText,
    evaluation_text,
    load_text,
    sample_windows,
    tokenize_text,
)
from cloq_export.texts.examples import Example
from cloq_export.texts.named_sets import load_examples


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    (folder / "wikitext2").mkdir(parents=True)
    (folder / "wikitext2" / "valid.txt").write_text(" \n = Valid = \n", encoding="utf-8")
    (folder / "wikitext2" / "test.txt").write_text(" \n = Test = \n", encoding="utf-8")
    monkeypatch.setenv("CLOQ_DATA", str(folder))
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for the hub: `rows` is what it answers, an exception is raised; `asked` is what was asked."""
    state: dict[str, Any] = {"rows": [], "asked": []}

    def load_dataset(identifier: str, config: str | None, *, split: str) -> Any:
        state["asked"].append((identifier, config, split))
        if isinstance(state["rows"], Exception):
            raise state["rows"]
        return state["rows"]

    class Api:
        def dataset_info(self, identifier: str, timeout: float) -> None:
            if isinstance(state["rows"], Exception):
                raise state["rows"]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    hub_library = types.SimpleNamespace(HfApi=Api, constants=types.SimpleNamespace(HF_HUB_OFFLINE=False))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub_library)
    return state


def test_wikitext_calibrates_on_validation_and_evaluates_on_test(data_folder: Path) -> None:
    calibration, evaluation = load_text("wikitext2"), evaluation_text("wikitext2")
    assert calibration.text == " \n = Valid = \n"
    assert evaluation.text == " \n = Test = \n"
    assert calibration.origin == str(data_folder / "wikitext2" / "valid.txt")
    assert calibration.sha256 == hashlib.sha256(calibration.text.encode()).hexdigest()


def test_wikitext_from_the_hub_restores_blank_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: dict[str, Any]
) -> None:
    monkeypatch.setenv("CLOQ_DATA", str(tmp_path))
    hub["rows"] = [{"text": ""}, {"text": " = Title = \n"}]
    assert load_text("wikitext2").text == " \n = Title = \n"
    assert evaluation_text("wikitext2").origin == "hub:Salesforce/wikitext:wikitext-2-v1:test"
    assert [split for _, _, split in hub["asked"]] == ["validation", "test"]


def test_embedded_text_is_long_and_always_the_same() -> None:
    one, other = load_text("embedded"), evaluation_text("embedded")
    assert one == other
    assert len(one.text) > 100_000
    assert one.origin.startswith("embedded")


def test_text_file_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes("Grüße\r\nzwei".encode())
    assert load_text(str(path)).text == "Grüße\nzwei"


def test_json_lines_with_text_or_problems(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n{"question": "2+2?", "answer": "4"}\n', encoding="utf-8")
    assert load_text(str(path)).text == "one\n\n2+2?\n4"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "one"}\n{"text"', "line 2 of .* is not a JSON object"),
        ("[1]\n", "item 1 of .* is not a JSON object"),
        ('{"prompt": "x"}\n', "line 1 of .* has the fields prompt; needed is 'text'"),
        ('{"text": null}\n', "line 1 of .*: 'text' is no text"),
        ('{"question": "x", "answer": 3}\n', "line 1 of .*: 'answer' is no text"),
        ("\n", "is empty"),
        ('{"text": "  "}', "is empty"),
    ],
)
def test_damaged_json_lines_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(CalibrationError, match=message):
        load_text(str(path))


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("", encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"a\.txt is empty; give a file"):
        load_text(str(tmp_path / "a.txt"))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(CalibrationError, match="not UTF-8"):
        load_text(str(tmp_path / "b.txt"))
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(CalibrationError, match=r"is a \.parquet file"):
        load_text(str(tmp_path / "c.parquet"))


def test_gsm8k_by_name(data_folder: Path) -> None:
    (data_folder / "gsm8k").mkdir()
    for split in ("train", "test"):
        row = {"question": f"{split}?", "answer": "#### 1"}
        (data_folder / "gsm8k" / f"{split}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert load_text("gsm8k").text == "train?\n#### 1"
    assert evaluation_text("gsm8k").text == "test?\n#### 1"


@pytest.mark.parametrize("name", ["missing.txt", "./nowhere", "/nowhere/at/all", ""])
def test_a_missing_file_is_not_looked_for_on_the_hub(name: str, hub: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match="is not a readable text file; allowed are wikitext2, gsm8k, embedded"):
        load_text(name)
    assert hub["asked"] == []


def test_hub_id_with_config_and_split(hub: dict[str, Any]) -> None:
    hub["rows"] = [{"question": "q", "answer": "a"}]
    assert load_text("org/problems:main:test").text == "q\na"
    assert load_text("org/problems").origin == "hub:org/problems"
    assert hub["asked"] == [("org/problems", "main", "test"), ("org/problems", None, "train")]


def test_hub_without_network_says_what_to_do(hub: dict[str, Any]) -> None:
    hub["rows"] = ConnectionError("[Errno -2] Name or service not known\nmore lines")
    with pytest.raises(CalibrationError) as caught:
        load_text("org/problems")
    message = str(caught.value)
    assert "cannot be loaded from the Hugging Face hub ([Errno -2] Name or service not known)" in message
    assert "CLOQ_DATA" in message
    assert "\n" not in message
    assert hub["asked"] == []


def test_hub_without_the_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackageError, match=r"pip install cloq-export\[hub\]"):
        load_text("org/problems")


def test_windows_are_pieces_of_the_text_and_depend_on_the_seed_alone() -> None:
    ids = torch.arange(1000) * 3
    windows = sample_windows(ids, 20, 64, seed=5)
    assert windows.shape == (20, 64)
    assert windows.dtype == torch.int64
    assert torch.equal(windows - windows[:, :1], (torch.arange(64) * 3).expand(20, 64))
    torch.manual_seed(99)
    assert torch.equal(windows, sample_windows(ids, 20, 64, seed=5))
    assert not torch.equal(windows, sample_windows(ids, 20, 64, seed=6))
    assert torch.equal(windows[:7], sample_windows(ids, 7, 64, seed=5))


def test_windows_reach_both_ends_of_the_text() -> None:
    starts = sample_windows(torch.arange(12), 400, 10, seed=0)[:, 0]
    assert set(starts.tolist()) == {0, 1, 2}


def test_a_text_of_exactly_one_window_is_enough() -> None:
    assert sample_windows(torch.arange(8), 2, 8, seed=0).tolist() == [list(range(8))] * 2


def test_too_short_text_is_refused() -> None:
    with pytest.raises(CalibrationError, match="has 10 tokens, one window needs 64; give a longer text"):
        sample_windows(torch.arange(10), 4, 64, seed=0)
    with pytest.raises(CalibrationError, match="0 windows of 64 tokens"):
        sample_windows(torch.arange(100), 0, 64, seed=0)


RAW = " \n = Title = \n \n A line with \u2028 in it . \n \n"


def test_the_raw_form_joins_its_lines_as_papers_do(data_folder: Path, hub: dict[str, Any]) -> None:
    """Two line feeds between the hub's rows, which are lines with their line feed, and empty texts for empty lines."""
    hub["rows"] = [{"text": text} for text in ("", " = Title = \n", "", " A line with \u2028 in it . \n", "")]
    joined = "\n\n".join(row["text"] for row in hub["rows"])
    assert evaluation_text("wikitext2-raw:validation").text == joined
    assert hub["asked"] == [("Salesforce/wikitext", "wikitext-2-raw-v1", "validation")]
    (data_folder / "wikitext2-raw").mkdir()
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        (data_folder / "wikitext2-raw" / f"{name}.txt").write_text(RAW + split, encoding="utf-8")
        text = load_text(f"wikitext2-raw:{split}")
        assert text.text == joined + "\n\n" + split
        assert text.origin.endswith(f"{name}.txt")
        # What is trained on is the very text that is calibrated on.
        (example,) = load_examples(f"wikitext2-raw:{split}").examples
        assert example == Example(None, text.text)
    # Unless a split is named: calibration on validation, measured on test, as of the other form.
    assert load_text("wikitext2-raw").text.endswith("validation")
    assert evaluation_text("wikitext2-raw").text.endswith("test")
    assert load_text("wikitext2:test").text == " \n = Test = \n"
    with pytest.raises(CalibrationError, match=r"wikitext2-raw has no split 'dev'; it has train, validation, test\."):
        load_text("wikitext2-raw:dev")


def test_a_mix_holds_its_texts(tmp_path: Path) -> None:
    for name, letter in (("one", "a"), ("two", "b"), ("c+c", "c")):
        (tmp_path / f"{name}.txt").write_text(letter * 50, encoding="utf-8")
    mix = load_text(f"{tmp_path / 'one.txt'} + {tmp_path / 'two.txt'}")
    assert mix.origin == f"{tmp_path / 'one.txt'} + {tmp_path / 'two.txt'}"
    assert mix.sha256 == hashlib.sha256(mix.text.encode()).hexdigest()
    assert [part.text[0] for part in mix.parts] == ["a", "b"]
    # A file's own name may have the sign in it.
    single = load_text(str(tmp_path / "c+c.txt"))
    assert (single.text, single.parts) == ("c" * 50, ())
    with pytest.raises(CalibrationError, match=r"'missing\.txt' is not a readable text file"):
        load_text(f"{tmp_path / 'one.txt'}+missing.txt")


def test_tokenizing_adds_nothing() -> None:
    def tokenizer(text: str, *, add_special_tokens: bool = True, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [*([7] if add_special_tokens else []), *(ord(letter) for letter in text)]}

    ids = tokenize_text(tokenizer, "ab")
    assert ids.tolist() == [97, 98]
    assert ids.dtype == torch.int64


def test_text_is_not_empty() -> None:
    with pytest.raises(CalibrationError, match="is empty"):
        CalibrationText.of(" \n", "somewhere")
    with pytest.raises(CalibrationError, match="the text somewhere holds half of a surrogate pair"):
        CalibrationText.of("a\ud800", "somewhere")
