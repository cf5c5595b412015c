"""Sets by name: from the data folder, from the hub, or generated."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from cloq_export.errors import DataError, MissingPackageError
from cloq_export.texts.data_sets import local_file
from cloq_export.texts.examples import Example, instruction_prompt
from cloq_export.texts.named_sets import WORD_PROBLEM_SETS, load_examples, set_names
from cloq_export.texts.word_problems import generate

ROW = {"instruction": "2+2?", "input": "", "output": "It is 4.", "answer": "4.0"}
LEARNED = Example(instruction_prompt("2+2?"), "It is 4.")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLOQ_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for the hub: `rows` is what it answers, an exception is raised; `asked` is what was asked."""
    state: dict[str, Any] = {"rows": [], "asked": []}

    def load_dataset(identifier: str, config: str | None, *, split: str) -> Any:
        state["asked"].append((identifier, config, split))
        return state["rows"]

    class Api:
        def dataset_info(self, identifier: str, timeout: float) -> None:
            if isinstance(state["rows"], Exception):
                raise state["rows"]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    library = types.SimpleNamespace(HfApi=Api, constants=types.SimpleNamespace(HF_HUB_OFFLINE=False))
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    return state


def test_the_data_folder_comes_first(folder: Path, hub: dict[str, Any]) -> None:
    (folder / "wikitext2").mkdir()
    (folder / "wikitext2" / "valid.txt").write_text(" = Title = \n", encoding="utf-8")
    (folder / "gsm8k").mkdir()
    (folder / "gsm8k" / "train.jsonl").write_text(json.dumps({"question": "q", "answer": "a\n#### 1"}))
    (folder / "math_10k.json").write_text(json.dumps([ROW, ROW]))
    (folder / "commonsense170k").mkdir()
    (folder / "commonsense170k" / "train.jsonl").write_text(json.dumps(ROW))
    assert local_file("no", "gsm8k/train.jsonl") == folder / "gsm8k" / "train.jsonl"
    assert load_examples("wikitext2:validation").examples == (Example(None, " = Title = \n"),)
    assert load_examples("gsm8k").examples == (Example("Question: q\nAnswer:", " a\n#### 1"),)
    assert load_examples("math10k").examples == (LEARNED, LEARNED)
    assert load_examples("commonsense170k").examples == (LEARNED,)
    assert load_examples("wikitext2:validation").origin == str(folder / "wikitext2" / "valid.txt")
    assert hub["asked"] == []


def test_without_a_data_folder_the_hub_is_asked(hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLOQ_DATA", raising=False)
    hub["rows"] = [ROW]
    assert load_examples("math10k").examples == (LEARNED,)
    assert hub["asked"] == [("lmms-lab/Math10K", None, "train")]


def test_empty_texts_of_a_set_on_the_hub_are_left_out(hub: dict[str, Any]) -> None:
    hub["rows"] = [{"text": ""}, {"text": "one"}, {"text": " "}, {"text": "two"}]
    assert load_examples("some/set").examples == (Example(None, "one"), Example(None, "two"))


def test_the_hub_comes_second(folder: Path, hub: dict[str, Any]) -> None:
    hub["rows"] = [ROW, ROW, ROW]
    found = load_examples("math10k")
    assert found.examples == (LEARNED,) * 3
    assert found.origin == "hub:lmms-lab/Math10K:train"
    load_examples("commonsense170k")
    assert load_examples("org/set:config:dev").origin == "hub:org/set:config:dev"
    load_examples("org/set::test")
    hub["rows"] = [{"text": ""}, {"text": " = Title = \n"}]
    assert load_examples("wikitext2:test").examples == (Example(None, " \n = Title = \n"),)
    assert hub["asked"] == [
        ("lmms-lab/Math10K", None, "train"),
        ("zwhe99/commonsense_170k", None, "train"),
        ("org/set", "config", "dev"),
        ("org/set", None, "test"),
        ("Salesforce/wikitext", "wikitext-2-v1", "test"),
    ]


def test_rows_of_the_hub_are_named_too(folder: Path, hub: dict[str, Any]) -> None:
    hub["rows"] = [ROW, {"instruction": "a", "output": ""}]
    with pytest.raises(DataError, match="row 2 of hub:lmms-lab/Math10K:train: 'output' is empty"):
        load_examples("math10k")
    hub["rows"] = []
    with pytest.raises(DataError, match="hub:openai/gsm8k:main:train holds no example"):
        load_examples("gsm8k")


def test_without_network_or_package(folder: Path, hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    hub["rows"] = ConnectionError("no route\nmore")
    with pytest.raises(DataError, match=r"openai/gsm8k cannot be loaded .*\(no route\).*put gsm8k/train.jsonl into"):
        load_examples("gsm8k")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackageError, match=r"pip install cloq-export\[hub\].*put math10k/train.jsonl into"):
        load_examples("math10k")


def test_word_problems_are_generated(folder: Path, hub: dict[str, Any]) -> None:
    train, test = load_examples("word-problems"), load_examples("word-problems:test")
    assert len(test.examples) == 500
    first = generate(1)[0]
    assert train.examples[0] == Example(f"Question: {first.question}\nAnswer:", f" {first.answer}")
    assert not set(train.examples) & set(test.examples)
    assert test.origin == "generated (word-problems, test)"
    assert len(train.examples) == 2000
    short = load_examples("short-word-problems:test").examples
    assert max(example.completion.count("<<") for example in short) == 2
    assert max(example.completion.count("<<") for example in test.examples) == 4
    assert hub["asked"] == []


def test_files_by_path(folder: Path, hub: dict[str, Any]) -> None:
    (folder / "mine.jsonl").write_text(f"{json.dumps(ROW)}\n" * 3)
    assert load_examples(str(folder / "mine.jsonl")).examples == (LEARNED,) * 3
    for name in (str(folder / "nowhere.jsonl"), "gsm8", "./mine", "", str(folder), "org/rows.txt"):
        with pytest.raises(
            DataError, match=r"is no file and no data set that is known by name \(wikitext2, wikitext2-raw"
        ):
            load_examples(name)
    assert hub["asked"] == []


def test_unknown_names_and_splits(folder: Path) -> None:
    assert set_names() == ("wikitext2", "wikitext2-raw", "gsm8k", "math10k", "commonsense170k", *WORD_PROBLEM_SETS)
    with pytest.raises(DataError, match="math10k has no split 'test'; it has train"):
        load_examples("math10k:test")
    with pytest.raises(DataError, match="word-problems has no split 'dev'; it has train, test"):
        load_examples("word-problems:dev")
