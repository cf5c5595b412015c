"""What an artefact is said to be and to weigh."""

from __future__ import annotations

import json
import shutil

import pytest

from cloq_export.artifact.inspection import describe
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.artifact.stored_sizes import stored_sizes
from cloq_export.errors import FormatError
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.files.tensor_writer import write_safetensors
from cloq_export.formats.gptq import GPTQ_V1
from cloq_export.types import QuantSpec


def make_run(written, folder):
    with RunDirectory.create_or_resume(folder, {"model": "random", "bits": 2}, "sha256:1", {"torch": "2"}) as run:
        for name, layer in written.layers.items():
            run.write_layer(name, layer, written.pairs[name])
        shutil.copytree(written.folder, run.checkpoint_path)
        shutil.copytree(written.adapter, run.adapter_path("cloq"))
        run.set_state("done")
    return folder


@pytest.mark.parametrize("spec", [QuantSpec(2, 32), QuantSpec(3, -1), QuantSpec(8, 16)], ids=str)
def test_sizes_count_every_stored_byte(tmp_path, write_quantized, spec):
    written = write_quantized(tmp_path, spec=spec)
    sizes = stored_sizes(written.folder, written.adapter)
    weights = sum(layer.codes.numel() for layer in written.layers.values())
    stored_bits = sum(layer.stored_bits for layer in written.layers.values())
    adapter_bytes = sum(2 * (pair.lora_A.numel() + pair.lora_B.numel()) for pair in written.pairs.values())
    assert sizes.quantized_weights == weights
    assert sizes.code_bytes == weights * spec.bits // 8
    assert sizes.bits_per_weight == pytest.approx(stored_bits / weights)
    assert sizes.adapter_bytes == adapter_bytes
    assert sizes.bits_per_weight_with_adapter == pytest.approx((stored_bits + 8 * adapter_bytes) / weights)
    assert sizes.float_bytes == 4 * sum(p.numel() for p in written.source.parameters())

    held = read_safetensors(written.folder / "model.safetensors")[0]
    assert sizes.checkpoint_bytes == sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    without = stored_sizes(written.folder)
    assert without.adapter_bytes is None
    assert without.bits_per_weight_with_adapter is None


def test_bits_per_weight_of_mixed_grids(tmp_path, write_quantized):
    written = write_quantized(tmp_path, overrides={"q_proj": QuantSpec(8, -1), "up_proj": None})
    stored_bits = sum(layer.stored_bits for layer in written.layers.values())
    weights = sum(layer.codes.numel() for layer in written.layers.values())
    assert stored_sizes(written.folder).bits_per_weight == pytest.approx(stored_bits / weights)
    facts = describe(written.folder).to_json()
    assert facts["grids"] == [
        {"bits": 2, "group_size": 32, "symmetric": False, "modules": 10},
        {"bits": 8, "group_size": -1, "symmetric": False, "modules": 2},
    ]


def test_checkpoint(written):
    facts = describe(written.folder).to_json()
    assert json.loads(json.dumps(facts)) == facts
    expected = {
        "kind": "checkpoint",
        "ours": True,
        "architecture": "LlamaForCausalLM",
        "layout": "gptq_v2",
        "bits": 2,
        "group_size": 32,
        "symmetric": False,
        "quantized_modules": 14,
        "base_fingerprint": written.fingerprint,
        "files": ["model.safetensors"],
    }
    assert {name: facts[name] for name in expected} == expected
    assert "verified" not in facts
    assert describe(written.folder, verify=True).to_json()["verified"] is True


def test_our_own_asymmetric_files_of_version_one_carry_a_warning(tmp_path, write_quantized):
    of_version_one = {}
    for symmetric in (False, True):
        written = write_quantized(tmp_path / str(symmetric), spec=QuantSpec(4, 32, symmetric), layout=GPTQ_V1)
        of_version_one[symmetric] = describe(written.folder).notes
    assert of_version_one[True] == ()
    (note,) = of_version_one[False]
    assert "--quantization humming take stored zeros as they lie" in note
    assert "cloq convert --format gptq_v2" in note


def test_verify_finds_a_changed_code(tmp_path, written):
    folder = shutil.copytree(written.folder, tmp_path / "copy")
    tensors, metadata = read_safetensors(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.qweight"].view(-1)[5] ^= 1
    write_safetensors(folder / "model.safetensors", tensors, metadata)
    describe(folder)
    with pytest.raises(FormatError, match=r"says its base is sha256:.*but its tensors are sha256:"):
        describe(folder, verify=True)


def test_adapter(written):
    facts = describe(written.adapter).to_json()
    assert facts["kind"] == "adapter"
    assert facts["ours"] is True
    assert facts["base_fingerprint"] == written.fingerprint
    assert facts["modules"] == 14
    assert facts["ranks"] == "8 (7 modules), 4 (7 modules)"
    assert facts["dtype"] == "float16"
    assert facts["adapter_bytes"] == 2 * facts["parameters"]


def test_run(tmp_path, written):
    run = make_run(written, tmp_path / "run")
    facts = describe(run, verify=True).to_json()
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["kind"], facts["state"], facts["model"], facts["finished_layers"]) == ("run", "done", "random", 14)
    assert facts["checkpoint"]["base_fingerprint"] == written.fingerprint
    assert facts["checkpoint"]["verified"] is True
    (adapter,) = facts["adapters"]
    assert adapter["name"] == "cloq"
    assert adapter["bound_to_this_base"] is True
    expected = stored_sizes(written.folder, written.adapter).bits_per_weight_with_adapter
    assert adapter["bits_per_weight_with_adapter"] == expected
    assert stored_sizes(run, "cloq").bits_per_weight_with_adapter == expected


def test_an_unfinished_run_is_described_too(tmp_path, written):
    name, layer = next(iter(written.layers.items()))
    with RunDirectory.create_or_resume(tmp_path / "run", {"model": "m"}, "sha256:1", {}) as run:
        run.write_layer(name, layer)
        (run.path / "layers" / "other.safetensors").write_bytes(b"cut")
    facts = describe(tmp_path / "run").to_json()
    assert facts["checkpoint"] is None
    assert facts["adapters"] == []
    assert facts["finished_layers"] == 1
    assert "truncated" in facts["damaged_layers"][0]


def test_a_foreign_checkpoint_is_recognised(tmp_path, written):
    folder = shutil.copytree(written.folder, tmp_path / "foreign")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["cloq"]
    (folder / "config.json").write_text(json.dumps(config))
    facts = describe(folder).to_json()
    assert facts["ours"] is False
    assert facts["base_fingerprint"] is None
    assert facts["quantized_modules"] == 14
    assert describe(folder, verify=True).to_json()["base_fingerprint"] == written.fingerprint
    assert facts["examination"]["reading"] == "gptq_v2"
    assert facts["examination"]["readable"] is True


def test_a_checkpoint_that_is_not_read_is_examined_all_the_same(tmp_path, written):
    folder = shutil.copytree(written.folder, tmp_path / "awq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps(config))
    facts = describe(folder).to_json()
    assert facts["examination"]["readable"] is False
    assert facts["examination"]["refusal"]
    with pytest.raises(FormatError, match=r"awq|AWQ"):
        describe(folder, verify=True)


def test_what_is_unknown_is_explained(tmp_path, written):
    with pytest.raises(FormatError, match="nothing does not exist; give the folder of a run, a checkpoint or an"):
        describe(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="file is a file; give the folder"):
        describe(tmp_path / "file")
    with pytest.raises(FormatError, match=r"holds no run\.json, config\.json or adapter_config\.json"):
        describe(tmp_path)
    written.source.save_pretrained(tmp_path / "float")
    with pytest.raises(FormatError, match="is no quantized checkpoint; make one with: cloq run"):
        describe(tmp_path / "float")
