"""The same command ends with the same bytes, however often and wherever it was stopped on the way."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.cli import main
from cloq_export.errors import FormatError, RunDirectoryError
from cloq_export.files import atomic, tensor_writer
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.recipe import Recipe
from cloq_export.verbs.adapt import adapt
from cloq_export.verbs.evaluate import evaluate
from cloq_export.verbs.export import export as write_export
from cloq_export.verbs.options import EvaluateOptions, ExportOptions
from cloq_export.verbs.quantize import quantize
from cloq_export.verbs.run import run as make_run

INDEPENDENT, ERROR_AWARE = {"error_aware": 0.0}, {"error_aware": 0.5}
modes = pytest.mark.parametrize("mode", [INDEPENDENT, ERROR_AWARE], ids=["independent", "error-aware"])

RecipeFor = Callable[..., Recipe]
Contents = Callable[[Path], dict[str, str]]


@pytest.fixture(autouse=True)
def _several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloq_export.compress.strategies.TOKENS_PER_BATCH", 64)


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, recipe_for: RecipeFor, silent: Console
) -> Callable[[str, dict[str, float]], Path]:
    """Return a function to the directory of a run that nothing disturbed; it must only be read."""
    made: dict[tuple[Any, ...], Path] = {}

    def run(family: str, mode: dict[str, float]) -> Path:
        key = (family, *mode.values())
        if key not in made:
            made[key] = tmp_path_factory.mktemp("uninterrupted") / "run"
            make_run(recipe_for(family, bits=3, **mode), made[key], console=silent)
        return made[key]

    return run


@modes
def test_two_runs_write_the_same_bytes(
    mode: dict[str, float],
    tmp_path: Path,
    recipe_for: RecipeFor,
    silent: Console,
    contents: Contents,
    uninterrupted: Any,
) -> None:
    make_run(recipe_for("llama", bits=3, **mode), tmp_path / "somewhere" / "else", console=silent)
    expected = contents(uninterrupted("llama", mode))
    assert contents(tmp_path / "somewhere" / "else") == expected
    assert len(expected) > 20
    assert not [name for name in expected if name.endswith(".partial")]
    # Running it once more measures again and changes nothing.
    make_run(recipe_for("llama", bits=3, **mode), tmp_path / "somewhere" / "else", console=silent)
    assert contents(tmp_path / "somewhere" / "else") == expected


@pytest.mark.parametrize("family", ["llama", "plain-experts", "mixtral"])
@modes
def test_whatever_is_missing_is_made_again(
    mode: dict[str, float],
    family: str,
    tmp_path: Path,
    recipe_for: RecipeFor,
    silent: Console,
    contents: Contents,
    uninterrupted: Any,
) -> None:
    """Any subset of layers, whole groups and single members of one, and the parts made from them."""
    whole = uninterrupted(family, mode)
    expected = contents(whole)
    shutil.copytree(whole, tmp_path / "run")
    layers = sorted((tmp_path / "run" / "layers").iterdir())
    drawn = random.Random(0)
    for count in (1, 3, len(layers) // 2):
        for path in drawn.sample(layers, count):
            path.unlink()
        if count == 3:
            damaged = next(path for path in layers if path.exists())
            damaged.write_bytes(damaged.read_bytes()[:-7])
            shutil.rmtree(tmp_path / "run" / "checkpoint")
        make_run(recipe_for(family, bits=3, **mode), tmp_path / "run", console=silent)
        assert contents(tmp_path / "run") == expected


# What a kill leaves behind.

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


@pytest.mark.parametrize(
    "mode", [pytest.param(INDEPENDENT, marks=pytest.mark.slow), ERROR_AWARE], ids=["independent", "error-aware"]
)
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


# A disk that fails.


@pytest.fixture
def full_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function to a context in which the disk has so many bytes left."""

    def context(space: int, code: int = errno.ENOSPC) -> Any:
        patch = pytest.MonkeyPatch.context()
        left = space

        class Limited:
            def __enter__(self) -> None:
                entered = patch.__enter__()
                write = os.write

                def write_all(descriptor: int, view: memoryview) -> None:
                    nonlocal left
                    taken = min(left, len(view))
                    left -= taken
                    write(descriptor, view[:taken])
                    if taken < len(view):
                        raise OSError(code, os.strerror(code))

                for module in (atomic, tensor_writer):
                    entered.setattr(module, "write_all", write_all)

            def __exit__(self, *details: Any) -> None:
                patch.__exit__(*details)

        return Limited()

    return context


@modes
def test_a_full_disk_keeps_what_was_done(
    mode: dict[str, float],
    tmp_path: Path,
    recipe_for: RecipeFor,
    silent: Console,
    contents: Contents,
    uninterrupted: Any,
    full_at: Callable[..., Any],
) -> None:
    recipe, out = recipe_for("llama", bits=3, **mode), tmp_path / "run"
    done = -1
    # Each try has a little more space than the last: it fails in the first file, in layers, adapter and checkpoint.
    for space in (100, 30_000, 60_000, 40_000, 20_000, 30_000, 45_000):
        with full_at(space), pytest.raises(RunDirectoryError, match="the disk is full while writing") as error:
            make_run(recipe, out, console=silent)
        assert "free some space and run the same command again" in str(error.value)
        assert not [name for name in contents(out) if name.endswith(".partial")] if out.exists() else True
        completed = len(RunDirectory.open(out).completed_modules()) if RunDirectory.is_run(out) else 0
        assert completed > done or completed == 14
        done = completed
        if completed:
            assert RunDirectory.open(out).state == "running"
    assert done == 14
    make_run(recipe, out, console=silent)
    assert contents(out) == contents(uninterrupted("llama", mode))


def test_a_disk_that_fills_up_while_the_tokenizer_is_copied(
    tmp_path: Path, recipe_for: RecipeFor, silent: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = recipe_for("llama"), tmp_path / "run"

    def fail(source: Any, target: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", fail)
        with pytest.raises(RunDirectoryError, match=r"the disk is full while writing .*checkpoint"):
            make_run(recipe, out, console=silent)
    assert not (out / "checkpoint").exists()
    with pytest.raises(FormatError, match="is a run without a checkpoint yet; write it with: cloq export"):
        evaluate(out, EvaluateOptions(recipe.eval_text, 16, 1), console=silent)
    made = write_export(out, ExportOptions(), console=silent)
    assert (out / "checkpoint" / "tokenizer.json").exists()
    assert (made.folder / "tokenizer.json").exists()


def test_a_disk_that_cannot_be_written(
    tmp_path: Path, recipe_for: RecipeFor, silent: Console, full_at: Callable[..., Any]
) -> None:
    with full_at(50_000, errno.EROFS), pytest.raises(RunDirectoryError, match="cannot be written: Read-only file sys"):
        make_run(recipe_for("llama"), tmp_path / "run", console=silent)
    assert RunDirectory.open(tmp_path / "run").completed_modules()


# What may not be continued.


def test_another_recipe_is_refused_and_the_difference_said(
    tmp_path: Path, recipe_for: RecipeFor, silent: Console, contents: Contents, uninterrupted: Any
) -> None:
    shutil.copytree(uninterrupted("llama", INDEPENDENT), tmp_path / "run")
    before = contents(tmp_path / "run")
    refused = [
        ({"bits": 2}, r"holds another run: bits: 3 in the run, 2 asked\. Use the run's own options"),
        ({"rank": 8, "seed": 5}, r"rank: 4 in the run, 8 asked; seed: 0 in the run, 5 asked"),
        ({"error_aware": 0.25}, r"error_aware: 0\.0 in the run, 0\.25 asked"),
        ({"overrides": {"*.q_proj": {"bits": 8}}}, r"overrides: \[\] in the run, \[\{.*q_proj.*\}\] asked"),
    ]
    for changes, message in refused:
        with pytest.raises(RunDirectoryError, match=message):
            make_run(recipe_for("llama", **{"bits": 3, **INDEPENDENT, **changes}), tmp_path / "run", console=silent)
    assert contents(tmp_path / "run") == before
    # What only says how it is measured or cut into files may change.
    make_run(
        recipe_for("llama", bits=3, eval_windows=2, max_shard_size="20KB", **INDEPENDENT),
        tmp_path / "run",
        console=silent,
    )
    assert RunDirectory.open(tmp_path / "run").read_report("evaluation")["windows"] == 2
    assert len(list((tmp_path / "run" / "checkpoint").glob("model-*.safetensors"))) > 2


def test_another_source_or_text_under_the_same_name_is_refused(
    tmp_path: Path, recipe_for: RecipeFor, silent: Console, contents: Contents
) -> None:
    shutil.copytree(recipe_for("llama").model, tmp_path / "model")
    shutil.copy(recipe_for("llama").calibration, tmp_path / "text.txt")
    recipe = recipe_for("llama", model=str(tmp_path / "model"), calibration=str(tmp_path / "text.txt"))
    make_run(recipe, tmp_path / "run", console=silent)
    before = contents(tmp_path / "run")
    text = (tmp_path / "text.txt").read_text()
    (tmp_path / "text.txt").write_text(text.replace("w1 ", "w2 "))
    message = (
        r"calibrated on another text: .*text\.txt \(sha256 \w{12}…\) in the run, .*text\.txt \(sha256 \w{12}…\) now"
    )
    with pytest.raises(RunDirectoryError, match=message):
        make_run(recipe, tmp_path / "run", console=silent)
    with pytest.raises(RunDirectoryError, match=message):
        adapt(tmp_path / "run", {"rank": 2, "adapter_name": "second"}, console=silent)
    (tmp_path / "text.txt").write_text(text)

    weights = tmp_path / "model" / "model.safetensors"
    tensors, metadata = read_safetensors(weights)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.01
    tensor_writer.write_safetensors(weights, tensors, metadata)
    with pytest.raises(RunDirectoryError, match=r"source model: sha256:\w{12}… in the run, sha256:\w{12}… asked"):
        make_run(recipe, tmp_path / "run", console=silent)
    with pytest.raises(RunDirectoryError, match=r"model has changed since .* was made"):
        adapt(tmp_path / "run", {"rank": 2, "adapter_name": "second"}, console=silent)
    # An export takes everything from the run; only a checkpoint that is lost has to be made from the source again.
    write_export(tmp_path / "run", ExportOptions(out=tmp_path / "export"), console=silent)
    kept = tmp_path / "kept"
    (tmp_path / "run" / "checkpoint").rename(kept)
    with pytest.raises(RunDirectoryError, match=r"model has changed since .* was made"):
        write_export(tmp_path / "run", ExportOptions(out=tmp_path / "export"), console=silent)
    kept.rename(tmp_path / "run" / "checkpoint")
    after = contents(tmp_path / "run")
    assert {name: digest for name, digest in after.items() if not name.startswith("work/")} == before


def test_a_run_in_use_and_a_run_that_is_not_finished(
    tmp_path: Path, recipe_for: RecipeFor, silent: Console, uninterrupted: Any
) -> None:
    out = tmp_path / "run"
    shutil.copytree(uninterrupted("llama", INDEPENDENT), out)
    recipe = recipe_for("llama", bits=3, **INDEPENDENT)
    with RunDirectory.open(out) as held:
        held.set_state("running")
        with pytest.raises(RunDirectoryError, match=f"is in use by process {os.getpid()}; wait until it ends"):
            make_run(recipe, out, console=silent)
    (out / "layers" / "model.layers.1.mlp.gate_proj.safetensors").unlink()
    message = r"lacks 1 of 14 layers, the first model\.layers\.1\.mlp\.gate_proj; finish it with the command"
    with pytest.raises(RunDirectoryError, match=message):
        write_export(out, ExportOptions(), console=silent)
    with pytest.raises(RunDirectoryError, match=message):
        adapt(out, {"adapter_name": "second"}, console=silent)
