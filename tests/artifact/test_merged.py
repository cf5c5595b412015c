"""The merged export: Q + BA cast once, an ordinary checkpoint for everybody else, and what the casts lost."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch

from cloq_export.artifact import merged
from cloq_export.artifact.checkpoint_writer import FloatPart, LayerSource, WriteSettings
from cloq_export.artifact.merged import MergedAdapter, export_merged, is_merged
from cloq_export.engines.transformers.loading import dequantized_model
from cloq_export.errors import FormatError, NonFiniteError, RunDirectoryError
from cloq_export.files.fingerprint import base_fingerprint
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.types import LoraPair

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def export(written, folder, pairs=None, *, model=None, layers=None, **options):
    source = LayerSource.of_mapping(layers or written.layers)
    floats = FloatPart.of_model(model or written.source, source)
    adapter = MergedAdapter(written.pairs if pairs is None else pairs, options.pop("adapter", None))
    dtype = options.pop("dtype", torch.bfloat16)
    return export_merged(folder, source, floats, adapter, dtype=dtype, settings=WriteSettings(**options))


def exact_weights(written):
    """The merged weights in float64, made without any code of the runtimes."""
    result = {}
    for name, layer in written.layers.items():
        groups = layer.scales.shape[1]
        steps = layer.codes.view(layer.out_features, groups, -1).double() - layer.zeros.double().unsqueeze(-1)
        pair = written.pairs[name]
        product = pair.lora_B.double() @ pair.lora_A.double() * pair.scaling
        result[name] = (steps * layer.scales.double().unsqueeze(-1)).view(layer.codes.shape) + product
    return result


def read_all(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= read_safetensors(path)[0]
    return tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_transformers_loads_the_sum_rounded_once(tmp_path, write_quantized, log_probabilities, architecture, dtype):
    from transformers import AutoModelForCausalLM

    written = write_quantized(tmp_path, architecture)
    export(written, tmp_path / "merged", dtype=dtype)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == dtype
    weights = exact_weights(written)
    state = model.state_dict()
    for name, original in written.source.state_dict().items():
        exact = weights.get(name.removesuffix(".weight"), original.double()) if name.endswith("weight") else original
        assert torch.equal(state[name], exact.to(dtype)), name
    assert not hasattr(model.config, "quantization_config")

    # The logits, beside a model whose weights were rounded by hand, in float32 so that only the weights differ.
    reference = copy.deepcopy(written.source)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            exact = weights.get(name.removesuffix(".weight"), parameter) if name.endswith("weight") else parameter
            parameter.copy_(exact.to(dtype))
    assert torch.equal(log_probabilities(model.float().eval()), log_probabilities(reference))


def test_float32_is_the_reference_that_runtimes_are_compared_with(tmp_path, written, log_probabilities):
    from transformers import AutoModelForCausalLM

    export(written, tmp_path / "merged", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    reference = dequantized_model(written.folder, written.adapter)
    for name in written.layers:
        torch.testing.assert_close(
            model.get_submodule(name).weight, reference.get_submodule(name).weight, rtol=1e-6, atol=1e-7
        )
    torch.testing.assert_close(log_probabilities(model), log_probabilities(reference), rtol=1e-4, atol=1e-4)


def test_config_and_record_say_what_the_folder_holds(tmp_path, written):
    report = export(written, tmp_path / "merged", adapter="cloq", base_fingerprint=written.fingerprint)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert "torch_dtype" not in config
    record = json.loads((tmp_path / "merged" / "cloq_merged.json").read_text())
    assert record["format"] == "cloq-merged"
    assert record["format_version"] == 1
    assert record["dtype"] == "bfloat16"
    assert record["base_fingerprint"] == report.base_fingerprint == base_fingerprint(written.layers.items())
    assert record["adapter"] == {"name": "cloq", "sha256": report.adapter_sha256, "modules": sorted(written.pairs)}
    assert record["modules"] == sorted(written.layers)
    assert set(record["rounding"]) == {"merged", "matrices", "vectors"}
    assert is_merged(tmp_path / "merged")
    assert not is_merged(written.folder)


@pytest.mark.parametrize(("dtype", "roundoff"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_what_the_casts_lost_is_measured(tmp_path, written, dtype, roundoff):
    report = export(written, tmp_path / "merged", dtype=dtype)
    tensors = read_all(tmp_path / "merged")
    errors = {}
    for name, exact in exact_weights(written).items():
        difference = tensors[f"{name}.weight"].double() - exact
        errors[f"{name}.weight"] = float(difference.norm() / exact.norm())
        assert float((difference / exact).abs().max()) <= report.rounding["merged"].max_relative
    rounding = report.rounding["merged"]
    assert rounding.tensors == len(written.layers)
    assert rounding.max_norm == pytest.approx(max(errors.values()), rel=1e-9)
    assert rounding.worst == max(errors, key=errors.__getitem__)
    assert roundoff / 8 < rounding.max_norm < rounding.max_relative
    if dtype == torch.bfloat16:  # float16 has subnormal numbers among these
        assert rounding.max_relative <= roundoff
    embedding = written.source.model.embed_tokens.weight.detach().double()
    lost = float((embedding.to(dtype).double() - embedding).norm() / embedding.norm())
    assert report.rounding["matrices"].max_norm == pytest.approx(lost, rel=1e-9)
    assert report.rounding["matrices"].worst == "model.embed_tokens.weight"
    assert report.rounding["vectors"].max_norm == 0.0  # norms of one
    assert report.rounding["vectors"].worst is None


def test_a_number_that_becomes_zero_is_counted_as_lost_whole(tmp_path, written):
    model = copy.deepcopy(written.source)
    with torch.no_grad():
        model.model.norm.weight[0] = 1e-9
    report = export(written, tmp_path / "merged", model=model, dtype=torch.float16)
    assert report.rounding["vectors"].max_relative == 1.0
    assert report.rounding["vectors"].worst == "model.norm.weight"


def test_a_tensor_that_would_be_lost_is_refused(tmp_path, written):
    model = copy.deepcopy(written.source)
    with torch.no_grad():
        model.model.norm.weight *= 1e-8
    message = r"model\.norm\.weight \(root mean square 1e-08\) would lose \d+% .* float16 .*; export it in bfloat16"
    with pytest.raises(NonFiniteError, match=message):
        export(written, tmp_path / "merged", model=model, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    export(written, tmp_path / "merged", model=model, dtype=torch.bfloat16)


def test_overflow_names_the_layer_and_the_remedy(tmp_path, written):
    name = next(iter(written.layers))
    pair = written.pairs[name]
    loud = written.pairs | {name: LoraPair(pair.lora_A.float() * 1e4, pair.lora_B.float() * 1e4, pair.alpha)}
    with pytest.raises(
        NonFiniteError, match=rf"{name}\.weight reaches .*, but float16 ends at 6\.55e\+04; export it in"
    ):
        export(written, tmp_path / "merged", loud, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    export(written, tmp_path / "merged", loud, dtype=torch.bfloat16)
    louder = written.pairs | {name: LoraPair(pair.lora_A.float() * 1e22, pair.lora_B.float() * 1e22, pair.alpha)}
    with pytest.raises(NonFiniteError, match=r"but float32 ends at 3\.403e\+38"):
        export(written, tmp_path / "again", louder, dtype=torch.float32)

    model = copy.deepcopy(written.source)
    with torch.no_grad():
        model.model.norm.weight[0] = 1e5
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight reaches 1e\+05, but float16 ends at"):
        export(written, tmp_path / "again", model=model, dtype=torch.float16)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight holds NaN or Inf before it is stored"):
        export(written, tmp_path / "again", model=model)


def test_files_are_bounded_and_the_same_every_time(tmp_path, written, monkeypatch):
    whole = export(written, tmp_path / "whole")
    monkeypatch.setattr(merged, "_BLOCK_BYTES", 8 * 64 * 5)  # five rows of a layer at a time
    seen = []
    report = export(
        written, tmp_path / "cut", max_shard_bytes=20_000, progress=lambda done, total: seen.append((done, total))
    )
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 3
    assert files == sorted(set(index["weight_map"].values()))
    assert all(path.stat().st_size < 21_000 for path in (tmp_path / "cut").glob("*.safetensors"))
    one, many = read_all(tmp_path / "whole"), read_all(tmp_path / "cut")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert report.modules == whole.modules
    assert report.adapter_sha256 == whole.adapter_sha256
    assert seen == [(done, len(written.layers)) for done in range(1, len(written.layers) + 1)]


def test_without_an_adapter_it_is_q(tmp_path, written):
    report = export(written, tmp_path / "merged", {}, dtype=torch.float32)
    assert report.adapter_sha256 is None
    assert json.loads((tmp_path / "merged" / "cloq_merged.json").read_text())["adapter"] is None
    assert report.rounding["merged"].max_relative == 0.0  # Q is exact in float32
    tensors = read_all(tmp_path / "merged")
    for name, layer in written.layers.items():
        assert torch.equal(tensors[f"{name}.weight"], layer.dequantize())


def test_a_linear_that_stayed_float_is_merged_too(tmp_path, write_quantized):
    written = write_quantized(tmp_path, overrides={"o_proj": None})
    name = "model.layers.0.self_attn.o_proj"
    weight = written.source.get_submodule(name).weight.detach()
    pair = LoraPair(torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2), 2.0)
    report = export(written, tmp_path / "merged", {name: pair}, dtype=torch.float32)
    expected = (weight.double() + pair.lora_B.double() @ pair.lora_A.double()).float()
    assert torch.equal(read_all(tmp_path / "merged")[f"{name}.weight"], expected)
    assert report.rounding["merged"].tensors == len(written.layers) + 1


def test_pairs_and_bases_of_others_are_refused(tmp_path, written):
    name, pair = next(iter(written.pairs.items()))
    with pytest.raises(FormatError, match="the adapter changes lm_head, whose weight the checkpoint does not hold"):
        export(written, tmp_path / "merged", {"lm_head": pair})
    wrong = LoraPair(torch.zeros(2, 8), torch.zeros(4, 2), 2.0)
    with pytest.raises(FormatError, match=rf"A \(2, 8\) and B \(4, 2\) do not fit {name}\.weight of shape"):
        export(written, tmp_path / "merged", {name: wrong})
    with pytest.raises(FormatError, match=r"have the fingerprint sha256:.* but sha256:0 was promised"):
        export(written, tmp_path / "merged", base_fingerprint="sha256:0")
    with pytest.raises(FormatError, match=r"bfloat16, float16 or float32; torch\.float64 was asked for"):
        export(written, tmp_path / "merged", dtype=torch.float64)
    assert list(tmp_path.iterdir()) == []


def test_only_our_folders_are_replaced_and_a_failure_leaves_nothing(tmp_path, written):
    folder = tmp_path / "merged"
    export(written, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def refuse(filling, report):
        assert (filling / "cloq_merged.json").is_file()
        raise FormatError("the certificate cannot be written")

    with pytest.raises(FormatError, match="the certificate"):
        export(written, folder, finish=refuse)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    export(written, folder, finish=lambda filling, report: (filling / "README.md").write_text("card"))
    assert (folder / "README.md").read_text() == "card"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunDirectoryError, match="holds files that were not written by this command"):
        export(written, tmp_path / "mine")


def test_what_was_written_is_read_back(tmp_path, written, monkeypatch):
    from cloq_export.files.safe_tensors import TensorFile

    honest = TensorFile.read
    monkeypatch.setattr(TensorFile, "read", lambda self, name: honest(self, name) * (1 if "norm" in name else 2))
    with pytest.raises(FormatError, match="was read back with other numbers than were written; check the disk"):
        export(written, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_tied_head_with_a_pair_is_written_apart(tmp_path, written, log_probabilities):
    from transformers import AutoModelForCausalLM

    from cloq_export.artifact.checkpoint import Checkpoint
    from cloq_export.artifact.empty_model import tied_head

    tied = tied_head(Checkpoint.open(written.folder))
    assert tied == {"lm_head.weight": "model.embed_tokens.weight"}
    layers = LayerSource.of_mapping(written.layers)
    floats = dataclasses.replace(FloatPart.of_model(written.source, layers), tied=tied)
    pair = LoraPair(torch.randn(4, 64), 0.1 * torch.randn(96, 4), 4.0)
    adapter = MergedAdapter({**written.pairs, "lm_head": pair})
    export_merged(tmp_path / "merged", layers, floats, adapter, dtype=torch.float32)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    embeddings = written.source.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    expected = (embeddings.double() + pair.lora_B.double() @ pair.lora_A.double() * pair.scaling).float()
    assert torch.equal(model.lm_head.weight, expected)
    # Without such a pair it stays tied.
    export_merged(tmp_path / "plain", layers, floats, MergedAdapter(written.pairs), dtype=torch.float32)
    assert "lm_head.weight" not in read_all(tmp_path / "plain")
