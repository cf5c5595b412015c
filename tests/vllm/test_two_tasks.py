"""Two tasks trained on one base: what they learned shows in answers, and vLLM serves both as they were trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cloq_export import pipeline
from cloq_export.calibrate.data import EMBEDDED, evaluation_text
from cloq_export.cli import main
from cloq_export.models.source import DEMO_MODEL
from cloq_export.parity.quality import mcnemar
from cloq_export.parity.runtime import packed_model
from cloq_export.parity.tasks import WrittenTask, find_task, load_questions
from cloq_export.pipeline import VerifyOptions

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("only_on_cpu")]

QUESTIONS = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an adapter that was trained on word problems for a while, and one on plain text for less."""
    folder = tmp_path_factory.mktemp("two-tasks")
    words, text, run = folder / "words.jsonl", folder / "text.txt", folder / "run"
    text.write_text(evaluation_text(EMBEDDED).text, encoding="utf-8")
    assert main(["data", "word-problems", "--most-steps", "2", "--count", "400", "--out", str(words)]) == 0
    # Few tokens and the quick path: the codes are not what is tested here.
    quick = "--bits 4 --rank 16 --samples 4 --seqlen 256 --set error_aware=0 --set eval_windows=1 --set eval_window=64"
    assert main(["run", "--demo", *quick.split(), "--out", str(run)]) == 0
    learn = ["finetune", str(run), "--eval-samples", "0", "--eval-every", "0"]
    task = "--steps 24 --batch-size 8 --seqlen 160 --learning-rate 2e-3"
    assert main([*learn, "--data", str(words), "--name", "words", *task.split()]) == 0
    less = "--steps 3 --batch-size 2 --seqlen 64 --learning-rate 1e-3"
    assert main([*learn, "--data", str(text), "--name", "text", *less.split()]) == 0
    return run


def test_a_short_training_moves_the_accuracy(run: Path, tmp_path: Path) -> None:
    tests = tmp_path / "tests.jsonl"
    problems = ["data", "word-problems", "--most-steps", "2", "--split", "test", "--count", str(QUESTIONS)]
    assert main([*problems, "--out", str(tests)]) == 0
    found = find_task("word-problems")
    assert isinstance(found, WrittenTask)
    task = dataclasses.replace(found, max_new_tokens=80)
    questions = load_questions(task, str(tests))
    folders = {name: run / "adapters" / name for name in ("cloq", "words")}
    model, tokenizer = packed_model(run, folders), AutoTokenizer.from_pretrained(run / "checkpoint")
    before, after = (task.ask(model, tokenizer, questions, name) for name in folders)
    assert before.other_accuracy <= 0.1
    assert after.other_accuracy >= 0.25
    assert after.accuracy > before.accuracy
    assert mcnemar(before.other, after.other)["p_value"] < 0.05


def test_both_are_served_as_they_were_trained(run: Path, engine_python: str, tmp_path: Path) -> None:
    served = tmp_path / "served"
    assert main(["export", str(run), "--adapter", "words", "--adapter", "text", "--out", str(served)]) == 0
    options = VerifyOptions(
        reference=DEMO_MODEL,
        runtime="vllm",
        text=EMBEDDED,
        window=128,
        windows=2,
        prompts=8,
        new_tokens=8,
        python=Path(engine_python),
        out=tmp_path / "parity",
    )
    report = pipeline.verify(served, options)
    assert report["passed"], (report["gates"], report["missing"])
    assert {row["adapter"] for row in report["numerics"] if row["measured"] == "served"} == {"words", "text"}
    assert report["isolation"]["max"] <= 1e-4
    assert report["metrics"]["greedy_flips"] == 0
    assert report["metrics"]["live_modules"] == 1
