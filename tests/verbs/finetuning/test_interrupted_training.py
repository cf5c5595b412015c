"""A training that was stopped, killed or diverged: the same bytes afterwards, or the last good adapter."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from small_finetunes import NAME, arguments_of

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.cli import main
from cloq_export.errors import BindingError, DivergedError, UsageError
from cloq_export.files.atomic import write_json
from cloq_export.formats.peft import read_adapter
from cloq_export.recipe import Recipe
from cloq_export.train import trainer
from cloq_export.train.trainer import COMPLETE_NAME, AdapterTrainer, newest_checkpoint
from cloq_export.verbs.finetune import finetune
from cloq_export.verbs.run import run as make_run

RecipeFor = Callable[..., Recipe]
Contents = Callable[[Path], dict[str, str]]
Trained = tuple[Path, dict[str, str], dict[str, Any]]


def test_interrupted_training_ends_with_the_same_curve_and_bytes(
    run: Path, made: Path, tmp_path: Path, options: Any, silent: Console, contents: Contents, monkeypatch: Any
) -> None:
    """Stopped while it writes its second checkpoint, in the middle of an epoch, with accumulation and two epochs."""
    recipe = options(steps=0, epochs=1.5, gradient_accumulation=2, eval_samples=16)
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(made, undisturbed)
    finetune(undisturbed, recipe, console=silent)

    def stopping(path: Path, content: Any) -> None:
        if path.parent.name == "checkpoint-6":
            raise KeyboardInterrupt
        write_json(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "write_json", stopping)
        with pytest.raises(KeyboardInterrupt):
            finetune(run, recipe, console=silent)
    checkpoints = run / "work" / f"finetune-{NAME}" / "checkpoints"
    assert newest_checkpoint(checkpoints) == checkpoints / "checkpoint-3"
    assert (checkpoints / "checkpoint-6").is_dir()
    summary = finetune(run, recipe, console=silent)
    assert "continued from step 3" in summary.notes
    assert summary.training.curve.steps > 8
    assert contents(run) == contents(undisturbed)


@pytest.mark.slow
def test_killed_training_ends_with_the_same_bytes(
    run: Path, trained: Trained, options: Any, silent: Console, contents: Contents
) -> None:
    """Killed by the system at some step, once before the first checkpoint and once after it."""
    arguments = arguments_of(run, options())
    for step in (2, 7):
        code = f"arguments, at = {arguments!r}, {step}\n{_KILLED}"
        killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "continued from step 6" in finetune(run, options(), console=silent).notes
    assert contents(run) == contents(trained[0])


# Runs in a process of its own, which the system kills when it begins a step.
_KILLED = """
import os, signal, sys
from cloq_export.cli import main
from cloq_export.train.trainer import AdapterTrainer
step = AdapterTrainer.training_step
def killing(self, *rest):
    if self.state.global_step == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *rest)
AdapterTrainer.training_step = killing
sys.exit(main(arguments))
"""


def test_a_damaged_checkpoint_is_not_continued_from(tmp_path: Path) -> None:
    for step in (3, 6):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trained.safetensors").write_bytes(b"x" * step)
    assert newest_checkpoint(tmp_path) is None
    for step in (3, 6):
        digest = hashlib.sha256(b"x" * step).hexdigest()
        (tmp_path / f"checkpoint-{step}" / COMPLETE_NAME).write_text(json.dumps({"trained.safetensors": digest}))
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    (tmp_path / "checkpoint-6" / "trained.safetensors").write_bytes(b"y" * 6)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


def test_other_options_do_not_continue_a_training(run: Path, options: Any, silent: Console) -> None:
    with pytest.raises(DivergedError):
        finetune(run, options(learning_rate=1e30, weight_decay=0.0), console=silent)
    with pytest.raises(UsageError, match=r"begun with other options and not finished \(learning_rate: 1e\+30 then"):
        finetune(run, options(weight_decay=0.0), console=silent)


def test_a_diverging_loss_stops_and_keeps_the_last_good_adapter(
    run: Path, options: Any, silent: Console, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = AdapterTrainer.training_step

    def diverging(self: Any, model: Any, inputs: Any, count: Any = None) -> torch.Tensor:
        if self.state.global_step == 4:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(math.nan)
        return step(self, model, inputs, count)

    monkeypatch.setattr(AdapterTrainer, "training_step", diverging)
    assert main(arguments_of(run, options())) == 1
    printed = capsys.readouterr().err
    line = printed[printed.index("error: ") :]
    assert line.startswith("error: the loss became nan at step 5 (learning rate 0.01): the training diverged; the ")
    assert "adapter of step 3 is kept in" in line
    assert line.count("\n") == 1
    assert "Traceback" not in printed
    good = read_adapter(run / "work" / f"finetune-{NAME}" / "last-good")
    assert all(bool(torch.isfinite(pair.lora_A).all()) for pair in good.pairs.values())
    assert not RunDirectory.open(run).adapter_path(NAME).exists()


def test_a_changed_base_is_refused(run: Path, recipe_for: RecipeFor, options: Any, silent: Console) -> None:
    with pytest.raises(DivergedError):
        finetune(run, options(learning_rate=1e30), console=silent)
    other = run.parent / "other"
    make_run(recipe_for("llama", bits=2, seed=5, adapter_dtype="float32"), other, console=silent)
    for part in ("checkpoint", "adapters", "layers"):
        shutil.rmtree(run / part)
        shutil.copytree(other / part, run / part)
    with pytest.raises(BindingError, match="the base has changed since"):
        finetune(run, options(learning_rate=1e30), console=silent)
    weights = bytearray((run / "checkpoint" / "model.safetensors").read_bytes())
    place = weights.index(b"qweight")  # a header names it; the codes follow far behind
    assert place > 0
    weights[-100] ^= 1
    (run / "checkpoint" / "model.safetensors").write_bytes(weights)
    with pytest.raises(BindingError, match="the base was changed after it was written"):
        finetune(run, options(name="again"), console=silent)
