"""Output on terminals of any encoding, into pipes that close, and signals."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cloq_export.cli import VERBS, main
from cloq_export.cli.output import emit
from cloq_export.cli.render import render_summary
from cloq_export.cli.streams import prepared_streams, write_line
from cloq_export.errors import OutputError

ENCODINGS = ["ascii", "latin-1", "cp1252", "cp437", "koi8-r", "utf-8"]
SUMMARY = {
    "model": "modèle ← 模型",
    "perplexity": {
        "float": {"perplexity": 29.5, "standard_error": 0.5},
        "tokens": 8176,
        "text": os.fsdecode(b"w\xe4rter.txt"),
        "text_sha256": "0123456789abcdef" * 4,
    },
    "notes": ["≥ 3 ± 1"],
}


# A verb that gets a signal at its work, in a process that handles Ctrl-C even if it was started in the background.
SIGNALLED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import cloq_export.texts.word_problems as problems
from cloq_export.cli import main
problems.generate = lambda *_, **__: os.kill(os.getpid(), int(sys.argv[1]))
before = signal.getsignal(signal.SIGTERM)
code = main(["data", "word-problems"])
assert signal.getsignal(signal.SIGTERM) is before
sys.exit(code)
"""


def cloq(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "cloq_export", *arguments],
        capture_output=True,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("as_json", [False, True])
def test_results_are_printed_in_any_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str, as_json: bool) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, errors="strict"))
    with prepared_streams():
        emit(SUMMARY, render_summary, as_json=as_json)
    if as_json:
        assert json.loads(written.getvalue().decode("ascii")) == SUMMARY
        return
    text = written.getvalue().decode(encoding, errors="surrogateescape")
    assert "29.500" in text
    assert b"w\xe4rter.txt" in written.getvalue()  # as it is called on disk, whatever the terminal makes of it
    if encoding == "ascii":
        assert "note: >= 3 +- 1" in text
        assert "(sha256 0123456789abcdef...)" in text
        assert "mod?le ? ??" in text


def test_every_help_is_plain_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        assert main([verb, "--help"]) == 0
        assert capsys.readouterr().out.isascii(), verb


@pytest.mark.parametrize("encoding", ["ascii"])
def test_errors_keep_their_line_and_code(tmp_path: Path, encoding: str) -> None:
    missing = str(tmp_path / "größe 模型")
    strict = {"PYTHONIOENCODING": f"{encoding}:strict", "PYTHONUTF8": "0"}
    for arguments, code in (["inspect", missing], 1), (["eval", "x", "--window", "zwölf…"], 2):
        done = cloq(arguments, **strict)
        assert done.returncode == code
        assert b"Traceback" not in done.stderr
        done.stderr.decode(encoding)


def test_a_file_name_that_is_no_text(tmp_path: Path) -> None:
    done = subprocess.run(
        [os.fsencode(sys.executable), b"-m", b"cloq_export", b"inspect", os.fsencode(tmp_path) + b"/\xff"],
        capture_output=True,
        env={**os.environ, "LC_ALL": "C"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: the name ")
    assert b"/\xff is not UTF-8" in done.stderr


def test_the_reader_may_have_left() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "cloq_export", "data", "word-problems", "--count", "3"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=120, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["data", "word-problems", "--count", "3"], ["--help"], ["inspect", "--help"]])
def test_a_full_device_behind_standard_output_is_said(arguments: list[str], unbuffered: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cloq_export", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            timeout=120,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.decode().splitlines() == [
        "error: standard output cannot be written: No space left on device. What the command wrote to files is kept; "
        "send its output to a place that takes it."
    ]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_full_device_is_said_for_every_result(monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(OutputError, match="standard output cannot be written: No space left on device"):
        emit(SUMMARY, render_summary, as_json=as_json)


def test_a_gate_is_judged_although_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", closed)
        emit(SUMMARY, render_summary, as_json=True)
        write_line("and nothing more fails")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_verb_with_one_line(sent: signal.Signals, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(int(sent))], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (code, "interrupted: nothing was written.\n")


def test_bars_of_libraries_are_off_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setenv("TQDM_DISABLE", "0")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    with prepared_streams():
        assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
        assert os.environ["TQDM_DISABLE"] == "0"  # a user's own word
    assert "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ


def test_a_folder_that_is_gone_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir("gone")
    os.rmdir(tmp_path / "gone")
    assert main(["inspect", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.err == (
        "error: the folder that the command was started in no longer exists; change to one that does, and run it "
        "again.\n"
    )
    assert printed.out == ""
