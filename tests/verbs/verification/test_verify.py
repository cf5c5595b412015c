"""`verify` on a tiny model: a healthy runtime passes, whatever is served, and the report says what was measured."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from parity_reports import missed
from rich.console import Console

from cloq_export.cli import main
from cloq_export.engines.vllm import engine as vllm_engine
from cloq_export.engines.vllm import server as vllm_server
from cloq_export.engines.vllm.engine import EngineStart
from cloq_export.engines.vllm.options import EngineSettings
from cloq_export.engines.vllm.plan import ServerOptions
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.files.tensor_writer import write_safetensors
from cloq_export.formats.peft import read_adapter, write_adapter
from cloq_export.parity.report import missed_gates, schema
from cloq_export.verbs.verification import engines, reference_side
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verify import planned_gates, verify

DEAD = "model.layers.1.mlp.up_proj"


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


def test_every_adapter_gets_a_prompt(exported: Path, options: VerifyOptions, silent: Console) -> None:
    report = verify(exported, dataclasses.replace(options, prompts=1), console=silent)
    assert [row.prompts for row in report.greedy] == [1, 1]
    assert report.passed


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
