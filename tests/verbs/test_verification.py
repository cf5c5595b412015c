"""`verify` on tiny models: a healthy runtime passes, each kind of broken one misses the gate that is meant for it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from passing_runtime import PassingRuntime
from rich.console import Console

from cloq_export.cli import main
from cloq_export.engines.protocol import ServedModel
from cloq_export.engines.transformers.served import packed_model
from cloq_export.engines.vllm import engine as vllm_engine
from cloq_export.engines.vllm import server as vllm_server
from cloq_export.engines.vllm.engine import EngineStart
from cloq_export.engines.vllm.options import EngineSettings
from cloq_export.engines.vllm.plan import ServerOptions
from cloq_export.errors import (
    BindingError,
    DataError,
    EngineError,
    GateMissedError,
    MissingPackageError,
    RunDirectoryError,
    UsageError,
)
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.files.tensor_writer import write_safetensors
from cloq_export.formats.peft import read_adapter, write_adapter
from cloq_export.parity import liveness
from cloq_export.parity.answers import Answers
from cloq_export.parity.gate import GATES
from cloq_export.parity.power import SmallestLoss, chance_limit, false_alarm, questions_needed
from cloq_export.parity.questions import question_hash, smallest_drop
from cloq_export.parity.report import Judged, ParityReport, missed_gates, schema
from cloq_export.types import LoraPair
from cloq_export.verbs.adapt import adapt
from cloq_export.verbs.export import export as write_export
from cloq_export.verbs.options import ExportOptions
from cloq_export.verbs.run import run as make_run
from cloq_export.verbs.verification import engines, float_side, reference_side, served_side
from cloq_export.verbs.verification.made_before import MadeBefore
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verification.plan import Plan, typed_questions
from cloq_export.verbs.verify import planned_gates, verify

DEAD = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, recipe_for: Any, silent: Console) -> Path:
    """Return a 3-bit export with two adapters."""
    run = tmp_path_factory.mktemp("verified") / "run"
    make_run(recipe_for("llama", bits=3), run, console=silent)
    adapt(run, {"rank": 6, "adapter_name": "second", "split": "balanced"}, console=silent)
    write_export(run, ExportOptions(format="gptq_v2", out=run / "exports" / "gptq_v2"), console=silent)
    return run / "exports" / "gptq_v2"


@pytest.fixture
def options(recipe_for: Any, texts: dict[str, str]) -> VerifyOptions:
    return VerifyOptions(
        reference=recipe_for("llama").model,
        text=texts["eval_text"],
        window=24,
        windows=4,
        prompts=6,
        new_tokens=5,
        liveness_tokens=24,
    )


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., ServedModel]], None]:
    """Return a function that puts another runtime in the place of the packed one."""

    def replace(opener: Callable[..., ServedModel]) -> None:
        monkeypatch.setitem(engines.OPENERS, "hf", opener)

    return replace


def wrapped(kind: type[PassingRuntime]) -> Callable[..., ServedModel]:
    return lambda export, adapters, options: kind(packed_model(export, adapters))


def missed(report: ParityReport) -> set[str]:
    return {verdict.gate for verdict in report.gates if not verdict.passed}


def test_a_healthy_export_passes_and_the_report_keeps_its_schema(
    tmp_path: Path, exported: Path, options: VerifyOptions, silent: Console
) -> None:
    out = tmp_path / "parity"
    report = verify(exported, dataclasses.replace(options, out=out), console=silent)
    assert report.passed
    assert missed_gates(report) is None
    assert report.missing == ()
    assert [entry.name for entry in report.adapters] == ["cloq", "second"]
    assert report.noise_floor.max <= 1e-6
    assert {row.adapter for row in report.numerics if row.measured == "served"} == {"cloq", "second", None}
    compared = {(row.measured, row.against, row.adapter): row.divergence for row in report.divergence}
    for name in ("cloq", "second"):
        near, far = compared["served", "reference", name], compared["served", "float", name]
        assert (near.estimate, near.tokens, near.top1_agreement) == ("exact", 4 * 23, 1.0)
        assert near.kl_max < 1e-6 < far.kl_mean
        # Served and reference differ by rounding alone, far less than either differs from the float model.
        assert far.kl_mean == pytest.approx(compared["reference", "float", name].kl_mean, rel=1e-2)
    for row in report.liveness:
        assert row.live_share == 1
        assert len(row.modules) == 14
        assert all(abs(entry.presence - 1) < 0.05 for entry in row.modules)
    assert [row.adapter for row in report.isolation.by_adapter] == [None, "cloq", "second"]
    assert len(report.layers) == 14
    assert set(planned_gates(exported, options)) == {verdict.gate for verdict in report.gates}
    written = json.loads((out / "parity.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(written, schema())
    page = (out / "parity.html").read_text()
    for wanted in ("<svg", "logprob_difference_max", "Liveness of second", "viewport", DEAD):
        assert wanted in page
    # Nothing is fetched: no address, script or foreign file stands in the page.
    assert not re.search(r"(src|href)=|https?:|<script|@import|url\(", page)


class IgnoresModule(PassingRuntime):
    """Serves the second adapter without one of its modules."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        layer = inner.model("second").get_submodule(DEAD)
        layer.lora_B["default"].weight.data.zero_()


def test_without_memory_for_distributions_they_are_computed_again_and_say_the_same(
    exported: Path, options: VerifyOptions, silent: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[str | None] = []
    whole = reference_side.whole_distribution

    def counted(model: Any, ids: Any, adapter: str | None) -> torch.Tensor:
        computed.append(adapter)
        return whole(model, ids, adapter)

    monkeypatch.setattr(reference_side, "whole_distribution", counted)
    one = dataclasses.replace(options, adapters=("cloq",))
    kept = verify(exported, one, console=silent)
    assert computed == ["cloq"] * options.windows
    # Room for some of the windows alone.
    room = 2 * reference_side._SHARE_KEPT * 4 * (options.window - 1) * 96
    monkeypatch.setattr(reference_side, "free_bytes", lambda: room)
    again = verify(exported, one, console=silent)
    assert options.windows * 2 < len(computed) < options.windows * 3
    assert again.divergence == kept.divergence


def test_a_silently_ignored_module_misses_the_gate(
    exported: Path, options: VerifyOptions, serve: Any, silent: Console
) -> None:
    serve(wrapped(IgnoresModule))
    report = verify(exported, options, console=silent)
    assert "live_modules" in missed(report)
    dead = [
        (row.adapter, entry.module)
        for row in report.liveness
        for entry in row.modules
        if entry.verdict != liveness.LIVE
    ]
    assert dead == [("second", DEAD)]
    assert f"{DEAD} of second is ignored" in str(missed_gates(report))


def test_an_ignored_module_misses_even_where_the_numbers_allow_it(
    tmp_path: Path, exported: Path, options: VerifyOptions, serve: Any, silent: Console
) -> None:
    gate = tmp_path / "gate.yaml"
    numbers = ("logprob_difference_max", "longest_difference_max", "decode_gap_max", "mixed_decode_gap_max")
    gate.write_text("".join(f"{name}: 100\n" for name in numbers) + "greedy_flips: null\n")
    serve(wrapped(IgnoresModule))
    report = verify(exported, dataclasses.replace(options, gate=gate), console=silent)
    assert missed(report) == {"live_modules"}


class Noisy(PassingRuntime):
    """Adds noise to every log-probability, the same to the same request."""

    def prompt_logprobs(self, token_ids: Any, adapters: Any) -> list[torch.Tensor]:
        def noise(ids: Sequence[int]) -> torch.Tensor:
            return 5e-3 * torch.randn(len(ids) - 1, generator=torch.Generator().manual_seed(sum(ids)))

        answered = super().prompt_logprobs(token_ids, adapters)
        return [values + noise(ids) for values, ids in zip(answered, token_ids, strict=True)]


def test_noise_misses_the_numbers_alone(exported: Path, options: VerifyOptions, serve: Any, silent: Console) -> None:
    serve(wrapped(Noisy))
    report = verify(exported, options, console=silent)
    assert "logprob_difference_max" in missed(report)
    assert not missed(report) & {"certificate", "greedy_flips", "live_modules", "mixed_batch_difference_max"}


class Leaky(PassingRuntime):
    """Gives base requests of a mixed batch the last adapter of the batch."""

    def prompt_logprobs(self, token_ids: Any, adapters: Any) -> list[torch.Tensor]:
        named = [adapter for adapter in adapters if adapter is not None]
        served = [adapter or named[-1] for adapter in adapters] if named else adapters
        return super().prompt_logprobs(token_ids, served)


def test_an_adapter_that_leaks_into_base_requests_misses_the_gate(
    exported: Path, options: VerifyOptions, serve: Any, silent: Console
) -> None:
    serve(wrapped(Leaky))
    report = verify(exported, options, console=silent)
    assert missed(report) == {"mixed_batch_difference_max"}
    rows = {row.adapter: row.max for row in report.isolation.by_adapter}
    assert rows[None] > 1e-2 > rows["cloq"]


class Mute(PassingRuntime):
    """Cannot generate."""

    def generate(self, token_ids: Any, adapters: Any, max_new_tokens: int) -> list[list[int]]:
        raise NotImplementedError("this engine scores only")


class Nan(PassingRuntime):
    """Gives NaN for one token."""

    def prompt_logprobs(self, token_ids: Any, adapters: Any) -> list[torch.Tensor]:
        answered = super().prompt_logprobs(token_ids, adapters)
        answered[0][-1] = torch.nan
        return answered


class Short(PassingRuntime):
    """Drops the last token."""

    def prompt_logprobs(self, token_ids: Any, adapters: Any) -> list[torch.Tensor]:
        return [values[:-1] for values in super().prompt_logprobs(token_ids, adapters)]


def test_a_missing_figure_misses_its_gate(exported: Path, options: VerifyOptions, serve: Any, silent: Console) -> None:
    serve(wrapped(Mute))
    report = verify(exported, options, console=silent)
    assert missed(report) == {"greedy_flips", "decode_gap_max", "mixed_decode_gap_max"}
    # Two adapters, each behind short and long prompts, and one batch of both.
    assert [entry.reason for entry in report.missing] == ["this engine scores only"] * 5
    assert "greedy_flips was not measured" in str(missed_gates(report))
    serve(wrapped(Nan))
    report = verify(exported, options, console=silent)
    assert missed(report) >= {"logprob_difference_max", "live_modules", "mixed_batch_difference_max"}
    serve(wrapped(Short))
    report = verify(exported, options, console=silent)
    assert missed(report) >= {"logprob_difference_max", "live_modules", "mixed_batch_difference_max"}
    assert "one for each token but the first" in report.missing[0].reason
    jsonschema.validate(report.to_json(), schema())


def test_a_damaged_file_misses_the_certificate(
    tmp_path: Path, exported: Path, options: VerifyOptions, silent: Console
) -> None:
    shutil.copytree(exported, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer_config.json").write_text("{}")
    report = verify(tmp_path / "copy", options, console=silent)
    assert missed(report) == {"certificate", "float_part"}
    assert "is not the file that was certified" in str(missed_gates(report))
    assert report.layers is None


def test_weak_modules_in_half_precision_are_shown_enlarged(
    tmp_path: Path, exported: Path, options: VerifyOptions, silent: Console
) -> None:
    read = read_adapter(exported / "adapters" / "second")
    weak = {
        name: dataclasses.replace(pair, lora_B=pair.lora_B * (1e-3 if name == DEAD else 1))
        for name, pair in read.pairs.items()
    }
    write_adapter(tmp_path / "weak", weak, base_model="m", base_fingerprint=str(read.base_fingerprint))
    changed = dataclasses.replace(options, dtype="bfloat16", adapters=(f"weak={tmp_path / 'weak'}",))
    report = verify(exported, changed, console=silent)
    entry = next(entry for entry in report.liveness[0].modules if entry.module == DEAD)
    assert entry.gain > 1
    own = next(row for row in report.numerics if row.measured == "float in served precision")
    assert own.differences.mean > 0
    assert report.metrics["logprob_difference_over_float"] < 2
    assert {"logprob_difference_over_float", "mixed_batch_difference_over_float"} <= {g.gate for g in report.gates}
    assert "logprob_difference_max" not in {g.gate for g in report.gates}


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
        options, tasks=("ppl", "gsm8k"), gsm8k=str(tmp_path / "problems.jsonl"), detect=0.2, gate=gate
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


@pytest.mark.parametrize("limit", [None, 1e308, -1e308])
def test_a_gate_that_unlimits_everything_judges_nothing(
    tmp_path: Path, exported: Path, options: VerifyOptions, silent: Console, limit: float | None
) -> None:
    wide = {
        name: None if limit is None else math.copysign(1e308, 1 if GATES[name].bound == "at most" else -1)
        for name in planned_gates(exported, options)
    }
    if limit == -1e308:  # as far as shares and counts go
        wide |= {"certificate": 0, "live_modules": 0, "greedy_flips": 6, "greedy_agreement": 0, "perplexity_ratio": 1e6}
    (tmp_path / "gate.yaml").write_text(json.dumps(wide))
    report = verify(exported, dataclasses.replace(options, gate=tmp_path / "gate.yaml"), console=silent)
    assert not report.passed
    assert missed(report) == {"judged"}
    assert report.judged == Judged(False, ("every limit is dropped, or so wide that nothing can miss it",))
    assert str(missed_gates(report)).startswith("nothing was judged: every limit is dropped")
    jsonschema.validate(report.to_json(), schema())


def test_without_prompts_nothing_that_adapters_write_is_judged(
    exported: Path, options: VerifyOptions, silent: Console
) -> None:
    report = verify(exported, dataclasses.replace(options, prompts=0), console=silent)
    assert missed(report) == {"judged", "greedy_flips", "decode_gap_max", "mixed_decode_gap_max"}
    assert "no prompt was continued (`prompts=0`)" in str(missed_gates(report))


def test_a_text_shorter_than_a_window_judges_nothing(
    tmp_path: Path, exported: Path, options: VerifyOptions, silent: Console
) -> None:
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    with pytest.raises(GateMissedError, match=r"nothing was judged: the evaluation text has 3 tokens") as raised:
        verify(exported, dataclasses.replace(options, text=str(tmp_path / "short.txt")), console=silent)
    assert raised.value.exit_code == 3


def test_an_adapter_of_zeros_is_not_live(
    tmp_path: Path, exported: Path, options: VerifyOptions, silent: Console
) -> None:
    read = read_adapter(exported / "adapters" / "second")
    zeros = {name: dataclasses.replace(pair, lora_B=0 * pair.lora_B) for name, pair in read.pairs.items()}
    write_adapter(tmp_path / "zero", zeros, base_model="m", base_fingerprint=str(read.base_fingerprint))
    report = verify(exported, dataclasses.replace(options, adapters=(str(tmp_path / "zero"),)), console=silent)
    # Beside an export that carries records, an adapter without one is not proven either.
    assert missed(report) == {"live_modules", "provenance"}
    assert "the products of all its modules are zero" in str(missed_gates(report))


def test_every_adapter_gets_a_prompt(exported: Path, options: VerifyOptions, silent: Console) -> None:
    report = verify(exported, dataclasses.replace(options, prompts=1), console=silent)
    assert [row.prompts for row in report.greedy] == [1, 1]
    assert report.passed


class FailsWith(PassingRuntime):
    """Scores the first adapter alone."""

    def prompt_logprobs(self, token_ids: Any, adapters: Any) -> list[torch.Tensor]:
        if set(adapters) == {"second"}:
            raise EngineError("this engine has no second adapter")
        return super().prompt_logprobs(token_ids, adapters)


def test_one_adapter_that_is_not_served_makes_the_figures_missing(
    exported: Path, options: VerifyOptions, serve: Any, silent: Console
) -> None:
    serve(wrapped(FailsWith))
    report = verify(exported, options, console=silent)
    assert report.metrics["logprob_difference_max"] is None
    assert report.metrics["longest_difference_max"] is None
    assert {"logprob_difference_max", "longest_difference_max", "live_modules"} <= missed(report)


def test_a_run_is_verified_by_the_layers_that_it_keeps(
    tmp_path: Path, exported: Path, options: VerifyOptions, silent: Console
) -> None:
    run = exported.parent.parent
    for folder in (run, run / "checkpoint"):
        report = verify(folder, options, console=silent)
        assert report.certificate.passed, report.certificate
        assert report.passed
        assert len(report.layers) == 14
    assert [entry.name for entry in verify(run, options, console=silent).adapters] == ["cloq", "second"]
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    tensors, metadata = read_safetensors(copy / "checkpoint" / "model.safetensors")
    held = {name: tensor.clone() for name, tensor in tensors.items()}
    held[f"{DEAD}.qweight"][0, 0] ^= 1
    write_safetensors(copy / "checkpoint" / "model.safetensors", held, metadata)
    report = verify(copy, dataclasses.replace(options, force=True), console=silent)
    assert "certificate" in missed(report)
    assert f"{DEAD!r} is not the layer that" in str(missed_gates(report))


def test_a_base_without_adapters(tmp_path: Path, exported: Path, options: VerifyOptions, silent: Console) -> None:
    shutil.copytree(exported, tmp_path / "bare", ignore=shutil.ignore_patterns("adapters"))
    report = verify(tmp_path / "bare", options, console=silent)
    # The folder that was certified, and that the record speaks of, had adapters.
    assert missed(report) == {"certificate", "provenance"}
    assert report.isolation is None
    assert report.metrics["live_modules"] is None
    assert report.metrics["logprob_difference_max"] < 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runtime": "vlm"}, r"`runtime` is 'vlm'; allowed are hf, vllm, vllm-server, onnx \(did you mean 'vllm'"),
        ({"tasks": ("gsm8",)}, r"`tasks` is 'gsm8'; allowed are ppl, gsm8k"),
        ({"adapters": ("a/b=cloq",)}, r"'a/b' cannot be the name of an adapter"),
        ({"adapters": ("a=cloq", "a=second")}, r"two adapters have the name 'a'"),
        ({"window": 4000}, r"model reads at most 64"),
        ({"longest": 400}, r"`longest` is 400; the model is served with up to 64 tokens .* choose 64"),
        ({"problems": 0}, r"`problems` is 0; it must be at least 1"),
        ({"detect": 3.0}, r"`detect` is 3.0; a share of the questions from 0.005 to 0.5 is needed, for example 0.03"),
        ({"detect": 0.1, "problems": 9}, r"`problems` is 9 and `detect` is 0.1; .* leave one out"),
        ({"prompts": -1}, r"`prompts` is -1; it must be at least 0"),
    ],
)
def test_misuse(
    exported: Path, options: VerifyOptions, silent: Console, changes: Any, message: str, texts: Any
) -> None:
    if "window" in changes:
        changes = {**changes, "window": 70}
    with pytest.raises(UsageError, match=message):
        verify(exported, dataclasses.replace(options, **changes), console=silent)


def test_an_adapter_of_another_base_is_refused(
    tmp_path: Path, exported: Path, options: VerifyOptions, silent: Console
) -> None:
    read = read_adapter(exported / "adapters" / "cloq")
    write_adapter(tmp_path / "other", read.pairs, base_model="m", base_fingerprint="sha256:" + "0" * 64)
    asked = dataclasses.replace(options, adapters=(f"other={tmp_path / 'other'}",))
    with pytest.raises(BindingError, match="is bound to the base sha256:000"):
        verify(exported, asked, console=silent)
    report = verify(exported, dataclasses.replace(asked, force=True), console=silent)
    assert report.notes[0].endswith("it was taken by force")
    assert report.adapters[0].bound_to_this_base is False


@pytest.mark.parametrize("runtime", ["vllm", "vllm-server"])
def test_what_an_engine_cannot_do_is_told_before_anything_is_measured(
    tmp_path: Path,
    exported: Path,
    options: VerifyOptions,
    silent: Console,
    monkeypatch: pytest.MonkeyPatch,
    runtime: str,
) -> None:
    monkeypatch.setattr(float_side, "open_model", lambda *_, **__: pytest.fail("the float model was read"))
    bare = tmp_path / "bare"
    # Isolated and without site-packages: an environment that has nothing.
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    asked = dataclasses.replace(options, runtime=runtime, python=bare)
    with pytest.raises(MissingPackageError, match=r"vLLM is not installed for .*bare; install vllm"):
        verify(exported, asked, console=silent)
    read = read_adapter(exported / "adapters" / "cloq")
    bound = {"base_model": "m", "base_fingerprint": str(read.base_fingerprint)}
    wide = {
        name: LoraPair(torch.zeros(600, pair.lora_A.shape[1]), torch.zeros(pair.lora_B.shape[0], 600), 600.0)
        for name, pair in read.pairs.items()
    }
    write_adapter(tmp_path / "wide", wide, **bound)
    with pytest.raises(UsageError, match=r"wide has rank 600 at .*; the server takes up to 512"):
        verify(exported, dataclasses.replace(asked, adapters=(str(tmp_path / "wide"),)), console=silent)


def test_a_place_for_the_report_is_looked_at_first(
    tmp_path: Path, exported: Path, options: VerifyOptions, silent: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float_side, "open_model", lambda *_, **__: pytest.fail("the float model was read"))
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="file is not a folder; choose another one with `out`"):
        verify(exported, dataclasses.replace(options, out=tmp_path / "file"), console=silent)


def test_engines_are_opened_with_what_was_asked_for(
    exported: Path, options: VerifyOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    def record(name: str) -> Callable[..., str]:
        return lambda *arguments, **named: calls.append((name, arguments, named)) or name

    monkeypatch.setattr(vllm_engine, "VllmModel", record("model"))
    monkeypatch.setattr(vllm_server, "VllmServer", types.SimpleNamespace(start=record("server")))
    asked = dataclasses.replace(options, dtype="float16", python=Path("python"), force=True)
    python = Path("python")
    told = {
        "vllm": ("model", EngineSettings(dtype="float16", force=True), EngineStart(python=python)),
        "vllm-server": ("server", ServerOptions(dtype="float16", force=True, python=python)),
    }
    for runtime, (opened, *how) in told.items():
        assert engines.OPENERS[runtime](exported, {"a": Path("b")}, asked) == opened
        assert calls[-1] == (opened, (exported, {"a": Path("b")}, *how), {})


def test_the_command_line(
    tmp_path: Path, exported: Path, options: VerifyOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", str(exported), "--reference", options.reference, "--text", options.text]
    arguments += ["--window", "24", "--windows", "3", "--prompts", "2", "--new-tokens", "4", "--liveness-tokens", "24"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "parity: passed" in printed
    assert "14 live" in printed
    gate = tmp_path / "gate.yaml"
    gate.write_text("perplexity_ratio: 1.0e-3\ngsm8k_accuracy: 0.5\n")
    assert main([*arguments, "--json", "--gate", str(gate)]) == 3
    captured = capsys.readouterr()
    assert json.loads(captured.out)["passed"] is False
    assert "perplexity_ratio is " in captured.err
    assert "gsm8k_accuracy was not measured (at least 0.5 is asked for)" in captured.err
    gate.write_text("perplexity_ration: 1.2\n")
    assert main([*arguments, "--gate", str(gate)]) == 2
    assert "did you mean perplexity_ratio" in capsys.readouterr().err
    assert main(["verify", str(exported)]) == 2
    assert "--reference MODEL" in capsys.readouterr().err
