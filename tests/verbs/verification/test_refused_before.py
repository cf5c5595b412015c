"""What cannot be verified is refused in one line, before anything is measured."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from cloq_export.errors import (
    BindingError,
    MissingPackageError,
    RunDirectoryError,
    UsageError,
)
from cloq_export.formats.peft import read_adapter, write_adapter
from cloq_export.types import LoraPair
from cloq_export.verbs.verification import float_side
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verify import verify


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runtime": "vlm"}, r"`runtime` is 'vlm'; allowed are hf, vllm, vllm-server, onnx \(did you mean 'vllm'"),
        ({"tasks": ("gsm8",)}, r"`tasks` is 'gsm8'; allowed are ppl, gsm8k"),
        ({"adapters": ("a/b=cloq",)}, r"'a/b' cannot be the name of an adapter"),
        ({"adapters": ("a=cloq", "a=second")}, r"two adapters have the name 'a'"),
        ({"window": 4000}, r"model reads at most 64"),
        ({"longest": 400}, r"`longest` is 400; the model is served with up to 64 tokens .* choose 64"),
        ({"problems": 0}, r"`problems` is 0; it must be at least 1"),
        ({"detect": 3.0}, r"`detect` is 3.0; a share of the questions from 0.005 to 0.5 is needed, for example 0.03"),
        ({"detect": 0.1, "problems": 9}, r"`problems` is 9 and `detect` is 0.1; .* leave one out"),
        ({"prompts": -1}, r"`prompts` is -1; it must be at least 0"),
    ],
)
def test_misuse(
    exported: Path, options: VerifyOptions, silent: Console, changes: Any, message: str, texts: Any
) -> None:
    if "window" in changes:
        changes = {**changes, "window": 70}
    with pytest.raises(UsageError, match=message):
        verify(exported, dataclasses.replace(options, **changes), console=silent)


def test_an_adapter_of_another_base_is_refused(
    tmp_path: Path, exported: Path, options: VerifyOptions, silent: Console
) -> None:
    read = read_adapter(exported / "adapters" / "cloq")
    write_adapter(tmp_path / "other", read.pairs, base_model="m", base_fingerprint="sha256:" + "0" * 64)
    asked = dataclasses.replace(options, adapters=(f"other={tmp_path / 'other'}",))
    with pytest.raises(BindingError, match="is bound to the base sha256:000"):
        verify(exported, asked, console=silent)
    report = verify(exported, dataclasses.replace(asked, force=True), console=silent)
    assert report.notes[0].endswith("it was taken by force")
    assert report.adapters[0].bound_to_this_base is False


@pytest.mark.parametrize("runtime", ["vllm", "vllm-server"])
def test_what_an_engine_cannot_do_is_told_before_anything_is_measured(
    tmp_path: Path,
    exported: Path,
    options: VerifyOptions,
    silent: Console,
    monkeypatch: pytest.MonkeyPatch,
    runtime: str,
) -> None:
    monkeypatch.setattr(float_side, "open_model", lambda *_, **__: pytest.fail("the float model was read"))
    bare = tmp_path / "bare"
    # Isolated and without site-packages: an environment that has nothing.
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    asked = dataclasses.replace(options, runtime=runtime, python=bare)
    with pytest.raises(MissingPackageError, match=r"vLLM is not installed for .*bare; install vllm"):
        verify(exported, asked, console=silent)
    read = read_adapter(exported / "adapters" / "cloq")
    bound = {"base_model": "m", "base_fingerprint": str(read.base_fingerprint)}
    wide = {
        name: LoraPair(torch.zeros(600, pair.lora_A.shape[1]), torch.zeros(pair.lora_B.shape[0], 600), 600.0)
        for name, pair in read.pairs.items()
    }
    write_adapter(tmp_path / "wide", wide, **bound)
    with pytest.raises(UsageError, match=r"wide has rank 600 at .*; the server takes up to 512"):
        verify(exported, dataclasses.replace(asked, adapters=(str(tmp_path / "wide"),)), console=silent)


def test_a_place_for_the_report_is_looked_at_first(
    tmp_path: Path, exported: Path, options: VerifyOptions, silent: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float_side, "open_model", lambda *_, **__: pytest.fail("the float model was read"))
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="file is not a folder; choose another one with `out`"):
        verify(exported, dataclasses.replace(options, out=tmp_path / "file"), console=silent)
