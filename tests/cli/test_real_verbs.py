"""The command line over the real verbs, on a tiny model: what it prints is what the verbs return."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pretended_device import pretended_gpus

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.cli import main
from cloq_export.recipe import Recipe

Words = list[str | Path]


class Printed(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def content(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        content: dict[str, Any] = json.loads(self.out)
        return content


def cloq(*words: str | Path | int) -> Printed:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return Printed(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def options(recipe_for: Callable[..., Recipe]) -> Words:
    """Return the words that make the tiny recipe, without its model."""
    recipe, plain = recipe_for("llama", bits=3), Recipe().to_mapping()
    changed = {name: value for name, value in recipe.to_mapping().items() if value != plain[name]}
    return [word for name, value in changed.items() if name != "model" for word in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def model(recipe_for: Callable[..., Recipe]) -> str:
    return recipe_for("llama").model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, options: Words, model: str) -> tuple[Path, dict[str, Any]]:
    """Return a run and what was printed of it."""
    run = tmp_path_factory.mktemp("cli") / "run"
    return run, cloq("run", model, "--out", run, "--json", *options, "--gate", "ratio=1000").content


def test_run_prints_its_summary(made: tuple[Path, dict[str, Any]]) -> None:
    run, content = made
    assert list(content)[:4] == ["run", "model", "bits", "group_size"]
    assert (content["run"], content["bits"], content["layers"]["bits"]) == (str(run), 3, {"3": 14})
    assert content["perplexity"] == RunDirectory.open(run).read_report("evaluation")
    assert content["gates"][0]["passed"] is True
    assert all(Path(path).exists() for path in content["files"].values())


def test_a_missed_gate_of_a_real_run(made: tuple[Path, dict[str, Any]], options: Words, model: str) -> None:
    run, _ = made
    printed = cloq("run", model, "--out", run, *options, "--gate", "ratio=0.001")
    assert printed.code == 3
    assert "gate missed: ratio" in printed.out
    assert "perplexity" in printed.out
    assert "error: gate missed: ratio is " in printed.err


def test_quantize_and_adapt(tmp_path: Path, options: Words, model: str) -> None:
    run = tmp_path / "run"
    quantized = cloq("quantize", model, "--out", run, "--json", *options).content
    assert (quantized["rank"], quantized["perplexity"]) == (0, None)
    assert quantized["next"][0] == f"cloq adapt {run} --rank 4"
    adapted = cloq("adapt", run, "--rank", 2, "--json").content
    assert (adapted["rank"], adapted["layers"]["rank"]) == (2, {"2": 14})
    assert Path(adapted["files"]["adapter cloq"]).is_dir()
    assert "the rank is 0, which makes no adapter; choose one with --rank." in cloq("adapt", run, "--rank", 0).err


def test_what_is_measured_beside_a_run(made: tuple[Path, dict[str, Any]], texts: dict[str, str]) -> None:
    run, content = made
    words: Words = ["eval", run, "--text", texts["eval_text"], "--window", "16", "--windows", "4", "--json"]
    assert cloq(*words).content == content["perplexity"]
    alone = cloq(*[run / "checkpoint" if word == run else word for word in words]).content
    # A note names an option; on the command line that is a flag.
    assert alone["notes"] == ["the float model was not measured: name it with --reference"]
    assert "error: --tasks names nothing to measure" in cloq("eval", run, "--tasks", ",").err


def test_export_convert_and_inspect(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run, _ = made
    exported = cloq("export", run, "--out", tmp_path / "one", "--json").content
    assert exported["files"] == {"export": str(tmp_path / "one")}
    assert exported["adapters"] == [{"name": "cloq", "rank": 4, "modules": 14}]
    converted = cloq("convert", tmp_path / "one", "--format", "gptq", "--out", tmp_path / "two", "--json").content
    assert (converted["format"], converted["base_fingerprint"]) == ("gptq", exported["base_fingerprint"])
    inspected = cloq("inspect", tmp_path / "two", "--verify", "--json").content
    assert (inspected["kind"], inspected["base_fingerprint"]) == ("checkpoint", exported["base_fingerprint"])
    assert "read back from disk and compared" in cloq("export", run, "--out", tmp_path / "one").out


def test_finetune_prints_its_training(made: tuple[Path, dict[str, Any]], texts: dict[str, str]) -> None:
    run, _ = made
    small = [
        "--seqlen",
        "32",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--eval-samples",
        "2",
        "--device",
        "cpu",
        "--precision",
        "float32",
    ]
    trained = cloq("finetune", run, "--data", texts["calibration"], *small, "--json").content
    assert (trained["adapter"], trained["start"], trained["steps"]) == ("finetuned", "cloq", 2)
    assert trained["loss"]["held_out_before"] is not None
    assert all(Path(path).exists() for path in trained["files"].values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "RUN", "--style", "qdq"], "--style is about ONNX graphs; give it with --format onnx, or leave it"),
        (["convert", "RUN", "--format", "gptq"], "say where the checkpoint is written with --out FOLDER."),
        (["finetune", "RUN"], "no examples were named; give a set, a file or a hub id with --data."),
        (["finetune", "RUN", "--data", "x", "--name", "cloq"], "give the trained one another --name."),
        (["adapt", "RUN", "--rank", "8"], "give the new one another name with --adapter-name."),
        (["adapt", "RUN", "--set", "init=loftq"], "make another run with --set init=loftq: cloq run"),
    ],
)
def test_an_error_names_what_is_typed(made: tuple[Path, dict[str, Any]], words: list[str], message: str) -> None:
    printed = cloq(*[made[0] if word == "RUN" else word for word in words])
    assert printed.code == 2
    assert message in printed.err


def test_a_plan_says_what_a_run_would_take(options: Words, model: str, tmp_path: Path) -> None:
    printed = cloq("run", model, "--plan", "--json", *options).content
    assert printed["layers"] == 14
    assert printed["grids"] == {"3 bits, groups of 32, rank 4": 14}
    assert [stage["stage"] for stage in printed["device"]["stages"]] == ["forward and statistics", "solve"]
    for stage in printed["device"]["stages"]:
        assert stage["bytes"] == sum(stage["parts"].values()) > 0
    assert (printed["device"]["device"], printed["device"]["free"]) == ("cpu", None)
    times = {time["card"]: time for time in printed["device"]["times"]}
    assert list(times) == ["H100", "H200", "A100", "RTX 4090"]
    for time in times.values():
        assert time["seconds"] == pytest.approx(sum(time["stages"].values()))
        assert 0 < time["share"] <= 1
    assert times["H200"]["seconds"] <= times["H100"]["seconds"]
    with pretended_gpus(total=80 << 20):
        shown = cloq("run", model, "--plan", "--device", "cuda", *options)
    assert "4 windows in a forward pass fit" in shown.out
    assert "most is taken by" in " ".join(shown.out.split())
    with pretended_gpus(total=1 << 18):
        shown = cloq("run", model, "--plan", "--device", "cuda", *options)
    assert "not even one window in a forward pass fits" in shown.out.replace("\n", " ")


def test_word_problems_as_a_file(capsys, tmp_path):
    options = ["data", "word-problems", "--count", "3", "--split", "test"]
    assert main([*options, "--out", str(tmp_path / "words.jsonl")]) == 0
    assert "3 word-problems (test) in" in capsys.readouterr().out
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "words.jsonl").read_text()
    assert [list(json.loads(line)) for line in printed.splitlines()] == [["question", "answer"]] * 3
    assert main([*options, "--out", str(tmp_path / "words.txt")]) == 2
    assert "end it with .jsonl" in capsys.readouterr().err
    assert main([*options, "--most-steps", "9"]) == 2
    assert "most_steps of word problems is 9; allowed is 1 to 4" in capsys.readouterr().err


def test_a_gpu_that_is_lost_is_one_line_and_the_run_goes_on_elsewhere(
    options: Words, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write = tmp_path / "run", RunDirectory.write_layer
    written: list[str] = []

    def losing(self: RunDirectory, name: str, *layer: Any) -> None:
        if len(written) == 5:
            raise torch.AcceleratorError(
                "CUDA error: unspecified launch failure\nCompile with `TORCH_USE_CUDA_DSA` to enable assertions."
            )
        write(self, name, *layer)
        written.append(name)

    monkeypatch.setattr(RunDirectory, "write_layer", losing)
    with pretended_gpus():
        printed = cloq("run", model, "--out", out, *options)
    assert printed.code == 1
    assert printed.err.splitlines()[-1] == (
        "error: the GPU gave up (CUDA error: unspecified launch failure): the same command continues where it stopped; "
        "look at the GPU with nvidia-smi first."
    )
    assert "Traceback" not in printed.err
    monkeypatch.setattr(RunDirectory, "write_layer", write)
    # It has left the bus, so the same command goes on with the processor.
    content = cloq("run", model, "--out", out, "--json", *options).content
    assert any("continued a run that had 5 of 14 layers" in note for note in content["notes"])


def test_a_device_that_is_not_there_is_named_with_those_that_are(options: Words, model: str, tmp_path: Path) -> None:
    asked = ("run", model, "--out", tmp_path / "run", *options, "--device")
    with pretended_gpus(0):
        printed = cloq(*asked, "cuda")
    assert printed.code == 2
    assert "torch sees no CUDA device: none are pretended; use --device cpu" in printed.err
    with pretended_gpus(2):
        printed = cloq(*asked, "cuda:2")
    assert printed.code == 2
    assert "--device cuda:2 was asked for, but torch sees 2 CUDA devices, from cuda:0 on" in printed.err


def test_other_runtime_errors_keep_their_traceback(
    options: Words, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(RunDirectory, "write_layer", failing)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        cloq("run", model, "--out", tmp_path / "run", *options)
