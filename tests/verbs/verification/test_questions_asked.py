"""What questions of tasks show of a served model, and how many of them are asked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from parity_reports import missed
from rich.console import Console

from cloq_export.errors import (
    DataError,
)
from cloq_export.parity.answers import Answers
from cloq_export.parity.power import SmallestLoss, chance_limit, false_alarm, questions_needed
from cloq_export.parity.questions import question_hash, smallest_drop
from cloq_export.parity.report import missed_gates, schema
from cloq_export.verbs.verification import float_side, reference_side, served_side
from cloq_export.verbs.verification.made_before import MadeBefore
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verification.plan import Plan, typed_questions
from cloq_export.verbs.verify import verify


def test_answers_to_problems(tmp_path: Path, exported: Path, options: VerifyOptions, silent: Console) -> None:
    rows = [{"question": f"w{n} w{n + 1}?", "answer": f"w3 w4\n#### {n}"} for n in range(10)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = dataclasses.replace(options, tasks=("ppl", "gsm8k"), gsm8k=str(tmp_path / "problems.jsonl"), problems=9)
    report = verify(exported, asked, console=silent)
    entries = report.quality.tasks["gsm8k"]
    assert [entry.entry.adapter for entry in entries] == [each.name for each in report.adapters]
    for entry in entries:
        assert entry.entry.questions == 9
        assert (entry.facts.missing, entry.facts.repeated, entry.facts.seen) == (0, 0, None)
        assert entry.facts.power.answers_needed == 8
        assert entry.recorded is None
        assert list(entry.entry.models) == ["float", "reference", "served"]
    jsonschema.validate(report.to_json(), schema())
    assert report.metrics["gsm8k_agreement"] == 1
    assert report.metrics["gsm8k_p_value"] == 1
    assert report.passed
    with (tmp_path / "problems.jsonl").open("a") as file:
        file.write('{"question": "broken')
    with pytest.raises(DataError, match=r"line 11 of .*problems.jsonl is not a JSON object"):
        verify(exported, asked, console=silent)


def test_a_loss_that_is_to_be_seen_says_how_many_questions_are_asked(
    tmp_path: Path, exported: Path, options: VerifyOptions, silent: Console
) -> None:
    asked = dataclasses.replace(options, tasks=("ppl", "word-problems"), detect=0.2)
    plan = Plan.make(exported, asked)
    assert len(plan.tasks["word-problems"][1].items) == typed_questions(asked) == questions_needed(0.2, 0.05) == 37
    assert plan.limits["word_problems_drop_upper"] == 0.2
    usual = Plan.make(exported, dataclasses.replace(asked, detect=None, problems=37))
    assert usual.limits["word_problems_drop_upper"] == chance_limit(37, 0.05) < 0.2
    halved = Plan.make(exported, dataclasses.replace(asked, dtype="bfloat16"))
    assert len(halved.tasks["word-problems"][1].items) > 37


def test_a_verdict_says_the_smallest_loss_that_it_could_have_seen(
    tmp_path: Path, exported: Path, options: VerifyOptions, silent: Console
) -> None:
    rows = [{"question": f"w{n} w{n + 1}?", "answer": f"w3 w4\n#### {n}"} for n in range(40)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gate = tmp_path / "gate.yaml"
    gate.write_text("perplexity_ratio_upper: 100\ngsm8k_accuracy_drop_upper: 0.5\n")
    asked = dataclasses.replace(
        options,
        tasks=("ppl", "gsm8k"),
        gsm8k=str(tmp_path / "problems.jsonl"),
        detect=0.2,
        gate=gate,
        adapters=("cloq",),
    )
    report = verify(exported, asked, console=silent)
    assert report.passed, missed_gates(report)
    finds = {verdict.gate: verdict.finds for verdict in report.gates}
    assert finds["gsm8k_drop_upper"] == SmallestLoss(0.2, false_alarm(37, 0.2, 0.05), 0.05)
    assert finds["gsm8k_drop_upper"].alpha < 0.01
    assert finds["gsm8k_p_value"] == SmallestLoss(smallest_drop(37, 0.01), 0.01, pytest.approx(0.2))
    assert finds["gsm8k_accuracy_drop_upper"] == SmallestLoss(0.5, None, 0.05)
    rises = [row.ratio.ratio_smallest_rise for row in report.quality.perplexity if row.model == "served"]
    assert finds["perplexity_ratio_upper"] == SmallestLoss(max(rises), pytest.approx(0.025), 0.2)
    assert finds["certificate"] is None
    jsonschema.validate(report.to_json(), schema())


def test_answers_that_are_lost_miss_where_the_p_value_lets_them_pass(
    exported: Path, options: VerifyOptions, silent: Console, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 100 questions seven are lost as served and none is won."""
    asked = dataclasses.replace(options, tasks=("ppl", "word-problems"), problems=100)
    answered = Answers(("1",) * 100, ("1",) * 100, (True,) * 100, (True,) * 100)
    lost = dataclasses.replace(answered, correct=(False,) * 7 + (True,) * 93)

    def ask(plan: Plan, name: str, *_: Any) -> dict[str, Answers]:
        return {"word-problems": lost if name == "served" else answered}

    for module in (float_side, reference_side, served_side):
        monkeypatch.setattr(module, "ask_tasks", ask)
    report = verify(exported, asked, console=silent)
    assert report.metrics["word_problems_p_value"] == pytest.approx(2 * 0.5**7)
    assert missed(report) == {"word_problems_drop_upper"}


def test_questions_that_show_nothing_miss(
    tmp_path: Path, exported: Path, options: VerifyOptions, silent: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"question": f"w{n} w{n + 1}?", "answer": f"w3 w4\n#### {n}"} for n in (1, 2, 3, 3)]
    rows[3]["question"] = "W3   w4?"  # the third once more, but for case and blanks
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = dataclasses.replace(options, tasks=("gsm8k",), gsm8k=str(tmp_path / "problems.jsonl"), problems=6)
    trained = {"second": {question_hash("w1 w2?")}}
    monkeypatch.setattr(MadeBefore, "trained_on", lambda _: trained)
    report = verify(exported, asked, console=silent)
    assert missed(report) == {
        "gsm8k_p_value",
        "gsm8k_questions_missing",
        "gsm8k_questions_repeated",
        "gsm8k_questions_seen",
    }
    assert [entry.facts.seen for entry in report.quality.tasks["gsm8k"]] == [None, 1]
    said = str(missed_gates(report))
    assert "with 4 questions the p-value is never below 0.125" in said
    assert "gsm8k_questions_missing is 2.0" in said
    jsonschema.validate(report.to_json(), schema())
