"""A run that was killed, wherever it was, ends with the same bytes when it is continued."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from run_modes import ERROR_AWARE, INDEPENDENT, modes

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.cli import main
from cloq_export.recipe import Recipe
from cloq_export.verbs.quantize import quantize

RecipeFor = Callable[..., Recipe]
Contents = Callable[[Path], dict[str, str]]
# Runs in a process of its own: `main(arguments)`, killed by the system at the first matching operation, before it.
_KILLED = """
import os, signal, sys
import cloq_export.compress.strategies
from cloq_export.cli import main
def watch(event, details):
    if event == kill_event and any(kill_text in str(detail) for detail in details[:2]):
        os.kill(os.getpid(), signal.SIGKILL)
sys.stderr = open(os.devnull, "w")
cloq_export.compress.strategies.TOKENS_PER_BATCH = 64
sys.addaudithook(watch)
sys.exit(main(arguments))
"""
# In the order in which a run comes by; every one is met by the command that continues after the kill before it.
KILL_POINTS = [
    ("os.rename", "/run.json"),  # nothing but a lock
    ("os.rename", "/model.layers.0.self_attn.k_proj.safetensors"),  # in the middle of the q, k, v group
    ("open", "/layers/.model.layers.0.self_attn.o_proj."),  # behind the group
    ("os.rename", "/model.layers.1.mlp.up_proj.safetensors"),  # in the middle of the last block
    ("os.rename", "/reports/layers.json"),
    ("os.rename", "/adapter_model.safetensors"),
    ("os.rename", "/model.safetensors"),  # the weights of the checkpoint
    ("open", "tokenizer.json"),  # its companions are being copied
    ("os.rename", "/cloq_certificate.json"),  # it was read back and compared
    ("os.rename", "/run/checkpoint"),  # all of it is written
    ("os.rename", "/reports/evaluation.json"),
    ("os.rename", "/run.json"),  # the very last write
]


@pytest.fixture(scope="module")
def forks() -> Any:
    """Give the context of processes that start from a clean server with everything imported: no threads, no waiting."""
    if sys.platform == "win32":
        pytest.skip("there is no SIGKILL")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            *("cloq_export.cli.run", "cloq_export.verbs.run_and_finetune"),
            *("cloq_export.cli.adapt", "cloq_export.verbs.adapt"),
            *("transformers.models.llama.modeling_llama", "tokenizers", "peft"),
        ]
    )
    return context


def arguments_of(recipe: Recipe, out: Path) -> list[str]:
    settings = [
        f"{name}={value}"
        for name, value in recipe.to_mapping().items()
        if name not in ("model", "overrides", "blocks") and value != getattr(Recipe(), name)
    ]
    return ["run", recipe.model, "--out", str(out), *(word for text in settings for word in ("--set", text))]


def run_until(forks: Any, arguments: list[str], event: str, text: str) -> int:
    """Run a command in a process that is killed at one operation; return its exit code."""
    values = {"arguments": arguments, "kill_event": event, "kill_text": text}
    process = forks.Process(target=exec, args=(_KILLED, values))
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return int(process.exitcode)


@pytest.mark.slow
@modes
def test_killed_everywhere_it_ends_with_the_same_bytes(
    mode: dict[str, float],
    tmp_path: Path,
    recipe_for: RecipeFor,
    contents: Contents,
    uninterrupted: Any,
    forks: Any,
) -> None:
    recipe, out = recipe_for("llama", bits=3, **mode), tmp_path / "run"
    finished: set[str] = set()
    for number, (event, text) in enumerate(KILL_POINTS):
        assert run_until(forks, arguments_of(recipe, out), event, text) == -signal.SIGKILL, (event, text)
        assert RunDirectory.is_run(out) == (number > 0)
        if number:
            run = RunDirectory.open(out)
            assert run.state == "running"
            assert run.damaged_layers() == {}
            assert finished <= run.completed_modules()
            finished = run.completed_modules()
            assert (out / "checkpoint").exists() == (number > KILL_POINTS.index(("os.rename", "/run/checkpoint")))
    assert len(finished) == 14
    assert run_until(forks, arguments_of(recipe, out), "never", "") == 0
    assert contents(out) == contents(uninterrupted("llama", mode))


@pytest.mark.slow
def test_killed_while_it_adapts(
    tmp_path: Path, recipe_for: RecipeFor, silent: Console, contents: Contents, uninterrupted: Any, forks: Any
) -> None:
    recipe, out = recipe_for("llama", bits=3, **INDEPENDENT), tmp_path / "run"
    quantize(recipe, out, console=silent)
    arguments = ["adapt", str(out), "--rank", "4"]
    for event, text in (
        ("os.rename", "/model.layers.1.self_attn.v_proj.safetensors"),
        ("os.rename", "/adapter_model.safetensors"),
        ("os.rename", "/reports/adapter-cloq.json"),
    ):
        assert run_until(forks, arguments, event, text) == -signal.SIGKILL, (event, text)
        assert RunDirectory.open(out).state == "quantized"
    assert run_until(forks, arguments, "never", "") == 0
    assert contents(out / "adapters") == contents(uninterrupted("llama", INDEPENDENT) / "adapters")
    assert not list(out.glob("work/*"))


def test_an_interrupt_from_the_keyboard(
    tmp_path: Path,
    recipe_for: RecipeFor,
    contents: Contents,
    uninterrupted: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, out = recipe_for("llama", bits=3, **ERROR_AWARE), tmp_path / "run"
    write_layer = RunDirectory.write_layer

    def interrupted(run: RunDirectory, module: str, *rest: Any) -> None:
        if module.endswith("1.self_attn.o_proj"):
            raise KeyboardInterrupt
        write_layer(run, module, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_layer", interrupted)
        assert main(arguments_of(recipe, out)) == 130
    assert capsys.readouterr().err.endswith("interrupted: the same command continues where it stopped.\n")
    assert main(arguments_of(recipe, out)) == 0
    assert "continued a run that had 10 of 14 layers" in " ".join(capsys.readouterr().out.split())
    assert contents(out) == contents(uninterrupted("llama", ERROR_AWARE))
