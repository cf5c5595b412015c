"""Fine-tuning over packed codes: the right gradients, and an adapter that others load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from rich.console import Console
from small_finetunes import NAME, arguments_of

import cloq_export
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.cli import main
from cloq_export.engines.transformers.loading import dequantized_model
from cloq_export.errors import UsageError
from cloq_export.formats.peft import read_adapter
from cloq_export.recipe import Recipe
from cloq_export.verbs.finetune import finetune
from cloq_export.verbs.run import run as make_run

RecipeFor = Callable[..., Recipe]
Contents = Callable[[Path], dict[str, str]]
Trained = tuple[Path, dict[str, str], dict[str, Any]]


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
