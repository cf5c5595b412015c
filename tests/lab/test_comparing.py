"""The comparison of start points: its rows, its means, and that it continues where it stopped."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.cli import main
from cloq_export.errors import CloqError, RecipeError, UsageError
from cloq_export.lab import comparing
from cloq_export.lab.comparing import compare
from cloq_export.lab.comparison import STARTS, ComparisonRecipe
from cloq_export.lab.comparison_report import comparison_table
from cloq_export.models.source import open_model
from cloq_export.parity.tasks import GROUPS
from cloq_export.recipe import Recipe


@pytest.fixture
def recipe_file(recipe_for: Callable[..., Recipe], texts: dict[str, str], tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        quantize = recipe_for("llama").to_mapping()
        model = quantize.pop("model")
        for name in ("bits", "overrides", "finetune"):
            quantize.pop(name)
        training = {"data": texts["calibration"], "steps": 2, "batch_size": 2, "seqlen": 16, "eval_samples": 4}
        training |= {"precision": "float32", "device": "cpu", "eval_every": 1}
        content: dict[str, Any] = {
            "model": model,
            "quantize": quantize,
            "bits": [2],
            "seeds": {2: [0, 1]},
            "starts": ["cloq", "lora"],
            "tasks": {"text": {"finetune": training, "text": texts["eval_text"], "window": 16, "windows": 4}},
            "rates": [1e-3],
            "rate_steps": 1,
        }
        path = tmp_path / "compare.yaml"
        path.write_text(yaml.safe_dump(content | changes))
        return path

    return write


@pytest.mark.slow
def test_rows_means_and_files(
    recipe_file: Any, tmp_path: Path, silent: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = ComparisonRecipe.read(str(recipe_file()))
    out = tmp_path / "out"
    partial = compare(comparison, out, starts=["cloq"], console=silent)
    assert (partial["missing_rows"], len(partial["rows"])) == (2, 3)
    result = compare(comparison, out, console=silent)
    rows = {(row["init"], row["bits"], row["seed"]): row for row in result["rows"]}
    assert set(rows) == {
        ("cloq", 2, 0),
        ("cloq", 2, 1),
        ("cloq", 2, "mean"),
        *(("lora", 16, s) for s in (0, 1, "mean")),
    }
    both = [rows["cloq", 2, seed]["perplexity"] for seed in (0, 1)]
    assert rows["cloq", 2, "mean"]["perplexity"] == pytest.approx(sum(both) / 2)
    assert rows["cloq", 2, "mean"]["perplexity_spread"] == pytest.approx(torch.tensor(both).std().item(), rel=1e-4)
    assert rows["cloq", 2, 0]["tried_rates"].keys() == {"0.001"}
    # Rates are chosen on text that no base was calibrated on: four sequences, and one that is not full.
    assert RunDirectory.open(out / "bases" / "int2").recipe.reserve == comparison.reserve == 5 * 16
    assert [rows["cloq", 2, seed]["held_out_tokens_calibrated_on"] for seed in (0, 1)] == [0, 0]
    assert json.loads((out / "compare.json").read_text())["rows"] == result["rows"]
    assert result["missing_rows"] == 0
    assert "| cloq |" in comparison_table(result)
    assert {"text-perplexity", "text-losses-2", "discrepancy-frobenius-2", "discrepancy-spectral-2"} <= set(
        result["files"]
    )
    # What served to choose a rate is gone; what was trained stays, bound to its base.
    assert RunDirectory.open(out / "bases" / "int2").adapters.names == ["cloq", "cloq-text-seed0", "cloq-text-seed1"]

    def measured_again(*_: Any) -> None:
        raise AssertionError("a row was measured twice")

    monkeypatch.setattr(comparing.ComparisonFolder, "measure", measured_again)
    assert compare(comparison, out, console=silent)["rows"] == result["rows"]
    other = ComparisonRecipe.read(str(recipe_file(rate_steps=2)))
    with pytest.raises(UsageError, match=r"holds another comparison \(rate_steps differ\)"):
        compare(other, out, console=silent)


@pytest.mark.slow
def test_every_start_gives_a_row(recipe_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [
        "cloq",
        "cloq-balanced",
        "cloq-transposed",
        "zero",
        "zero-on-cloq",
        "svd",
        "loftq",
        "apiq-bw",
        "lora",
        "qlora",
    ]
    path = recipe_file(starts=names, seeds={2: [0]})
    assert main(["compare", str(path), "--out", str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = {row["init"]: row for row in result["rows"] if row["seed"] == 0}
    assert list(rows) == names
    for name, row in rows.items():
        assert row.get("perplexity", 0) > 0, (name, row)
        assert row["held_out_perplexity"] == pytest.approx(math.exp(row["held_out_loss"]))
    assert set(result["bases"]) == {"int2", "int2-rank-0", "int2-init-loftq", "int2-refine-apiq-bw"}
    # The three splits begin with the same product, up to the rounding of activations (bfloat16 where that is fast);
    # LoftQ is worse than CLoQ on the calibration inputs.
    before = {name: row["held_out_loss_before"] for name, row in rows.items() if "held_out_loss_before" in row}
    assert before["cloq-balanced"] == pytest.approx(before["cloq"], rel=2**-7)
    assert before["cloq-transposed"] == pytest.approx(before["cloq"], rel=2**-7)
    assert result["bases"]["int2"]["mean_error_adapted"] < result["bases"]["int2-init-loftq"]["mean_error_adapted"]


def test_a_start_whose_library_is_missing_says_so_in_its_row(
    recipe_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else find_spec(name, *more)
    )
    path = recipe_file(starts=["qlora"], seeds={2: [0]})
    assert main(["compare", str(path), "--out", str(tmp_path / "out"), "--json"]) == 0
    (row,) = [row for row in json.loads(capsys.readouterr().out)["rows"] if row["seed"] == 0]
    assert row["failed"] == "not available here: bitsandbytes is not installed (pip install cloq-export[qlora])"


@pytest.mark.parametrize("what", ["learned", "text", "questions"])
def test_what_a_task_needs_is_read_before_a_base_is_made(
    recipe_file: Any, tmp_path: Path, silent: Console, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(comparing.ComparisonFolder, "measure", lambda *_: pytest.fail("a base was made"))
    task = yaml.safe_load(recipe_file().read_text())["tasks"]["text"]
    broken = tmp_path / "gsm8k" / "test.jsonl"
    broken.parent.mkdir()
    broken.write_text("{")
    monkeypatch.setenv("CLOQ_DATA", str(tmp_path))
    if what == "learned":
        task["finetune"]["data"] = str(broken)
    else:
        task |= {"text": str(broken)} if what == "text" else {"questions": "gsm8k", "problems": 2}
    comparison = ComparisonRecipe.read(str(recipe_file(tasks={"text": task})))
    with pytest.raises(CloqError, match=r"line 1 of .*test\.jsonl is not a JSON object"):
        compare(comparison, tmp_path / "out", console=silent)


def test_the_small_comparison_of_the_package_is_valid() -> None:
    small = ComparisonRecipe.read("small")
    assert small.reserve == 33 * 128
    assert set(small.starts) <= set(STARTS)
    assert len([case for case in small.cases() if case[1] == "cloq" and case[2] == 2]) == 3 * len(small.tasks)
    full = ComparisonRecipe.read("small", full=True, model="mistralai/Mistral-7B-v0.1")
    assert set(full.starts) > {*small.starts, "apiq-lw", "apiq-bw"}
    assert list(full.tasks) == ["wikitext2", "gsm8k", "math10k", "commonsense170k"]
    assert full.model == "mistralai/Mistral-7B-v0.1"
    assert (full.bos, full.reserve) == ("never", 257 * 512)
    # Measured on the split of the paper's tables, calibrated and trained on the training split, of which the end that
    # trainings hold out is new to every base.
    assert full.tasks["wikitext2"]["text"] == "wikitext2-raw:validation"
    assert full.tasks["wikitext2"]["finetune"]["data"] == full.quantize["calibration"] == "wikitext2-raw:train"


def test_a_row_whose_held_out_text_was_calibrated_on_says_so() -> None:
    row = {"task": "text", "init": "cloq", "bits": 2, "seed": 0, "held_out_tokens_calibrated_on": 12}
    result = {"rows": [row], "bases": {}, "environments": {}, "missing_rows": 0}
    assert (
        "- cloq, text, 2 bits, seed 0: the codes were calibrated on 12 of the tokens that are held out, so its rate "
        "and its held-out perplexity are not of new text\n"
    ) in comparison_table(result)
    assert "held out" not in comparison_table({**result, "rows": [{**row, "held_out_tokens_calibrated_on": 0}]})


def test_a_group_of_tasks_is_judged_by_the_mean_of_its_accuracies(
    recipe_file: Any, tmp_path: Path, silent: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GROUPS, "both", ("short-word-problems", "word-problems"))
    task = yaml.safe_load(recipe_file().read_text())["tasks"]["text"]
    task = {"finetune": task["finetune"], "questions": "both", "problems": 2}
    comparison = ComparisonRecipe.read(str(recipe_file(tasks={"problems": task})))
    folder = comparing.ComparisonFolder(comparison, tmp_path / "out", silent)
    loaded = open_model(comparison.model, dtype=torch.float32)
    asked: list[str] = []

    def answered(_: Any, questions: Any, subjects: Any, *more: Any) -> dict[str, Any]:
        asked.extend(questions)
        return {
            name: SimpleNamespace(models={"start": SimpleNamespace(accuracy=0.25 + 0.5 * place)}, questions=2)
            for place, name in enumerate(questions)
        }

    monkeypatch.setattr(comparing, "answer_tasks", answered)
    judged = folder._judge("problems", loaded.model, loaded.tokenizer, "start")
    assert asked == ["short-word-problems", "word-problems"]
    assert judged == {
        "accuracy": 0.5,
        "questions": 4,
        "accuracies": {"short-word-problems": 0.25, "word-problems": 0.75},
    }
    with pytest.raises(RecipeError, match="a task or group out of"):
        ComparisonRecipe.read(str(recipe_file(tasks={"problems": {**task, "questions": "none"}})))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"starts": ["clock"]}, "the start 'clock' is unknown; allowed are cloq, "),
        ({"speed": 3}, "'speed' is not an option of a compare recipe"),
        ({"full": 3}, "full is 3; a mapping of options is needed"),
        ({"model": ""}, "model is ''; a model is needed"),
        ({"quantize": [1]}, r"quantize is \[1\]; a mapping of recipe options is needed"),
        ({"quantize": {"samples": 0, "preset": "papr"}}, r"quantize: 2 faults: .*'papr' is unknown.*samples is 0"),
        ({"seeds": {"two": [0]}}, "seeds is {'two': .*; a mapping from a width to a list of whole numbers is needed"),
        ({"seeds": {2: 0}}, "seeds is {'2': 0}; a mapping from a width"),
        ({"starts": [{}]}, r"starts is \[{}\]; a list of starts is needed"),
        ({"rates": ["fast"]}, r"rates is \['fast'\]; a list of learning rates above 0 is needed"),
        ({"rate_steps": 0}, "rate_steps is 0; a whole number of at least 1 is needed"),
        ({"tasks": {"a": {"finetune": {"steps": "x"}}}}, "the task 'a': steps is 'x'; a whole number is needed"),
        (
            {"tasks": {"a": {"finetune": {}, "questions": "gsm", "problems": 0}}},
            "questions is 'gsm'; a task or group out of gsm8k, .*problems is 0; a whole number of at least 1 is "
            "needed; the task 'a' learns from nothing; give data",
        ),
        ({"tasks": {"a": {"finetune": {}}}}, "the task 'a' is judged by nothing"),
        ({"bits": 2}, "bits is 2; a list of widths out of 2, 3, 4 and 8 is needed"),
    ],
)
def test_what_cannot_be_compared_is_refused(recipe_file: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ComparisonRecipe.read(str(recipe_file(**changes)))
