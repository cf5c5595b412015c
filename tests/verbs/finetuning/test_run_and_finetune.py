"""One command from a model to a verified export with a trained adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import transformers
from rich.console import Console
from small_finetunes import NAME, SMALL

from cloq_export.cli import main
from cloq_export.errors import DataError
from cloq_export.recipe import Recipe
from cloq_export.verbs.evaluate import evaluate
from cloq_export.verbs.options import EvaluateOptions
from cloq_export.verbs.run import run as make_run
from cloq_export.verbs.run_and_finetune import run_and_finetune

RecipeFor = Callable[..., Recipe]


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
