"""Two tasks trained on one base: what was learned shows on unseen problems, and vLLM serves both as trained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cloq_export.cli import main
from cloq_export.engines.transformers.served import packed_model
from cloq_export.models.source import DEMO_MODEL
from cloq_export.parity.answers import INVALID, Respondent, score_continuations
from cloq_export.parity.task_kinds import WrittenTask
from cloq_export.parity.tasks import find_task, load_questions
from cloq_export.texts.corpora import EMBEDDED, evaluation_text
from cloq_export.texts.examples import question_prompt
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verify import verify

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


def test_a_short_training_shows_in_unseen_problems(run: Path, tmp_path: Path) -> None:
    """Judged by what no rounding decides: how probable unseen solutions are, and in which form answers are written.

    Which of the few answers are right hangs on the last bits of the training, so on the CPU; the margins here do not.
    """
    tests = tmp_path / "tests.jsonl"
    problems = ["data", "word-problems", "--most-steps", "2", "--split", "test", "--count", str(QUESTIONS)]
    assert main([*problems, "--out", str(tests)]) == 0
    found = find_task("word-problems")
    assert isinstance(found, WrittenTask)
    task = dataclasses.replace(found, max_new_tokens=80)
    questions = load_questions(task, str(tests))
    rows = [json.loads(line) for line in tests.read_text(encoding="utf-8").splitlines()]
    solutions = [[(question_prompt(row["question"]), f" {row['answer']}")] for row in rows]
    folders = {name: run / "adapters" / name for name in ("cloq", "words")}
    model, tokenizer = packed_model(run, folders), AutoTokenizer.from_pretrained(run / "checkpoint")
    before, after = (
        sum(scores[0] for scores in score_continuations(Respondent(model, tokenizer, name), solutions))
        for name in folders
    )
    assert after > 0.6 * before, (before, after)  # log-likelihoods, below zero
    as_taught = {
        name: sum(
            task.extract_strict(text) != INVALID
            for text in task.ask(Respondent(model, tokenizer, name), questions).texts
        )
        for name in folders
    }
    assert as_taught["cloq"] <= QUESTIONS // 4, as_taught
    assert as_taught["words"] >= QUESTIONS // 2, as_taught


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
    report = verify(served, options)
    assert report.passed, (report.gates, report.missing)
    assert {row.adapter for row in report.numerics if row.measured == "served"} == {"words", "text", None}
    assert report.isolation.max <= 1e-4
    assert report.metrics["greedy_flips"] == 0
    assert report.metrics["live_modules"] == 1
