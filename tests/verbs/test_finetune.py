"""Fine-tuning over packed codes: the right gradients, the same bytes after a kill, and an adapter that others load."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tokenizers
import torch
import transformers
from rich.console import Console

import cloq_export
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.cli import main
from cloq_export.engines.transformers.loading import dequantized_model
from cloq_export.errors import BindingError, DataError, DivergedError, UsageError
from cloq_export.files.atomic import write_json
from cloq_export.formats.peft import read_adapter
from cloq_export.recipe import FineTuneRecipe, Recipe
from cloq_export.train import trainer
from cloq_export.train.trainer import COMPLETE_NAME, AdapterTrainer, newest_checkpoint
from cloq_export.verbs.evaluate import evaluate
from cloq_export.verbs.finetune import finetune
from cloq_export.verbs.options import EvaluateOptions
from cloq_export.verbs.run import run as make_run
from cloq_export.verbs.run_and_finetune import run_and_finetune

RecipeFor = Callable[..., Recipe]
Contents = Callable[[Path], dict[str, str]]
NAME = "trained"
SMALL: dict[str, Any] = {
    "name": NAME,
    "steps": 8,
    "batch_size": 2,
    "seqlen": 16,
    "learning_rate": 1e-2,
    "precision": "float32",
    "device": "cpu",
    "eval_every": 3,
    "eval_samples": 4,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, recipe_for: RecipeFor, silent: Console) -> Path:
    """Return a finished 2-bit run; it must only be read."""
    out = tmp_path_factory.mktemp("made") / "run"
    make_run(recipe_for("llama", bits=2, adapter_dtype="float32"), out, console=silent)
    return out


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def options(texts: dict[str, str]) -> Callable[..., FineTuneRecipe]:
    def recipe(**changes: Any) -> FineTuneRecipe:
        return FineTuneRecipe.from_mapping(SMALL | {"data": texts["calibration"]} | changes)

    return recipe


Trained = tuple[Path, dict[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def trained(
    made: Path, tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str], silent: Console, contents: Contents
) -> Trained:
    """Return a run with a trained adapter, what was in it before, and the summary; it must only be read."""
    out = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(made, out)
    before = contents(out)
    recipe = FineTuneRecipe.from_mapping(SMALL | {"data": texts["calibration"]})
    return out, before, finetune(out, recipe, console=silent)


def one_batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def test_gradients_through_packed_codes_are_those_of_the_dense_model(made: Path) -> None:
    packed = cloq_export.load(made, adapter="cloq", trainable=True, dtype=torch.float32)
    dense = dequantized_model(made, "cloq", merged=False)
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(".lora_A." in name or ".lora_B." in name)
    gradients = []
    for model in (packed, dense):
        model(**one_batch()).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 2 * 14
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_training_changes_the_adapter_alone_and_helps(trained: Trained, contents: Contents) -> None:
    run, before, summary = trained
    after = contents(run)
    new = {f"adapters/{NAME}/{name}" for name in ("adapter_config.json", "adapter_model.safetensors")}
    new |= {f"adapters/{NAME}/cloq_adapter.json", f"reports/finetune-{NAME}.json", f"reports/finetune-{NAME}.svg"}
    assert set(after) - set(before) == new
    assert {name: after[name] for name in before} == before
    assert summary.training.curve.kept_loss < summary.loss_before
    report = RunDirectory.open(run).read_report(f"finetune-{NAME}")
    assert [entry["step"] for entry in report["losses"]] == list(range(1, 9))
    assert [entry["step"] for entry in report["evaluations"]] == [0, 3, 6, 8]
    # The adapter that is kept is the best one, and what is stored is what was measured.
    best = min(report["evaluations"][1:], key=lambda entry: entry["loss"])
    assert (report["kept_step"], report["kept_loss"]) == (best["step"], best["loss"])
    assert b"<svg" in (run / "reports" / f"finetune-{NAME}.svg").read_bytes()


def test_a_held_out_loss_on_text_that_was_calibrated_on_says_so(
    trained: Trained, made: Path, tmp_path: Path, recipe_for: RecipeFor, options: Any, silent: Console
) -> None:
    """Six hundred words, of which the last 64 of whole sequences are held out: what the run drew there is counted."""
    run, _, summary = trained
    (text,) = RunDirectory.open(run).read_report("windows")["texts"]
    start, end = 592 - 64, 592
    drawn = {place for a, b in text["solved"] for place in range(a, b)}
    shared = len(drawn.intersection(range(start, end)))
    held_out = RunDirectory.open(run).read_report(f"finetune-{NAME}")["held_out"]
    assert held_out == {"sha256": text["sha256"], "start": start, "end": end, "calibrated_tokens": shared}
    told = [note for note in summary.notes if note.startswith("the codes were calibrated on")]
    assert bool(told) == bool(shared)

    for reserve, samples in ((0, 40), (5 * 16, 40)):
        other = tmp_path / f"run-{reserve}"
        make_run(recipe_for("llama", bits=2, samples=samples, reserve=reserve), other, console=silent)
        notes = finetune(other, options(steps=1), console=silent).notes
        report = RunDirectory.open(other).read_report(f"finetune-{NAME}")["held_out"]
        told = [note for note in notes if note.startswith("the codes were calibrated on")]
        if reserve:
            assert (report["calibrated_tokens"], told) == (0, [])
        else:
            assert 0 < report["calibrated_tokens"] <= 64
            assert told == [
                f"the codes were calibrated on {report['calibrated_tokens']} of the 64 tokens that are held out, so "
                "the held-out loss is lower than on new text; make the run with a `reserve` of so many tokens and one "
                "sequence more, or name other text with `eval_data`"
            ]


def test_examples_that_are_learned_and_held_out_are_counted(
    run: Path, options: Any, tmp_path: Path, silent: Console
) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"w{n % 3}", "completion": " w5 w6"} for n in range(8)]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    result = finetune(run, options(data=str(data), steps=1, eval_samples=2), console=silent)
    assert "2 of the examples to evaluate on are learned too: they stand in the data twice" in result.notes
    assert RunDirectory.open(run).read_report(f"finetune-{NAME}")["held_out"] is None


def test_the_result_is_bound_and_upstream_peft_serves_the_same(trained: Trained) -> None:
    run = trained[0]
    folder = RunDirectory.open(run).adapter_path(NAME)
    result, start = read_adapter(folder), read_adapter(RunDirectory.open(run).adapter_path("cloq"))
    assert result.base_fingerprint == start.base_fingerprint is not None
    assert result.extra["finetuned"]["steps"] == 8
    # What an adapter says of itself may be published: no path stands in it but the model's, which the start names too.
    assert "calibration.txt" not in (folder / "cloq_adapter.json").read_text()
    assert any(not torch.equal(result.pairs[name].lora_A, start.pairs[name].lora_A) for name in start.pairs)
    with torch.no_grad():
        ours = cloq_export.load(run, adapter=NAME, dtype=torch.float32)(one_batch()["input_ids"]).logits
        upstream = peft.PeftModel.from_pretrained(dequantized_model(run), folder)(one_batch()["input_ids"]).logits
    torch.testing.assert_close(ours, upstream, rtol=1e-4, atol=1e-4)


def arguments_of(run: Path, recipe: FineTuneRecipe) -> list[str]:
    words = ["finetune", str(run)]
    for name, value in recipe.to_mapping().items():
        if value not in ("", False, True):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ""}, "no examples were named"),
        ({"name": "cloq"}, "the adapter 'cloq' was made together with the codes"),
        ({"seqlen": 128}, "a sequence has 128 tokens, but this model reads at most 64"),
        ({"precision": "float16"}, "float16 cannot be trained on a CPU"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    made: Path, options: Any, silent: Console, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    shutil.copytree(made, tmp_path / "run")
    with pytest.raises(UsageError, match=message):
        finetune(tmp_path / "run", options(**changes), console=silent)


def test_prompts_are_not_learned_and_nothing_is_held_out_of_one_example(
    run: Path, options: Any, silent: Console, tmp_path: Path
) -> None:
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps({"prompt": "w1 w2 w3", "completion": "w4 w5"}) + "\n")
    summary = finetune(run, options(data=str(data), steps=2, gradient_checkpointing=True), console=silent)
    assert any("nothing was evaluated" in note for note in summary.notes)
    assert summary.training.curve.kept_step == 2
    assert summary.to_json()["held_out_perplexity"]["kept"] is None


def test_a_start_from_zero_takes_the_rank_of_the_run(run: Path, options: Any, silent: Console) -> None:
    finetune(run, options(start="zero", steps=2), console=silent)
    trained = read_adapter(RunDirectory.open(run).adapter_path(NAME))
    assert {pair.rank for pair in trained.pairs.values()} == {4}
    assert any(pair.lora_B.abs().max() > 0 for pair in trained.pairs.values())


@pytest.mark.slow
def test_two_processes_train_one_adapter(run: Path, options: Any) -> None:
    """As accelerate and torchrun start them; the losses are those of one process with twice the batch."""
    port = 20000 + os.getpid() % 20000
    # Equal examples, because the processes share them out in an order of their own.
    data = run.parent / "same.jsonl"
    data.write_text((json.dumps({"prompt": "w1 w2 w3", "completion": "w4 w5 w6"}) + "\n") * 40)
    recipe = options(data=str(data), steps=3, batch_size=1)
    single = run.parent / "single"
    shutil.copytree(run, single)
    assert main(arguments_of(single, options(data=str(data), steps=3, batch_size=2))) == 0
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "cloq_export", *arguments_of(run, recipe)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    both, alone = (RunDirectory.open(path).read_report(f"finetune-{NAME}") for path in (run, single))
    for key in ("losses", "evaluations"):
        assert len(both[key]) > 1
        assert [row["loss"] for row in both[key]] == pytest.approx([row["loss"] for row in alone[key]], rel=1e-5)


def test_the_verb_prints_json(run: Path, options: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments_of(run, options(steps=1)), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["adapter"] == NAME
    assert set(summary["files"]) == {"adapter", "report", "plot"}
    assert main([*arguments_of(run, options(steps=1, name="other"))]) == 0
    assert "held-out perplexity" in capsys.readouterr().out
    assert main(arguments_of(run, options(steps=1))) == 2
    assert "exists already; choose another --name" in capsys.readouterr().err


def test_one_command_goes_from_a_model_to_a_verified_export(
    recipe_for: RecipeFor, texts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_for("llama", bits=4, adapter_dtype="float32").to_mapping()
    recipe["finetune"] = {**SMALL, "data": texts["calibration"], "steps": 2, "eval_every": 1}
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe))
    command = ["run", "--recipe", str(file), "--out", str(tmp_path / "run"), "--set", "finetune.steps=3", "--json"]
    assert main(command) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["verified"]["passed"]
    assert (summary["finetuned"]["steps"], summary["finetuned"]["adapter"]) == (3, NAME)
    assert summary["perplexity"]["finetuned"]["perplexity"] > 0
    assert (Path(summary["export"]) / "adapters" / NAME).is_dir()
    assert Path(summary["files"]["parity report"]).is_file()
    # The same command again trains nothing anew; another one of the same name is refused.
    assert main(command) == 0
    assert f"the adapter {NAME} was trained already" in json.loads(capsys.readouterr().out)["notes"]
    command[command.index("finetune.steps=3")] = "finetune.steps=2"
    assert main(command) == 2
    assert "was trained with other options (steps: 3 then, 2 now)" in capsys.readouterr().err


def test_a_begin_token_begins_every_window(
    model_folder: Callable[..., Path], recipe_for: RecipeFor, texts: dict[str, str], tmp_path: Path, silent: Console
) -> None:
    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save_pretrained(folder)
    recipe = recipe_for("llama", bits=4, adapter_dtype="float32", model=str(folder))
    section = {**SMALL, "data": texts["calibration"], "steps": 1, "eval_every": 1}
    whole = run_and_finetune(recipe.changed({"finetune": section}), tmp_path / "run", console=silent)
    summary = whole.summary
    assert (summary.perplexity.bos, summary.perplexity.begin_tokens) == ("auto", (1,))
    report = json.loads(Path(whole.report.files["json"]).read_text())
    assert (report["passed"], report["conditions"]["bos"], report["conditions"]["begin_tokens"]) == (True, "auto", [1])
    perplexity = {
        bos: evaluate(tmp_path / "run", EvaluateOptions(texts["eval_text"], 16, 4, bos), console=silent).perplexity
        for bos in (None, "never")
    }
    assert perplexity[None].models["float"] == summary.perplexity.models["float"]
    assert (perplexity["never"].bos, perplexity["never"].begin_tokens) == ("never", ())
    assert perplexity["never"].models["float"] != summary.perplexity.models["float"]
    # Calibration begins its windows so, too.
    other = make_run(recipe.changed({"bos": "never"}), tmp_path / "other", console=silent)
    assert other.perplexity.models["float"] == perplexity["never"].models["float"]
    assert other.layers.worst_error_adapted != summary.layers.worst_error_adapted


def test_examples_that_cannot_be_learned_are_found_before_anything_is_quantized(
    model_folder: Callable[..., Path], recipe_for: RecipeFor, tmp_path: Path, silent: Console
) -> None:
    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no ' ~ messages[0].role ~ ' first') }}")
    data = tmp_path / "chats.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}\n')
    recipe = recipe_for("llama", model=str(folder), finetune={**SMALL, "data": str(data)})
    with pytest.raises(
        DataError, match=r"line 1 of .*chats.jsonl: the model's chat template refuses it \(no user first"
    ):
        run_and_finetune(recipe, tmp_path / "run", console=silent)
    with pytest.raises(DataError, match=r"'nowhere.jsonl' is no file"):
        run_and_finetune(recipe.changed({"finetune": {"data": "nowhere.jsonl"}}), tmp_path / "run", console=silent)
    assert not (tmp_path / "run").exists()


def test_a_fine_tuning_without_data_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["run", "some/model", "--finetune", "--out", str(tmp_path / "run")]) == 2
    assert "--finetune alone names no data; use it with --demo" in capsys.readouterr().err
