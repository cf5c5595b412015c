"""Faults between training and the served export: each planted, before or after certification, and named by its gate."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiers import slow_but

from cloq_export.artifact.certificate import read_certificate, write_certificate
from cloq_export.artifact.pair_record import PairRecord, pair_digest
from cloq_export.artifact.provenance import PROVENANCE_NAME
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.formats.peft import read_adapter, write_adapter
from cloq_export.parity.report import ParityReport, missed_gates, schema
from cloq_export.parity.task_report import RecordedAnswers
from cloq_export.recipe import FineTuneRecipe
from cloq_export.types import LoraPair
from cloq_export.verbs.convert import convert
from cloq_export.verbs.evaluate import evaluate
from cloq_export.verbs.export import export as write_export
from cloq_export.verbs.finetune import finetune
from cloq_export.verbs.options import EvaluateOptions, ExportOptions
from cloq_export.verbs.run import run as make_run
from cloq_export.verbs.verification import engines
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verify import planned_gates, verify

Fault = Callable[[Path], None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, recipe_for: Any, silent: Console) -> Path:
    """Return a run with its own adapter and two that were trained, on other data and from another seed."""
    folder = tmp_path_factory.mktemp("made")
    run = folder / "run"
    make_run(recipe_for("qwen3", bits=3), run, console=silent)
    for name, shift, seed in (("one", 0, 0), ("two", 7, 1)):
        rows = [
            json.dumps({"prompt": f"w{n} w{n + 1}", "completion": f" w{(n + shift) % 90} w{n + 2}"}) for n in range(24)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
        tuning = FineTuneRecipe.from_mapping(
            {
                "data": str(folder / f"{name}.jsonl"),
                "name": name,
                "steps": 3,
                "batch_size": 2,
                "seqlen": 16,
                "learning_rate": 5e-3,
                "eval_samples": 4,
                "seed": seed,
                "precision": "float32",
            }
        )
        finetune(run, tuning, console=silent)
    return run


@pytest.fixture(scope="module")
def exported(run: Path, silent: Console) -> Path:
    write_export(run, ExportOptions(format="gptq_v2", out=run / "exports" / "all"), console=silent)
    return run / "exports" / "all"


@pytest.fixture
def options(recipe_for: Any, texts: Mapping[str, str]) -> VerifyOptions:
    return VerifyOptions(
        reference=recipe_for("qwen3").model,
        text=texts["eval_text"],
        window=16,
        windows=4,
        prompts=3,
        new_tokens=3,
        liveness_tokens=12,
    )


@pytest.fixture
def copy(tmp_path: Path, exported: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def certify_again(folder: Path) -> None:
    """Give a folder a fresh certificate, as an exporter that made the fault would have."""
    kept = read_certificate(folder)
    facts = dict(kept.facts)
    write_certificate(folder, kept.layout, kept.base_fingerprint, kept.modules, facts)


def missed(report: ParityReport) -> set[str]:
    return {verdict.gate for verdict in report.gates if not verdict.passed}


def rewrite_pairs(folder: Path, change: Callable[[str, LoraPair], LoraPair]) -> None:
    """Change an adapter's pairs where it lies, and leave everything else of it."""
    read = read_adapter(folder)
    base = json.loads((folder / "cloq_adapter.json").read_text())
    pairs = {module: change(module, pair) for module, pair in read.pairs.items()}
    write_adapter(
        folder, pairs, base_model=base["base_model"], base_fingerprint=base["base_fingerprint"], extra=base["extra"]
    )


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def first_module(name: str) -> bool:
    return name.endswith("layers.0.mlp.up_proj")


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


def _swap_folders(export: Path) -> None:
    one, two = export / "adapters" / "one", export / "adapters" / "two"
    one.rename(export / "held")
    two.rename(one)
    (export / "held").rename(two)


def _swap_weights(export: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        one, two = (export / "adapters" / each / name for each in ("one", "two"))
        held = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(held)


def _serve_start(export: Path) -> None:
    start = export / "adapters" / "cloq" / "adapter_model.safetensors"
    shutil.copyfile(start, export / "adapters" / "one" / "adapter_model.safetensors")


def _double_alpha(export: Path) -> None:
    rewrite_pairs(export / "adapters" / "one", lambda _, pair: dataclasses.replace(pair, alpha=2 * pair.alpha))


def _turn_sign(export: Path) -> None:
    rewrite_pairs(export / "adapters" / "one", lambda _, pair: dataclasses.replace(pair, lora_B=-pair.lora_B))


def _scale_one_module(export: Path) -> None:
    def change(module: str, pair: LoraPair) -> LoraPair:
        return dataclasses.replace(pair, lora_B=pair.lora_B * 1.02) if first_module(module) else pair

    rewrite_pairs(export / "adapters" / "one", change)


def _round_to_bfloat16(export: Path) -> None:
    def change(_: str, pair: LoraPair) -> LoraPair:
        return LoraPair(pair.lora_A.to(torch.bfloat16), pair.lora_B.to(torch.bfloat16), pair.alpha)

    rewrite_pairs(export / "adapters" / "one", change)


def _exchange_factors(export: Path) -> None:
    """Write A where B belongs in a square module, transposed so that the shapes fit."""

    def change(module: str, pair: LoraPair) -> LoraPair:
        if pair.lora_A.shape[1] != pair.lora_B.shape[0]:
            return pair
        return LoraPair(pair.lora_B.T.contiguous(), pair.lora_A.T.contiguous(), pair.alpha)

    rewrite_pairs(export / "adapters" / "one", change)


def _zero_module(export: Path) -> None:
    def change(module: str, pair: LoraPair) -> LoraPair:
        return dataclasses.replace(pair, lora_B=torch.zeros_like(pair.lora_B)) if first_module(module) else pair

    rewrite_pairs(export / "adapters" / "one", change)


def _drop_module(export: Path) -> None:
    folder = export / "adapters" / "one"
    read, base = read_adapter(folder), json.loads((folder / "cloq_adapter.json").read_text())
    pairs = {module: pair for module, pair in read.pairs.items() if not first_module(module)}
    write_adapter(folder, pairs, base_model="", base_fingerprint=str(read.base_fingerprint), extra=base["extra"])


def _swap_modules(export: Path) -> None:
    read = read_adapter(export / "adapters" / "one")
    names = {"model.layers.0.mlp.up_proj": "model.layers.1.mlp.up_proj"}
    names |= {there: here for here, there in names.items()}
    rewrite_pairs(export / "adapters" / "one", lambda module, pair: read.pairs[names.get(module, module)])


def _other_numbers(export: Path) -> None:
    generator = torch.Generator().manual_seed(5)

    def change(_: str, pair: LoraPair) -> LoraPair:
        noise = 0.1 * pair.lora_A.float().std() * torch.randn(pair.lora_A.shape, generator=generator)
        return dataclasses.replace(pair, lora_A=pair.lora_A + noise.to(pair.lora_A.dtype))

    rewrite_pairs(export / "adapters" / "two", change)


def _strip_record(export: Path) -> None:
    edit_json(export / "adapters" / "one" / "cloq_adapter.json", lambda content: content.pop("extra"))


def _edit_record(export: Path) -> None:
    edit_json(export / PROVENANCE_NAME, lambda content: content.update(source_fingerprint="sha256:" + "0" * 64))


def _edit_adapter_record(export: Path) -> None:
    edit_json(
        export / "adapters" / "one" / "cloq_adapter.json",
        lambda content: content["extra"]["provenance"]["training"].update(kept_loss=0.0),
    )


def _other_version(export: Path) -> None:
    edit_json(export / PROVENANCE_NAME, lambda content: content.update(format_version=99))


def _delete_record(export: Path) -> None:
    (export / PROVENANCE_NAME).unlink()


def _leave_out_modules(export: Path) -> None:
    edit_json(
        export / "adapters" / "one" / "adapter_config.json", lambda content: content.update(target_modules=["q_proj"])
    )


def _leave_out_by_pattern(export: Path) -> None:
    """PEFT takes the modules whose whole name matches."""
    edit_json(
        export / "adapters" / "one" / "adapter_config.json",
        lambda content: content.update(target_modules=r"model\.layers\.1\..*"),
    )


def _unreadable_pattern(export: Path) -> None:
    edit_json(
        export / "adapters" / "one" / "adapter_config.json",
        lambda content: content.update(target_modules=r"(?P<x>a)(?P=x)"),
    )


def _delete_adapter(export: Path) -> None:
    shutil.rmtree(export / "adapters" / "one")


def _declare_any_error(export: Path) -> None:
    _round_to_bfloat16(export)
    edit_json(
        export / "adapters" / "one" / "cloq_adapter.json",
        lambda content: content["extra"].update(largest_product_error=0.9, split="balanced"),
    )


BEFORE_CERTIFICATION: dict[str, tuple[Fault, str]] = {
    "folders of two adapters exchanged": (_swap_folders, "exchanged"),
    "weights of two adapters exchanged": (_swap_weights, "its pairs are those of two"),
    "the initial adapter for the trained one": (_serve_start, "that the training started from"),
    "alpha doubled": (_double_alpha, "has 2 times the product"),
    "B with another sign": (_turn_sign, "has -1 times the product"),
    "one module scaled by 1.02": (_scale_one_module, "layers.0.mlp.up_proj has 1.02 times the product"),
    "rounded to bfloat16": (_round_to_bfloat16, "was rounded after it was made"),
    "A and B exchanged": (_exchange_factors, "has A and B exchanged"),
    "a module zeroed": (_zero_module, "has a product of zero"),
    "a module left out": (_drop_module, "lacks the pairs of model.layers.0.mlp.up_proj"),
    "two modules exchanged": (_swap_modules, "has other numbers"),
    "other numbers": (_other_numbers, "has other numbers"),
    "the adapter's record taken away": (_strip_record, "its folder holds no record"),
    "the record edited": (_edit_record, "was edited after it was written"),
    "the adapter's record edited": (_edit_adapter_record, "was edited after it was written"),
    "the record of another version": (_other_version, "is of version 99"),
    "target modules left out of the config": (_leave_out_modules, "adapter_config.json leaves out"),
    "target modules left out by a pattern": (_leave_out_by_pattern, "adapter_config.json leaves out model.layers.0"),
    "target modules of a pattern that nobody reads": (_unreadable_pattern, "target_modules: the pattern"),
    "an adapter deleted": (_delete_adapter, "the export was written with it, and it is not there"),
    "a cost declared that no form has": (_declare_any_error, "was rounded after it was made"),
    "the record deleted": (_delete_record, "the record that the certificate speaks of is missing"),
}


@pytest.mark.parametrize(
    "fault",
    slow_but(
        BEFORE_CERTIFICATION,
        *("folders of two adapters exchanged", "the initial adapter for the trained one", "alpha doubled"),
        *("rounded to bfloat16", "A and B exchanged", "the record edited", "target modules left out by a pattern"),
        *("an adapter deleted", "the record deleted"),
    ),
)
def test_a_fault_before_certification_is_named(fault: str, copy: Path, options: VerifyOptions, silent: Console) -> None:
    plant, named = BEFORE_CERTIFICATION[fault]
    plant(copy)
    certify_again(copy)
    report = verify(copy, options, console=silent)
    assert "certificate" not in missed(report)
    assert "provenance" in missed(report)
    assert named in str(missed_gates(report))


def _edit_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Fault:
    def plant(export: Path) -> None:
        path = export / "model.safetensors"
        tensors = load_file(path)
        assert name in tensors
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, path, {"format": "pt"})

    return plant


def _edit_config(**values: Any) -> Fault:
    return lambda export: edit_json(export / "config.json", lambda content: content.update(values))


def _edit_rope(export: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["rope_parameters"] = {**(content.get("rope_parameters") or {}), "rope_theta": 5000.0}

    edit_json(export / "config.json", change)


def _reorder_vocabulary(export: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]

    edit_json(export / "tokenizer.json", change)


def _lose_spaces(export: Path) -> None:
    edit_json(export / "tokenizer.json", lambda content: content.update(pre_tokenizer={"type": "WhitespaceSplit"}))


def _other_end(export: Path) -> None:
    edit_json(export / "tokenizer_config.json", lambda content: content.update(eos_token="w3"))


def _add_decoder(export: Path) -> None:
    edit_json(export / "tokenizer.json", lambda content: content.update(decoder={"type": "Fuse"}))


def _add_template(export: Path) -> None:
    (export / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def _edit_generation(export: Path) -> None:
    path = export / "generation_config.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, "temperature": 0.2, "do_sample": True}))


FLOAT_PART: dict[str, tuple[Fault, str]] = {
    "a norm scaled by 1.01": (
        _edit_tensor("model.layers.0.input_layernorm.weight", lambda w: 1.01 * w),
        "model.layers.0.input_layernorm.weight differs",
    ),
    "the final norm": (_edit_tensor("model.norm.weight", lambda w: w + 0.01), "model.norm.weight differs"),
    "one row of the embeddings": (
        _edit_tensor("model.embed_tokens.weight", lambda w: w.roll(1, 0)),
        "model.embed_tokens.weight differs",
    ),
    "a head of another revision": (_edit_tensor("lm_head.weight", lambda w: -w), "lm_head.weight differs"),
    "epsilon of the norms": (_edit_config(rms_norm_eps=1e-3), "rms_norm_eps is 0.001"),
    "base of the rotary positions": (_edit_rope, "rope_theta"),
    "the activation": (_edit_config(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "the context length": (_edit_config(max_position_embeddings=32), "max_position_embeddings is 32"),
    "the end token of the config": (_edit_config(eos_token_id=5), "eos_token_id is 5"),
    "two words of the vocabulary exchanged": (_reorder_vocabulary, "vocabulary is not the float model's"),
    "the pre-tokenizer": (_lose_spaces, "probe text 1 becomes other token ids"),
    "the end token of the tokenizer": (_other_end, "eos_token is another token"),
    "the model's class": (_edit_config(architectures=["LlamaForCausalLM"]), "architectures is ['LlamaForCausalLM']"),
    "a tied head over two matrices": (
        _edit_config(tie_word_embeddings=True),
        "the files hold two matrices that differ",
    ),
    "the decoder of the tokenizer": (_add_decoder, "its decoder is not the float model's"),
    "a chat template": (_add_template, "chat template: default is not the float model's"),
    "generation settings": (_edit_generation, "temperature is 0.2"),
}


@pytest.mark.parametrize(
    "fault",
    slow_but(
        FLOAT_PART,
        *("a norm scaled by 1.01", "a head of another revision", "base of the rotary positions", "the context length"),
        *("two words of the vocabulary exchanged", "a tied head over two matrices", "a chat template"),
    ),
)
def test_what_is_not_quantized_must_equal_the_float_model(
    fault: str, copy: Path, options: VerifyOptions, silent: Console
) -> None:
    plant, named = FLOAT_PART[fault]
    plant(copy)
    certify_again(copy)
    report = verify(copy, dataclasses.replace(options, adapters=("one",)), console=silent)
    assert "certificate" not in missed(report)
    assert "float_part" in missed(report)
    assert named in str(missed_gates(report))


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
    _double_alpha(newer)
    report = verify(exported, dataclasses.replace(options, run=newer), console=silent)
    assert missed(report) == {"provenance"}
    assert "adapter one beside the run" in str(missed_gates(report))
    assert "the export is stale" in str(missed_gates(report))


OUTSIDE: dict[str, tuple[Callable[[Path, Path], tuple[str, ...]], str]] = {
    "the initial adapter under the trained one's name": (
        lambda run, _: (f"one={run / 'adapters' / 'cloq'}",),
        "its folder holds the adapter that the export has as cloq",
    ),
    "two names exchanged": (
        lambda run, _: (f"one={run / 'adapters' / 'two'}", f"two={run / 'adapters' / 'one'}"),
        "its folder holds the adapter that the export has as two",
    ),
    "two new names exchanged": (
        lambda run, place: tuple(f"{name}={place / name}" for name in _renamed_and_exchanged(run, place)),
        "has other numbers",
    ),
    "alpha doubled": (lambda run, place: (f"mine={_outside(run, place, _double_alpha)}",), "has 2 times the product"),
    "rounded to bfloat16": (
        lambda run, place: (f"mine={_outside(run, place, _round_to_bfloat16)}",),
        "was rounded after it was made",
    ),
    "A and B exchanged": (
        lambda run, place: (f"mine={_outside(run, place, _exchange_factors)}",),
        "has A and B exchanged",
    ),
    "a module zeroed": (lambda run, place: (f"mine={_outside(run, place, _zero_module)}",), "a product of zero"),
    "a module left out": (lambda run, place: (f"mine={_outside(run, place, _drop_module)}",), "lacks the pairs"),
    "the record taken away": (
        lambda run, place: (f"mine={_outside(run, place, _strip_record)}",),
        "carries no record of how it was made",
    ),
    "the record edited": (
        lambda run, place: (f"mine={_outside(run, place, _edit_adapter_record)}",),
        "was edited after it was written",
    ),
    "the initial weights in the trained one's folder": (
        lambda run, place: (f"mine={_outside(run, place, _serve_start)}",),
        "that the training started from",
    ),
}


def _outside(run: Path, place: Path, fault: Fault) -> Path:
    shutil.copytree(run / "adapters", place / "adapters")
    fault(place)
    return place / "adapters" / "one"


def _renamed_and_exchanged(run: Path, place: Path) -> tuple[str, ...]:
    for source, target in (("one", "x"), ("two", "y")):
        shutil.copytree(run / "adapters" / source, place / target)
    held = (place / "x" / "adapter_model.safetensors").read_bytes()
    shutil.copyfile(place / "y" / "adapter_model.safetensors", place / "x" / "adapter_model.safetensors")
    (place / "y" / "adapter_model.safetensors").write_bytes(held[:-2] + held[-2:])
    rewrite_pairs(place / "y", lambda _, pair: dataclasses.replace(pair, lora_A=pair.lora_A.flip(0)))
    return "x", "y"


@pytest.mark.parametrize("fault", OUTSIDE)
def test_an_adapter_outside_the_export_is_held_to_its_own_record(
    fault: str, run: Path, exported: Path, options: VerifyOptions, silent: Console, tmp_path: Path
) -> None:
    plant, named = OUTSIDE[fault]
    adapters = plant(run, tmp_path)
    report = verify(exported, dataclasses.replace(options, adapters=adapters), console=silent)
    assert "provenance" in missed(report)
    assert named in str(missed_gates(report))


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
