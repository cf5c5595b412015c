"""Paths as people type them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from cloq_export.errors import UsageError
from cloq_export.files.spelled_paths import command_line, expand_user, is_same_place, require_text, split_list


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    folder = tmp_path / "a+b, c='d' \"ü\" 模[1]{n}:x"
    folder.mkdir()
    for name in ("one+two.txt", "t,a=sk.jsonl", "plain.txt"):
        (folder / name).write_text("x", encoding="utf-8")
    return folder


def test_separators_inside_the_names_of_files_do_not_separate(odd: Path) -> None:
    mixed, plain = f"{odd}/one+two.txt", f"{odd}/plain.txt"
    assert split_list(f"wikitext2+{mixed} + {plain}+gsm8k", "+") == ["wikitext2", mixed, plain, "gsm8k"]
    assert split_list(mixed, "+") == [mixed]
    assert split_list("a+b", "+") == ["a", "b"]
    assert split_list(f"{odd}/missing+two.txt", "+") == [
        str(odd).partition("+")[0],
        f"b{str(odd).partition('+b')[2]}/missing",
        "two.txt",
    ]
    asked = f"ppl, gsm8k={odd}/t,a=sk.jsonl,boolq={plain},piqa"
    assert split_list(asked, ",", label="=") == ["ppl", f"gsm8k={odd}/t,a=sk.jsonl", f"boolq={plain}", "piqa"]
    assert split_list("x" * 5000 + "+" + "y\0", "+") == ["x" * 5000, "y\0"]


def test_spellings_of_one_place(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(odd)
    monkeypatch.setenv("HOME", str(odd))
    (odd.parent / "link").symlink_to(odd)
    for other in (f"{odd}/", ".", f"../{odd.name}", "~", str(odd.parent / "link")):
        assert is_same_place(str(odd), other), other
    assert not is_same_place(str(odd), str(odd.parent))
    assert not is_same_place("org/name", "org/name/")  # no place of this machine
    assert not is_same_place(3, str(odd))


def test_a_home_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert expand_user("~no-such-user/x") == Path("~no-such-user/x")


def test_a_suggested_command_can_be_pasted(odd: Path) -> None:
    assert shlex.split(command_line("cloq", "eval", odd, "--windows", 64)) == [
        "cloq",
        "eval",
        str(odd),
        "--windows",
        "64",
    ]
    assert command_line("cloq", "eval", "runs/one") == "cloq eval runs/one"


def test_a_name_that_is_no_text() -> None:
    require_text(Path("模"))
    with pytest.raises(UsageError, match="is not UTF-8, and safetensors opens no such file"):
        require_text(os.fsdecode(b"w\xe4rter"))
