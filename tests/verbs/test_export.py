"""Exports, conversions and foreign checkpoints: the same integers in every layout, bound, certified and described."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import transformers
from huggingface_hub import metadata_load
from read_integers import assert_same_integers, integers, logits
from rich.console import Console

import cloq_export
import cloq_export.formats.merged
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.engines.transformers.loading import dequantized_model
from cloq_export.errors import (
    BindingError,
    FormatError,
    RunDirectoryError,
    ShapeError,
    UsageError,
)
from cloq_export.formats.peft import read_adapter, write_adapter
from cloq_export.formats.registry import LAYOUTS
from cloq_export.verbs.adapt import adapt
from cloq_export.verbs.evaluate import evaluate
from cloq_export.verbs.export import export as write_export
from cloq_export.verbs.inspect import inspect as inspect_folder
from cloq_export.verbs.options import EvaluateOptions, ExportOptions
from cloq_export.verbs.run import run as make_run


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, False), (4, True), (8, False)])
def test_every_layout_holds_the_same_integers(
    tmp_path: Path, made_run: Any, silent: Console, layout: str, bits: int, symmetric: bool
) -> None:
    run = made_run(bits=bits, symmetric=symmetric)
    if layout == "gptq" and not symmetric and any(int(layer.zeros.min()) == 0 for layer in integers(run).values()):
        with pytest.raises(FormatError, match=r"has a zero of 0, which the layout gptq \(version 1\) cannot hold"):
            write_export(run, ExportOptions(format=layout, out=tmp_path / "out"), console=silent)
        assert not (tmp_path / "out").exists()
        return
    if LAYOUTS[layout].symmetric_only and not symmetric:
        with pytest.raises(FormatError, match="is asymmetric, and the layout auto_round_gptq is for symmetric layers"):
            write_export(run, ExportOptions(format=layout, out=tmp_path / "out"), console=silent)
        assert not (tmp_path / "out").exists()
        return
    summary = write_export(run, ExportOptions(format=layout, out=tmp_path / "out"), console=silent)
    out = tmp_path / "out"
    assert summary.folder == out
    assert summary.base_fingerprint == Checkpoint.open(run).fingerprint == Checkpoint.open(out).fingerprint
    assert_same_integers(run, out)
    assert torch.equal(logits(cloq_export.load(out, "cloq")), logits(cloq_export.load(run, "cloq")))
    repeated = inspect_folder(out, verify=True, adapter="cloq").to_json()
    assert repeated["layout"] == layout
    assert repeated["certificate"]["layout"] == layout
    assert repeated["certificate"]["not_covered"] == []
    assert repeated["checked_adapter"]["bound_to_this_base"]
    header = metadata_load(out / "README.md")
    assert header["base_model_relation"] == "quantized" if "base_model" in header else True
    card = (out / "README.md").read_text()
    for expected in (f"{bits}", layout, "perplexity", "cloq_export.load", summary.base_fingerprint[:20]):
        assert expected in card


def test_an_export_needs_the_run_alone_and_is_the_same_every_time(
    tmp_path: Path, recipe_for: Any, silent: Console, contents: Any
) -> None:
    shutil.copytree(recipe_for("llama").model, tmp_path / "model")
    recipe = recipe_for("llama", model=str(tmp_path / "model"), max_shard_size="20KB")
    make_run(recipe, tmp_path / "run", console=silent)
    shutil.rmtree(tmp_path / "model")
    for name in ("a", "b"):
        options = ExportOptions(format="compressed_tensors", out=tmp_path / name)
        write_export(tmp_path / "run", options, console=silent)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    write_export(tmp_path / "run", options, console=silent)  # over an earlier export
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    assert (tmp_path / "a" / "tokenizer.json").exists()


def test_nothing_of_this_machine_is_published(
    tmp_path: Path, made_run: Any, silent: Console, texts: dict[str, str]
) -> None:
    """Folders of the person who exports are nobody else's business; versions and figures are."""
    for format in ("gptq_v2", "merged", "peft"):
        write_export(made_run(), ExportOptions(format=format, out=tmp_path / format), console=silent)
        for path in (tmp_path / format).rglob("*"):
            if path.suffix in (".json", ".md"):
                content = path.read_text()
                for private in (str(tmp_path.parent), str(Path(texts["eval_text"]).parent), str(Path.home()) + "/"):
                    assert private not in content, path
    card = (tmp_path / "gptq_v2" / "README.md").read_text()
    assert "tokens of evaluation.txt in windows of 16" in card


def test_a_run_keeps_other_peoples_files(tmp_path: Path, made_run: Any, silent: Console) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for format in ("gptq_v2", "merged", "peft"):
        with pytest.raises(RunDirectoryError, match=r"holds (other )?files"):
            write_export(made_run(), ExportOptions(format=format, out=tmp_path / "mine"), console=silent)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merged_weights_are_those_that_are_served(
    tmp_path: Path, made_run: Any, silent: Console, texts: dict[str, str], dtype: str
) -> None:
    run, out = made_run(bits=3), tmp_path / "out"
    write_export(run, ExportOptions(format="merged", dtype=dtype, out=out), console=silent)
    plain = transformers.AutoModelForCausalLM.from_pretrained(out)
    expected = dequantized_model(run, "cloq")
    wanted = getattr(torch, dtype)
    assert plain.dtype == wanted
    for name in integers(run):
        assert torch.equal(plain.get_submodule(name).weight, expected.get_submodule(name).weight.to(wanted)), name
    schema = Path(cloq_export.formats.merged.__file__).with_name("schema.json")
    jsonschema.validate(json.loads((out / "cloq_merged.json").read_text()), json.loads(schema.read_text()))
    described = inspect_folder(out, verify=True).to_json()
    assert described["kind"] == "merged export"
    assert described["verified"] is True
    assert described["certificate"]["layout"] == "merged"
    measured = evaluate(out, EvaluateOptions(texts["eval_text"], 16, 4), console=silent)
    served = evaluate(run, EvaluateOptions(texts["eval_text"], 16, 4), console=silent)
    assert measured.perplexity.models["merged"].perplexity == pytest.approx(
        served.perplexity.models["adapter"].perplexity,
        rel=torch.finfo(wanted).eps,  # every weight is rounded once more
    )
    with pytest.raises(UsageError, match="is a merged export and takes no adapter"):
        evaluate(out, EvaluateOptions(texts["eval_text"], 16, 4, adapter="cloq"), console=silent)


def test_an_adapter_alone_balanced_and_padded(tmp_path: Path, made_run: Any, silent: Console) -> None:
    run, out = made_run(bits=2), tmp_path / "out"
    options = ExportOptions(format="peft", split="balanced", pad_rank=8, out=out)
    summary = write_export(run, options, console=silent)
    assert summary.adapters[0].record["rank"] == 8
    # Balancing rounds A and B once more, each entry by at most half a unit of float16.
    rounding = 2 * torch.finfo(torch.float16).eps
    assert 0 < summary.adapters[0].record["largest_product_error"] < rounding
    read, original = read_adapter(out), read_adapter(run / "adapters" / "cloq")
    assert read.extra["split"] == "balanced"
    assert read.extra["padded_to"] == 8
    for name, pair in read.pairs.items():
        assert pair.rank == 8
        meant = original.pairs[name].product()
        assert float((pair.product() - meant).norm()) < rounding * float(meant.norm())
    assert inspect_folder(out, verify=True).to_json()["certificate"]["layout"] == "peft"
    write_export(run, options, console=silent)  # over an earlier export
    served, meant, bare = (logits(cloq_export.load(run, adapter)) for adapter in (out, "cloq", None))
    # What the logits lose is small beside what the adapter does; the factor is for what the layers between amplify.
    assert float((served - meant).norm()) < 4 * rounding * float((meant - bare).norm())


def test_several_adapters(tmp_path: Path, recipe_for: Any, silent: Console) -> None:
    run = tmp_path / "run"
    make_run(recipe_for("llama", bits=2), run, console=silent)
    adapt(run, {"rank": 8, "adapter_name": "wide"}, console=silent)
    summary = write_export(run, ExportOptions(), console=silent)
    out = summary.folder
    assert out == run / "exports" / "gptq_v2"
    assert [adapter.name for adapter in summary.adapters] == ["cloq", "wide"]
    for name in ("cloq", "wide"):
        assert torch.equal(logits(cloq_export.load(out, name)), logits(cloq_export.load(run, name)))
    assert [entry["name"] for entry in inspect_folder(out).to_json()["adapters"]] == ["cloq", "wide"]
    with pytest.raises(UsageError, match="a merged export holds one adapter, and there are 2: cloq, wide"):
        write_export(run, ExportOptions(format="merged", adapters=("cloq", "wide")), console=silent)
    write_export(run, ExportOptions(format="merged"), console=silent)  # the recipe's own
    write_export(run, ExportOptions(format="peft", out=tmp_path / "both"), console=silent)
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["cloq", "wide"]


def test_an_adapter_of_another_base_is_refused_and_force_is_recorded(
    tmp_path: Path, made_run: Any, silent: Console, texts: dict[str, str]
) -> None:
    run, other = made_run(bits=2), made_run(bits=3)
    foreign = other / "adapters" / "cloq"
    mine, theirs = Checkpoint.open(run).fingerprint, Checkpoint.open(other).fingerprint
    both = rf"is bound to the base {theirs}, but .* is {mine}"
    with pytest.raises(BindingError, match=both):
        cloq_export.load(run, foreign)
    with pytest.raises(BindingError, match=both):
        inspect_folder(run, adapter=str(foreign))
    with pytest.raises(BindingError, match=both):
        evaluate(run, EvaluateOptions(texts["eval_text"], 16, 1, adapter=str(foreign)), console=silent)
    options = ExportOptions(adapters=(str(foreign),), out=tmp_path / "out")
    with pytest.raises(BindingError, match=both):
        write_export(run, options, console=silent)
    assert not (tmp_path / "out").exists()

    assert inspect_folder(run, adapter=str(foreign), force=True).to_json()["checked_adapter"]["forced"] is True
    measured = evaluate(
        run, EvaluateOptions(texts["eval_text"], 16, 1, adapter=str(foreign), force=True), console=silent
    )
    assert any("taken by force" in note for note in measured.notes)
    summary = write_export(run, dataclasses.replace(options, force=True), console=silent)
    assert any(f"bound to {theirs}" in note for note in summary.notes)
    assert inspect_folder(tmp_path / "out", verify=True).to_json()["certificate"]["forced"] == ["cloq"]
    assert read_adapter(tmp_path / "out" / "adapters" / "cloq").extra["bound_to"] == theirs
    assert "taken by force" in (tmp_path / "out" / "README.md").read_text()


def test_an_adapter_that_names_no_base_is_refused(tmp_path: Path, made_run: Any, silent: Console) -> None:
    run = made_run(bits=2)
    write_adapter(
        tmp_path / "plain", read_adapter(run / "adapters" / "cloq").pairs, base_model="m", base_fingerprint="x"
    )
    (tmp_path / "plain" / "cloq_adapter.json").unlink()
    from safetensors.torch import load_file, save_file

    weights = tmp_path / "plain" / "adapter_model.safetensors"
    save_file(load_file(weights), weights)
    with pytest.raises(BindingError, match="does not say which quantized base it belongs to"):
        write_export(run, ExportOptions(adapters=(str(tmp_path / "plain"),), out=tmp_path / "o"), console=silent)


def test_a_target_chooses_the_layout_or_refuses_with_what_works(tmp_path: Path, made_run: Any, silent: Console) -> None:
    run = made_run(bits=4)
    summary = write_export(run, ExportOptions(target="vllm==0.32", out=tmp_path / "a"), console=silent)
    assert summary.format == "compressed_tensors"
    assert summary.target == "vllm==0.32"
    assert summary.max_lora_rank == 8
    low = write_export(made_run(bits=2), ExportOptions(target="vllm", device="cpu", out=tmp_path / "c"), console=silent)
    assert any("needs cloq-export installed in the same environment as vLLM" in note for note in low.notes)
    options = ExportOptions(target="sglang", format="gptq_v2", device="cpu", out=tmp_path / "b")
    with pytest.raises(UsageError, match=r"the nearest that works: `format=gptq`,"):
        write_export(run, options, console=silent)
    options = ExportOptions(target="sglang", format="compressed_tensors", out=tmp_path / "b")
    with pytest.raises(UsageError, match=r"has no kernel for 2 bits in .* the nearest that works"):
        write_export(made_run(bits=2), options, console=silent)
    with pytest.raises(UsageError, match=r"target 'vlm' is unknown; .* Did you mean vllm"):
        write_export(run, ExportOptions(target="vlm", out=tmp_path / "b"), console=silent)
    assert not (tmp_path / "b").exists()


def test_an_engine_without_patterns_gets_one_rank(tmp_path: Path, made_run: Any, silent: Console) -> None:
    run = made_run(bits=4, symmetric=True, overrides={"*.o_proj": {"rank": 2}})
    options = ExportOptions(target="sglang", out=tmp_path / "out")
    summary = write_export(run, options, console=silent)
    assert summary.adapters[0].record["rank"] == 4
    assert any("was brought to rank 4 by zeros" in note for note in summary.notes)
    config = json.loads((tmp_path / "out" / "adapters" / "cloq" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {} == config["alpha_pattern"]
    assert torch.equal(logits(cloq_export.load(tmp_path / "out", "cloq")), logits(cloq_export.load(run, "cloq")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "zip"}, "`format` is 'zip'; allowed are gptq_v2, gptq, compressed_tensors"),
        ({"format": "merged", "dtype": "int8"}, "`dtype` is 'int8'; allowed are bfloat16, float16"),
        ({"split": "odd"}, "`split` is 'odd'; allowed are stored, balanced"),
    ],
)
def test_options_that_mean_nothing(made_run: Any, silent: Console, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        write_export(made_run(), ExportOptions(**options), console=silent)


def test_what_cannot_be_exported(tmp_path: Path, made_run: Any, recipe_for: Any, silent: Console) -> None:
    with pytest.raises(ShapeError, match="a pair of rank 4 cannot be padded to rank 2"):
        write_export(made_run(), ExportOptions(pad_rank=2, out=tmp_path / "o"), console=silent)
    with pytest.raises(RunDirectoryError, match="has no adapter 'ghost'; it has cloq"):
        write_export(made_run(), ExportOptions(adapters=("ghost",), out=tmp_path / "o"), console=silent)
    bare = tmp_path / "bare"
    make_run(recipe_for("llama", rank=0), bare, console=silent)
    with pytest.raises(UsageError, match="there is no adapter to export; make one with `cloq adapt`"):
        write_export(bare, ExportOptions(format="peft"), console=silent)


def test_a_run_whose_checkpoint_is_of_other_layers_gets_a_new_one(
    tmp_path: Path, recipe_for: Any, silent: Console, contents: Any
) -> None:
    make_run(recipe_for("llama", bits=2), tmp_path / "run", console=silent)
    make_run(recipe_for("llama", bits=3), tmp_path / "other", console=silent)
    honest = contents(tmp_path / "run" / "checkpoint")
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    shutil.copytree(tmp_path / "other" / "checkpoint", tmp_path / "run" / "checkpoint")
    summary = write_export(tmp_path / "run", ExportOptions(out=tmp_path / "out"), console=silent)
    assert any("was of other layers, so it was written again" in note for note in summary.notes)
    assert contents(tmp_path / "run" / "checkpoint") == honest
