"""Writing a checkpoint folder: complete, in bounded files, the same bytes every time; and reading its layers back."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import pytest
import torch

from cloq_export.artifact.checkpoint import Checkpoint, checkpoint_folder
from cloq_export.artifact.checkpoint_writer import FloatPart, LayerSource, WriteSettings, export_checkpoint
from cloq_export.engines.transformers.loading import load
from cloq_export.errors import FormatError, RunDirectoryError, ShapeError
from cloq_export.files.fingerprint import base_fingerprint
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.types import QuantizedLayer, QuantSpec


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def export(written, folder, **options):
    parts = {name: options.pop(name) for name in ("dtype", "save_files") if name in options}
    return write(folder, written.source, LayerSource.of_mapping(written.layers), parts, **options)


def write(folder, model, layers, parts=None, **options):
    floats = FloatPart.of_model(model, layers, **(parts or {}))
    layout = {"layout": options.pop("layout")} if "layout" in options else {}
    return export_checkpoint(folder, layers, floats, **layout, settings=WriteSettings(**options))


def assert_layers_equal(layers, expected):
    assert set(layers) == set(expected)
    for name, layer in expected.items():
        assert layers[name].spec == layer.spec
        for field in ("codes", "scales", "zeros"):
            assert torch.equal(getattr(layers[name], field), getattr(layer, field)), (name, field)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox", "opt"])
def test_layers_and_floats_come_back_bit_for_bit(tmp_path, write_quantized, architecture):
    written = write_quantized(tmp_path, architecture, QuantSpec(3, 32))
    checkpoint = Checkpoint.open(written.folder)
    assert_layers_equal(dict(checkpoint.read_layers()), written.layers)
    state = written.source.state_dict()
    floats = {name for name in checkpoint.files if name.rpartition(".")[0] not in written.layers}
    floats |= {name for name in checkpoint.files if name.endswith(".bias")}
    tensors = read_safetensors(written.folder / "model.safetensors")[0]
    tied = set(written.source.all_tied_weights_keys)
    assert floats == {name for name in state if name.removesuffix(".weight") not in written.layers} - tied
    for name in floats:
        assert torch.equal(tensors[checkpoint.stored.get(name, name)], state[name]), name


def test_fingerprint_is_that_of_the_layers(written):
    expected = base_fingerprint(written.layers.items())
    checkpoint = Checkpoint.open(written.folder)
    assert written.fingerprint == checkpoint.fingerprint == checkpoint.computed_fingerprint() == expected
    assert checkpoint.is_ours


def test_config_says_what_the_folder_holds(written):
    config = json.loads((written.folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert config["quantization_config"]["quant_method"] == "gptq"
    assert config["quantization_config"]["checkpoint_format"] == "gptq_v2"
    assert config["quantization_config"]["desc_act"] is False
    assert config["quantization_config"]["cloq"]["base_fingerprint"] == written.fingerprint
    assert config["quantization_config"]["cloq"]["modules"] == sorted(written.layers)


def test_the_same_layers_give_the_same_bytes(tmp_path, written):
    export(written, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(written.folder)
    export(written, tmp_path / "again")  # over an earlier checkpoint of ours
    assert contents(tmp_path / "again") == contents(written.folder)


@pytest.mark.parametrize("limit", [1, 9_000, 40_000])
def test_files_are_bounded_and_read_back(tmp_path, written, log_probabilities, limit):
    folder = tmp_path / "sharded"
    export(written, folder, max_shard_bytes=limit)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    assert sorted(path.name for path in folder.glob("*.safetensors")) == files
    total = 0
    for name in files:
        tensors = read_safetensors(folder / name)[0]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        total += size
        assert size <= limit or len({tensor.rpartition(".")[0] for tensor in tensors}) == 1
    assert index["metadata"]["total_size"] == total
    assert_layers_equal(dict(Checkpoint.open(folder).read_layers()), written.layers)
    assert torch.equal(log_probabilities(load(folder)), log_probabilities(load(written.folder)))


def test_floats_are_written_in_the_dtype_of_the_source_where_that_loses_nothing(tmp_path, write_quantized):
    written = write_quantized(tmp_path, dtype=torch.bfloat16)
    wide = written.source.to(torch.float32)  # as a pipeline that computes in float32 holds it
    with torch.no_grad():
        wide.model.norm.weight += 2**-12
    export(written, tmp_path / "narrow", dtype=torch.bfloat16)
    tensors = read_safetensors(tmp_path / "narrow" / "model.safetensors")[0]
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert tensors["model.norm.weight"].dtype == torch.float32
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"
    model = load(tmp_path / "narrow", dtype=torch.float32)
    assert torch.equal(model.model.norm.weight, wide.model.norm.weight)
    assert torch.equal(model.model.embed_tokens.weight, wide.model.embed_tokens.weight)


def test_files_of_the_source_are_copied_beside(tmp_path, written):
    def save(folder):
        written.source.config.save_pretrained(folder)
        (folder / "tokenizer.json").write_text("{}")

    export(written, tmp_path / "out", save_files=save)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert Checkpoint.open(tmp_path / "out").is_ours


def test_a_failure_leaves_nothing_and_keeps_what_was_there(tmp_path, written):
    folder = tmp_path / "out"

    third = list(written.layers)[2]

    def read(name):
        if name == third:
            raise KeyboardInterrupt
        return written.layers[name]

    broken = dataclasses.replace(LayerSource.of_mapping(written.layers), read=read)
    with pytest.raises(KeyboardInterrupt):
        write(folder, written.source, broken, max_shard_bytes=1)
    assert list(tmp_path.iterdir()) == []
    export(written, folder)
    before = contents(folder)
    with pytest.raises(KeyboardInterrupt):
        write(folder, written.source, broken)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_peoples_files_are_not_replaced(tmp_path, written):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunDirectoryError, match="holds files that were not written by this command"):
        export(written, tmp_path)
    written.source.config.save_pretrained(tmp_path / "float")
    with pytest.raises(RunDirectoryError, match="holds files that were not written by this command"):
        export(written, tmp_path / "float")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_place_is_named(tmp_path, written):
    tmp_path.chmod(0o500)
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        export(written, tmp_path / "out")


def test_layers_of_another_model_are_refused(tmp_path, written):
    name, layer = next(iter(written.layers.items()))
    small = QuantizedLayer(layer.codes[:32], layer.scales[:32], layer.zeros[:32], layer.spec)
    for layers, message in (
        ({"model.layers.9.mlp.up_proj": layer}, r"the model has no module model\.layers\.9\.mlp\.up_proj"),
        ({"model.norm": layer}, "they belong to different models"),
        ({name: small}, r"the layer is \(32, 64\): they belong to different models"),
    ):
        with pytest.raises(FormatError, match=message):
            write(tmp_path / "out", written.source, LayerSource.of_mapping(layers))
    with pytest.raises(FormatError, match="needs at least one quantized module"):
        write(tmp_path / "out", written.source, LayerSource.of_mapping({}))
    with pytest.raises(FormatError, match=r"the layers have the fingerprint sha256:.*but sha256:0 was promised"):
        export(written, tmp_path / "out", base_fingerprint="sha256:0")
    assert list(tmp_path.iterdir()) == []


def test_a_width_that_the_layout_cannot_hold_names_its_module(tmp_path, written):
    layer = QuantizedLayer(
        torch.zeros(40, 16, dtype=torch.uint8),
        torch.ones(40, 1, dtype=torch.float16),
        torch.ones(40, 1, dtype=torch.uint8),
        QuantSpec(3, -1),
    )
    floats = FloatPart({}, lambda name: None, {}, (), lambda folder: None)
    with pytest.raises(ShapeError, match="wide has 16 inputs; the GPTQ layout stores 3-bit codes"):
        export_checkpoint(tmp_path / "out", LayerSource.of_mapping({"wide": layer}), floats)


def sharded_copy(written, tmp_path):
    folder = tmp_path / "sharded"
    export(written, folder, max_shard_bytes=9_000)
    return folder, folder / "model.safetensors.index.json"


def test_an_index_that_lies_is_refused(tmp_path, written):
    folder, path = sharded_copy(written, tmp_path)
    honest = json.loads(path.read_text())
    some = next(name for name in honest["weight_map"] if name.endswith(".qweight"))
    for change, message in (
        (lambda m: m.__setitem__(some, "../../etc/passwd"), r"expected the name of a \.safetensors file in the same"),
        (lambda m: m.__setitem__(some, "pytorch_model.bin"), r"expected the name of a \.safetensors file in the same"),
        (lambda m: m.__setitem__(some, 7), r"expected the name of a \.safetensors file in the same"),
        (lambda m: m.__setitem__(some, "model-00009-of-00002.safetensors"), "does not exist, but .* names it"),
        (lambda m: m.__setitem__("ghost", m[some]), "promises .ghost., which no file holds"),
        (lambda m: m.pop(some), "the folder mixes two checkpoints"),
        (lambda m: m.clear(), "has no weight_map"),
    ):
        index = json.loads(json.dumps(honest))
        change(index["weight_map"])
        path.write_text(json.dumps(index))
        with pytest.raises(FormatError, match=message) as caught:
            load(folder)
        assert "\n" not in str(caught.value)
    path.write_text("{")
    with pytest.raises(FormatError, match="is not valid JSON"):
        load(folder)


def test_a_lost_or_cut_shard_is_named(tmp_path, written):
    folder, _ = sharded_copy(written, tmp_path)
    first = sorted(folder.glob("*.safetensors"))[0]
    data = first.read_bytes()
    first.write_bytes(data[:-8])
    with pytest.raises(FormatError, match=rf"{first.name} is truncated or not a safetensors file"):
        load(folder)
    first.unlink()
    with pytest.raises(FormatError, match=rf"{first.name} does not exist, but .* names it"):
        load(folder)


def test_a_plain_checkpoint_of_the_same_layout_is_read(tmp_path, written, log_probabilities):
    folder = shutil.copytree(written.folder, tmp_path / "plain")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["cloq"]
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(folder)
    assert not checkpoint.is_ours
    assert set(checkpoint.specs) == set(written.layers)
    assert checkpoint.fingerprint == written.fingerprint
    expected = log_probabilities(load(written.folder, written.adapter))
    assert torch.equal(log_probabilities(load(folder, written.adapter)), expected)


def test_checkpoint_folder_explains_what_it_was_given(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="file is not a folder; give a run directory or a checkpoint folder"):
        checkpoint_folder(tmp_path / "file")


def foreign(
    written, tmp_path, place=lambda folder, quantization, config: config.update(quantization_config=quantization)
):
    """Return a copy without what only this package writes, whose quantization is described where `place` puts it."""
    folder = shutil.copytree(written.folder, tmp_path / "foreign")
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    del quantization["cloq"]
    place(folder, quantization, config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def beside(name, **changes):
    def place(folder, quantization, config):
        without = {key: value for key, value in quantization.items() if key != "quant_method"}
        (folder / name).write_text(json.dumps(without | changes))

    return place


@pytest.mark.parametrize(
    "place",
    [
        lambda folder, quantization, config: config.update(compression_config=quantization),
        lambda folder, quantization, config: config.update(text_config={"quantization_config": quantization}),
        beside("quantize_config.json"),
        beside("quant_config.json"),
    ],
)
def test_every_place_of_a_quantization_is_read(tmp_path, written, place):
    checkpoint = Checkpoint.open(foreign(written, tmp_path, place))
    assert_layers_equal(dict(checkpoint.read_layers()), written.layers)


def test_places_add_to_each_other_and_must_not_disagree(tmp_path, written):
    folder = foreign(written, tmp_path, lambda f, q, c: c.update(quantization_config={**q, "checkpoint_format": None}))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["checkpoint_format"]
    (folder / "config.json").write_text(json.dumps(config))
    other = folder / "quantize_config.json"
    other.write_text(json.dumps({"bits": 2, "checkpoint_format": "gptq_v2", "desc_act": True}))
    assert_layers_equal(dict(Checkpoint.open(folder).read_layers()), written.layers)
    other.write_text(json.dumps({"bits": 4}))
    with pytest.raises(FormatError, match=r"config\.json says bits 2, but .*quantize_config\.json says 4; one of them"):
        Checkpoint.open(folder)
    other.unlink()
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    with pytest.raises(FormatError, match=r"says quant_method 'gptq', but .*hf_quant_config\.json says 'modelopt'"):
        Checkpoint.open(folder)


def test_a_file_of_its_own_keeps_the_order_of_rules(tmp_path, written):
    rules = {"+:.*up_proj": {"bits": 2}, "+:.*": {"bits": 2}, "+:.*a": {"bits": 8}}
    order = dict(sorted(rules.items()))

    def place(folder, quantization, config):
        config["quantization_config"] = {**quantization, "dynamic": order}
        (folder / "quantize_config.json").write_text(json.dumps({**quantization, "dynamic": rules}))

    assert list(order) != list(rules)
    found = Checkpoint.open(foreign(written, tmp_path, place)).grids
    assert [pattern.text for pattern, _ in found.rules] == [rule.removeprefix("+:") for rule in rules]


def test_codes_that_nothing_describes_are_said(tmp_path, written):
    folder = foreign(written, tmp_path, lambda folder, quantization, config: None)
    with pytest.raises(
        FormatError,
        match=r"is not a quantized checkpoint that can be read, although it holds .*; fetch the quantize_config.json",
    ):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["gptq_model-4bit-128g.safetensors", "model-00001-of-00001.safetensors"])
def test_older_file_names_are_read(tmp_path, written, name):
    folder = foreign(written, tmp_path)
    (folder / "model.safetensors").rename(folder / name)
    assert_layers_equal(dict(Checkpoint.open(folder).read_layers()), written.layers)


def test_shards_without_an_index_must_be_all_there(tmp_path, written):
    folder, index = sharded_copy(written, tmp_path)
    index.unlink()
    assert_layers_equal(dict(Checkpoint.open(folder).read_layers()), written.layers)
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(FormatError, match=rf"{last.name} does not exist, but model-00001-of-.* is there"):
        Checkpoint.open(folder)


def test_of_several_files_the_one_that_the_config_names_is_read(tmp_path, written):
    folder = foreign(written, tmp_path)
    shutil.copy(folder / "model.safetensors", folder / "old.safetensors")
    (folder / "model.safetensors").rename(folder / "new.safetensors")
    with pytest.raises(FormatError, match=r"holds new\.safetensors, old\.safetensors, and nothing says which"):
        Checkpoint.open(folder)
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 2, "model_file_base_name": "new"}))
    assert_layers_equal(dict(Checkpoint.open(folder).read_layers()), written.layers)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "gptq_model-4bit-128g.pt",
            "holds gptq_model-4bit-128g.pt but no model.safetensors; .* save it as safetensors",
        ),
        ("pytorch_model.bin", "holds pytorch_model.bin but no"),
        ("consolidated.safetensors", "holds consolidated.safetensors, but no weights under a name"),
    ],
)
def test_a_file_that_is_there_is_not_said_to_be_missing(tmp_path, written, name, message):
    folder = foreign(written, tmp_path)
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(FormatError, match=message):
        Checkpoint.open(folder)
