"""A product whose records hold is proven, in every form; what changed behind the records is named."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from changed_exports import double_alpha, edit_json
from parity_reports import missed
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiers import slow_but

from cloq_export.artifact.certificate import read_certificate, write_certificate
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.pair_record import PairRecord, pair_digest
from cloq_export.artifact.provenance import PROVENANCE_NAME
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.formats.peft import read_adapter
from cloq_export.models.source import open_model
from cloq_export.parity.report import missed_gates, schema
from cloq_export.parity.task_report import RecordedAnswers
from cloq_export.types import LoraPair
from cloq_export.verbs.convert import convert
from cloq_export.verbs.evaluate import evaluate
from cloq_export.verbs.export import export as write_export
from cloq_export.verbs.options import EvaluateOptions, ExportOptions
from cloq_export.verbs.verification import engines
from cloq_export.verbs.verification.made_before import MadeBefore
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verify import planned_gates, verify


def test_a_clean_export_is_proven_with_its_run_beside_it(
    run: Path, exported: Path, options: VerifyOptions, silent: Console, tmp_path: Path
) -> None:
    report = verify(exported, dataclasses.replace(options, run=run, out=tmp_path / "parity"), console=silent)
    assert report.passed, missed_gates(report)
    found = {each.what: each.verdict for each in [*report.provenance.findings, *report.float_part]}
    assert set(found.values()) == {"proven"}
    assert {"codes", "adapter one", "adapter two beside the run", "reference", "config", "chat template"} <= set(found)
    asked = {"provenance", "reference", "float_part", "last_step_difference_mean", "perplexity_over_recorded"}
    assert asked <= {verdict.gate for verdict in report.gates}
    assert {row.adapter for row in report.provenance.probes} == {"cloq", "one", "two"}
    import jsonschema

    jsonschema.validate(json.loads((tmp_path / "parity" / "parity.json").read_text()), schema())
    assert "adapter two beside the run" in (tmp_path / "parity" / "parity.html").read_text()


@pytest.mark.parametrize(
    "form", slow_but(["balanced", "padded", "compressed_tensors", "converted", "one"], "balanced", "converted")
)
def test_other_forms_of_the_same_product_are_proven(
    form: str, run: Path, exported: Path, options: VerifyOptions, silent: Console, tmp_path: Path
) -> None:
    out = tmp_path / "export"
    asked = {
        "balanced": ExportOptions(format="gptq_v2", split="balanced", out=out),
        "padded": ExportOptions(format="gptq_v2", pad_rank=16, out=out),
        "compressed_tensors": ExportOptions(format="compressed_tensors", out=out),
        "one": ExportOptions(format="gptq_v2", adapters=("one",), out=out),
    }
    if form == "converted":
        convert(exported, ExportOptions(format="compressed_tensors", out=out), console=silent)
    else:
        write_export(run, asked[form], console=silent)
    report = verify(out, options, console=silent)
    assert report.passed, missed_gates(report)


def test_a_run_directory_is_proven_by_what_it_recorded(run: Path, options: VerifyOptions, silent: Console) -> None:
    report = verify(run, dataclasses.replace(options, adapters=("one",)), console=silent)
    verdicts = {each.gate: each.passed for each in report.gates}
    assert verdicts["provenance"]
    assert verdicts["reference"]
    assert verdicts["float_part"]


def test_a_licence_beside_the_float_model_makes_no_other_revision(
    exported: Path, options: VerifyOptions, tmp_path: Path
) -> None:
    reference = Path(shutil.copytree(str(options.reference), tmp_path / "float"))
    made = MadeBefore.read(exported, Checkpoint.open(exported), {}, {}, run=None, serves_all=False)

    def verdicts() -> dict[str, str]:
        found = made.findings_of_reference(open_model(str(reference)), other=False)
        return {each.what: each.verdict for each in found}

    (reference / "LICENSE").write_text("as is\n")
    assert set(verdicts().values()) == {"proven"}
    (reference / "vocab.json").write_text("{}\n")
    assert verdicts()["reference"] == "contradicted"


def test_codes_ruined_before_the_export_are_caught(
    run: Path, options: VerifyOptions, silent: Console, tmp_path: Path
) -> None:
    """A run whose layers were changed after it recorded them gives an export that is whole and wrong."""
    ruined = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("exports")))
    module = "model.layers.0.mlp.up_proj"
    with RunDirectory.open(ruined) as directory:
        stored = directory.read_layer(module)
        ruined_layer = dataclasses.replace(stored.quantized, codes=stored.quantized.codes.roll(1, 0))
        directory.write_layer(module, ruined_layer, stored.lora, stored.certificate)
    result = write_export(ruined, ExportOptions(format="gptq_v2", out=tmp_path / "export", force=True), console=silent)
    assert any("1 layers are not those that the run recorded" in note for note in result.notes)
    report = verify(tmp_path / "export", dataclasses.replace(options, force=True), console=silent)
    assert "provenance" in missed(report)
    assert f"codes: {module} hold other codes" in str(missed_gates(report))


def test_a_stale_export_shows_beside_its_run(
    run: Path, exported: Path, options: VerifyOptions, silent: Console, tmp_path: Path
) -> None:
    newer = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("exports")))
    double_alpha(newer)
    report = verify(exported, dataclasses.replace(options, run=newer), console=silent)
    assert missed(report) == {"provenance"}
    assert "adapter one beside the run" in str(missed_gates(report))
    assert "the export is stale" in str(missed_gates(report))


def test_answers_that_the_run_gave_and_the_engine_loses_miss(
    run: Path, options: VerifyOptions, silent: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("exports")))
    rows = [{"goal": f"w{n}", "sol1": f"w{n + 1} w3", "sol2": f"w{n + 30} w7", "label": 0} for n in range(24)]
    file = tmp_path / "piqa.jsonl"

    def answered() -> list[bool]:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = evaluate(asked, EvaluateOptions(adapter="cloq", tasks=(f"piqa={file}",)), console=silent)
        return list(found.tasks["piqa"].models["adapter"].correct)

    # What the model takes is made the right answer, so that all of it can be lost.
    for row, right in zip(rows, answered(), strict=True):
        row["label"] = 0 if right else 1
    assert all(answered())
    write_export(asked, ExportOptions(format="gptq_v2", out=tmp_path / "export"), console=silent)
    typed = dataclasses.replace(options, adapters=("cloq",), tasks=(f"piqa={file}",))
    report = verify(tmp_path / "export", typed, console=silent)
    assert report.passed, missed_gates(report)
    assert report.quality.tasks["piqa"][0].recorded == RecordedAnswers(24, 24, 24, 1.0)

    class Opposite:
        """Takes the least probable choice."""

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def prompt_logprobs(self, token_ids: Any, adapters: Any) -> list[torch.Tensor]:
            return [-values for values in self.inner.prompt_logprobs(token_ids, adapters)]

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    healthy = engines.OPENERS["hf"]
    monkeypatch.setitem(engines.OPENERS, "hf", lambda *given: Opposite(healthy(*given)))
    report = verify(tmp_path / "export", typed, console=silent)
    assert "piqa_recorded_p_value" in missed(report)
    assert report.quality.tasks["piqa"][0].recorded.correct == 0
    # Of other questions, or with other examples before them, nothing was recorded.
    rows = [{**row, "goal": f"{row['goal']} w9"} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "piqa_recorded_p_value" not in planned_gates(tmp_path / "export", typed)


def test_a_clean_adapter_outside_the_export_is_proven(
    run: Path, exported: Path, options: VerifyOptions, silent: Console, tmp_path: Path
) -> None:
    shutil.copytree(run / "adapters" / "one", tmp_path / "elsewhere")
    asked = dataclasses.replace(options, adapters=(f"mine={tmp_path / 'elsewhere'}",))
    report = verify(exported, asked, console=silent)
    assert report.passed, missed_gates(report)


def test_another_float_model_misses_unless_it_is_asked_for(
    exported: Path, options: VerifyOptions, silent: Console, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(options.reference, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    asked = dataclasses.replace(options, reference=str(other))
    report = verify(exported, asked, console=silent)
    assert "reference" in missed(report)
    assert "is not the revision of" in str(missed_gates(report))
    report = verify(exported, dataclasses.replace(asked, other_reference=True), console=silent)
    assert not missed(report) & {"reference", "provenance", "float_part"}
    verdicts = {each.what: each.verdict for each in report.provenance.findings}
    assert verdicts["reference"] == "not proven"


def test_an_export_of_before_records_verifies_and_says_what_it_cannot_prove(
    copy: Path, options: VerifyOptions, silent: Console
) -> None:
    (copy / PROVENANCE_NAME).unlink()
    for name in ("cloq", "one", "two"):
        edit_json(copy / "adapters" / name / "cloq_adapter.json", lambda content: content.pop("extra"))
    kept = read_certificate(copy)
    write_certificate(copy, kept.layout, kept.base_fingerprint, kept.modules, {"adapters": kept.facts["adapters"]})
    report = verify(copy, options, console=silent)
    assert report.passed, missed_gates(report)
    assert "provenance" not in {verdict.gate for verdict in report.gates}
    assert "not proven: codes: nothing recorded them when they were made" in report.notes
    assert "not proven: adapter one: nothing recorded it when it was made" in report.notes


def test_the_record_of_a_training_is_of_its_last_step(run: Path, exported: Path) -> None:
    record = read_adapter(exported / "adapters" / "one").extra["provenance"]
    assert record["training"]["steps"] == 3
    assert record["probe"]["precision"] == "float32"
    base = json.loads((exported / PROVENANCE_NAME).read_text())
    ids = torch.tensor([record["probe"]["token_ids"][0]])
    import cloq_export

    model = cloq_export.load(run, "one", dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].float()
    found = torch.log_softmax(logits, -1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    assert torch.allclose(found, torch.tensor(record["probe"]["logprobs"][0]), atol=1e-4)
    assert base["adapters"]["one"] == record["seal"]


def test_a_sketch_tells_a_product_from_another_whatever_its_form() -> None:
    generator = torch.Generator().manual_seed(0)
    pair = LoraPair(torch.randn(4, 24, generator=generator), torch.randn(40, 4, generator=generator), 8.0)
    record = PairRecord.of("m", pair)
    product = 2.0 * pair.lora_B.double() @ pair.lora_A.double()
    assert abs(record.norm - float(torch.linalg.matrix_norm(product))) < 1e-6 * record.norm
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0].float()
    turned = LoraPair(2 * turn @ pair.lora_A, pair.lora_B @ turn.T, 4.0)
    assert record.deviation(PairRecord.of("m", turned)) < 1e-6
    assert pair_digest(turned) != record.sha256
    other = LoraPair(pair.lora_A, pair.lora_B + 0.05 * torch.randn(40, 4, generator=generator), 8.0)
    assert 0.01 < record.deviation(PairRecord.of("m", other)) < 0.4
    assert record.ratio(PairRecord.of("m", dataclasses.replace(pair, alpha=4.0))) == pytest.approx(0.5)
    assert record.ratio(PairRecord.of("m", other)) is None


def test_transformers_and_peft_read_what_carries_records(exported: Path) -> None:
    assert os.path.exists(exported / PROVENANCE_NAME)
    transformers.AutoConfig.from_pretrained(exported)
    from peft import LoraConfig

    assert LoraConfig.from_pretrained(str(exported / "adapters" / "one")).r > 0
