"""Files are whole or absent, and the same content gives the same bytes."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cloq_export.errors import RunDirectoryError
from cloq_export.files import atomic

KILLED_WRITER = """
import os, signal, sys
from cloq_export.files import atomic

path, moment = sys.argv[1:]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

write = os.write
if moment == "half of the content written":
    def half(descriptor, view):
        write(descriptor, view[: len(view) // 2])
        die()
    os.write = half
elif moment == "before fsync":
    os.fsync = die
elif moment == "before rename":
    os.replace = die
elif moment == "after rename":
    replace = os.replace
    def replace_and_die(*args):
        replace(*args)
        die()
    os.replace = replace_and_die
atomic.write_bytes(path, b"new" * 100_000)
"""


@pytest.mark.parametrize("before", [None, b"old"], ids=["new file", "replaced file"])
@pytest.mark.parametrize("moment", ["half of the content written", "before fsync", "before rename", "after rename"])
def test_killed_writer_leaves_no_half_file(tmp_path: Path, moment: str, before: bytes | None) -> None:
    path = tmp_path / "layer.bin"
    if before is not None:
        path.write_bytes(before)
    child = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(path), moment], check=False, timeout=60)
    assert child.returncode == -signal.SIGKILL
    content = path.read_bytes() if path.exists() else None
    assert content == (b"new" * 100_000 if moment == "after rename" else before)
    left = [entry.name for entry in tmp_path.iterdir() if entry != path]
    assert all(atomic.is_partial(name) for name in left)
    atomic.remove_partials(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ([path.name] if content is not None else [])


def raise_error(number: int):
    def fail(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "a.json"
    atomic.write_json(path, {"a": 1})
    monkeypatch.setattr(os, call, raise_error(errno.ENOSPC))
    with pytest.raises(RunDirectoryError, match=r"the disk is full while writing .*a\.json; free some space and run"):
        atomic.write_json(path, {"a": 2})
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_unwritable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "open", raise_error(number))
    with pytest.raises(RunDirectoryError, match=r"x\.bin cannot be written: .*; choose another folder, or change its"):
        atomic.write_bytes(tmp_path / "x.bin", b"x")


def test_really_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="cannot be written: Not a directory; choose another folder"):
        atomic.write_bytes(tmp_path / "file" / "x.bin", b"x")
    with pytest.raises(RunDirectoryError, match="cannot be written: No such file or directory"):
        atomic.write_bytes(tmp_path / "absent" / "x.bin", b"x")


def test_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic.write_bytes(tmp_path / "x.bin", b"x")
    assert list(tmp_path.iterdir()) == []


def test_json_is_strict_and_sorted(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic.write_json(path, {"b": float("nan"), "a": [float("inf"), 1.5, Path("x"), {"z"}], "ü": None})
    assert path.read_text(encoding="utf-8") == (
        '{\n  "a": [\n    null,\n    1.5,\n    "x",\n    [\n      "z"\n    ]\n  ],\n  "b": null,\n  "ü": null\n}\n'
    )
    atomic.write_json(path, {"b": 1, "a": 2}, sort_keys=False)
    assert list(json.loads(path.read_text())) == ["b", "a"]


def always(_folder: Path) -> bool:
    return True


def never(_folder: Path) -> bool:
    return False


def test_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "checkpoint"
    with atomic.write_folder(target, owned=never) as filling:
        (filling / "a").write_text("a")
        assert not target.exists()
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["checkpoint"]
    with atomic.write_folder(target, owned=always) as filling:
        (filling / "b").write_text("b")
    assert [entry.name for entry in target.iterdir()] == ["b"]
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["checkpoint"]


def test_folder_of_a_user_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("work")
    with (
        pytest.raises(RunDirectoryError, match="holds files that were not written by this command; choose an empty"),
        atomic.write_folder(tmp_path / "mine", owned=never),
    ):
        pass
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "work"
    with (
        pytest.raises(RunDirectoryError, match="is not a folder; choose another folder"),
        atomic.write_folder(tmp_path / "mine" / "thesis.txt", owned=always),
    ):
        pass


def test_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    with atomic.write_folder(target, owned=never) as filling:
        (filling / "a").write_text("a")
    with (
        pytest.raises(RunDirectoryError, match="the disk is full while writing"),
        atomic.write_folder(target, owned=always),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError), atomic.write_folder(target, owned=always):
        raise FileNotFoundError("another file")
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]
    assert (target / "a").read_text() == "a"


def test_a_folder_is_made_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        atomic.make_folder(tmp_path / "deep" / "new")
    assert (tmp_path / "deep" / "new").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="file is not a folder; choose another one with `out`"):
        atomic.make_folder(tmp_path / "file")
    with pytest.raises(RunDirectoryError, match="cannot be written: Not a directory; choose another folder"):
        atomic.make_folder(tmp_path / "file" / "new")
    monkeypatch.setattr(atomic.os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(RunDirectoryError, match="cannot be written: Permission denied; choose another folder, or"):
        atomic.make_folder(tmp_path / "deep")


def test_long_names_fit(tmp_path: Path) -> None:
    name = "m" * 243 + ".safetensors"
    atomic.write_bytes(tmp_path / name, b"x")
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
