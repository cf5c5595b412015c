"""Tensors are called in files as the model's own files call them, and in memory as its class does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from quantized_checkpoints import rounded
from safetensors.torch import load_file, save_file

from cloq_export.artifact.certificate import certify_checkpoint, verify_certificate
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.checkpoint_writer import FloatPart, LayerSource, WriteSettings, export_checkpoint
from cloq_export.artifact.detective import examine
from cloq_export.artifact.empty_model import float_part
from cloq_export.artifact.merged import MergedAdapter, export_merged
from cloq_export.artifact.stored_names import names_in_memory, stored_names
from cloq_export.engines.transformers.loading import dequantized_model, load
from cloq_export.errors import FormatError
from cloq_export.formats.registry import LAYOUTS
from cloq_export.types import QuantSpec

TEXT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
IN_FILES, IN_MEMORY = "language_model.model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def wrapper() -> Any:
    torch.manual_seed(0)
    tokens = {"boi_token_index": 93, "eoi_token_index": 94, "image_token_index": 95}
    config = transformers.Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, **tokens)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name and parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model


@pytest.fixture(scope="module")
def files(wrapper: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wrapper as transformers saves it."""
    folder = tmp_path_factory.mktemp("files")
    wrapper.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def layers(wrapper: Any) -> dict[str, Any]:
    return {
        name: rounded(module.weight.detach(), QuantSpec(3 if name == IN_MEMORY else 4, 32))
        for name, module in wrapper.named_modules()
        if isinstance(module, torch.nn.Linear) and "language_model.layers" in name
    }


def quantized(model: Any, layers: dict[str, Any], folder: Path, layout: str = "gptq_v2") -> FloatPart:
    source = LayerSource.of_mapping(layers)
    floats = FloatPart.of_model(model, source)
    export_checkpoint(
        folder,
        source,
        floats,
        layout=LAYOUTS[layout],
        settings=WriteSettings(
            finish=lambda filling, written: certify_checkpoint(filling, source, floats, base_fingerprint=written)
        ),
    )
    return floats


def make_foreign(folder: Path, **changes: Any) -> None:
    """Take out of a checkpoint what says that it is ours."""
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["cloq"]
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "cloq_certificate.json").unlink()


@pytest.mark.parametrize("layout", ["gptq_v2", "compressed_tensors"])
def test_a_checkpoint_keeps_the_names_of_the_models_own_files(
    tmp_path: Path, wrapper: Any, files: Path, layers: dict[str, Any], layout: str, log_probabilities: Any
) -> None:
    out = tmp_path / "out"
    quantized(wrapper, layers, out, layout)
    written = {name.rpartition(".")[0] for name in load_file(out / "model.safetensors")}
    assert written == {name.rpartition(".")[0] for name in load_file(files / "model.safetensors")}
    checkpoint = Checkpoint.open(out)
    assert set(checkpoint.specs) == set(layers)
    assert checkpoint.stored_module(IN_MEMORY) == IN_FILES
    assert checkpoint.computed_fingerprint() == checkpoint.noted_fingerprint
    assert verify_certificate(out).modules == len(layers)
    # What stays float is named as either kind of reader looks for it.
    said = json.dumps(checkpoint.config["quantization_config"]).replace("\\", "")
    assert all(name in said for name in ("model.vision_tower.", '"vision_tower.' if layout != "gptq_v2" else "^vision"))
    torch.testing.assert_close(
        log_probabilities(load(out)), log_probabilities(dequantized_model(out)), atol=1e-4, rtol=0
    )
    merged = tmp_path / "merged"
    source = LayerSource.of_checkpoint(checkpoint)
    floats = float_part(checkpoint)
    export_merged(merged, source, floats, MergedAdapter(), dtype=torch.float32)
    assert set(load_file(merged / "model.safetensors")) == set(load_file(files / "model.safetensors"))
    plain, report = transformers.AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(log_probabilities(plain), log_probabilities(dequantized_model(out)))


@pytest.mark.parametrize("layout", ["gptq_v2", "compressed_tensors"])
def test_a_foreign_checkpoint_is_read_under_the_names_of_its_files(
    tmp_path: Path, wrapper: Any, layers: dict[str, Any], layout: str, log_probabilities: Any
) -> None:
    quantized(wrapper, layers, tmp_path / "out", layout)
    ours = Checkpoint.open(tmp_path / "out")
    expected = log_probabilities(dequantized_model(tmp_path / "out"))
    make_foreign(tmp_path / "out")
    foreign = Checkpoint.open(tmp_path / "out")
    assert not foreign.is_ours
    assert dict(foreign.specs) == dict(ours.specs)
    assert foreign.fingerprint == ours.fingerprint
    assert torch.equal(log_probabilities(dequantized_model(tmp_path / "out")), expected)
    examination = examine(tmp_path / "out")
    assert examination.readable
    assert not [suspicion for suspicion in examination.suspicions if suspicion.kind == "extra"]


@pytest.mark.parametrize("written_for", [IN_FILES, IN_MEMORY])
def test_rules_may_be_written_for_either_name(
    tmp_path: Path, wrapper: Any, layers: dict[str, Any], written_for: str
) -> None:
    quantized(wrapper, layers, tmp_path / "out")
    rule = {"bits": 3, "group_size": 32, "sym": False}
    escaped = written_for.replace(".", r"\.")
    make_foreign(tmp_path / "out", dynamic={f"+:^{escaped}$": rule})
    assert Checkpoint.open(tmp_path / "out").specs[IN_MEMORY].bits == 3


def test_rules_that_contradict_each_other_are_refused(tmp_path: Path, wrapper: Any, layers: dict[str, Any]) -> None:
    quantized(wrapper, layers, tmp_path / "out")
    rules = {
        f"+:^{name.replace('.', chr(92) + '.')}$": {"bits": bits, "group_size": 32, "sym": False}
        for name, bits in ((IN_FILES, 3), (IN_MEMORY, 2))
    }
    make_foreign(tmp_path / "out", dynamic=rules)
    with pytest.raises(FormatError, match=rf"gives {IN_FILES} one grid under this name and another as {IN_MEMORY}"):
        Checkpoint.open(tmp_path / "out")


def test_names_that_the_files_had_in_memory_form_stay(tmp_path: Path, wrapper: Any, files: Path) -> None:
    folder = Path(shutil.copytree(files, tmp_path / "new"))
    save_file(
        wrapper.state_dict() | {"lm_head.weight": torch.zeros(96, 64)}, folder / "model.safetensors", {"format": "pt"}
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert stored_names(loaded, loaded.state_dict(), []) == {}


def test_a_head_that_files_call_otherwise(tmp_path: Path, write_quantized: Any) -> None:
    written = write_quantized(tmp_path, "gpt_neox", QuantSpec(4, 32))
    assert "embed_out.weight" in load_file(written.folder / "model.safetensors")
    checkpoint = Checkpoint.open(written.folder)
    assert torch.equal(checkpoint.read("lm_head.weight"), written.source.lm_head.weight)
    # A file of an earlier version has the name in memory, and is read as well.
    tensors = load_file(written.folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    save_file(tensors, written.folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(load(written.folder).lm_head.weight, written.source.lm_head.weight)


def test_a_config_that_promises_too_many_modules_is_not_built(tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 10**9}
    assert names_in_memory(tmp_path, config, ["model.layers.0.mlp.up_proj.qweight"]) == {}
