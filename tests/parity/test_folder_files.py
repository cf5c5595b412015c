"""What lies in the folders of an export and its adapters beside what the gate compares."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cloq_export.formats.peft import read_adapter, write_adapter
from cloq_export.parity.adapter_folder import judge_folder
from cloq_export.parity.folder_files import compare_files
from cloq_export.parity.provenance import CONTRADICTED, PROVEN
from cloq_export.types import LoraPair

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
TOKENIZER = {"version": "1.0", "truncation": None, "padding": None, "model": {}}
Change = Callable[[Path], object]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A float model's folder, as far as its files are compared."""
    folder = tmp_path / "float"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER), encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    (folder / "LICENSE").write_text("as you like", encoding="utf-8")
    return folder


@pytest.fixture
def export(tmp_path: Path, home: Path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    for path in home.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    own = ("config.json", "model.safetensors", "cloq_certificate.json", "README.md", "tokenizer_config.json")
    for name in (*own, "adapters/one/adapter_model.bin", ".cache/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}", encoding="utf-8")
    return folder


def compared(export: Path, home: Path, kind: str = "folder", weights: tuple[str, ...] = ("model.safetensors",)) -> Any:
    checkpoint = SimpleNamespace(
        folder=export, files={name: SimpleNamespace(path=export / name) for name in weights}, layout_name="gptq_v2"
    )
    tokenizer = SimpleNamespace(vocab_files_names={"vocab_file": "vocab.txt"})
    loaded = SimpleNamespace(tokenizer=tokenizer, source=SimpleNamespace(kind=kind, folder=home))
    return compare_files(checkpoint, loaded)  # type: ignore[arg-type]


def test_files_that_are_compared_or_the_float_models_own_are_proven(export: Path, home: Path) -> None:
    assert compared(export, home).verdict == PROVEN
    # A licence is read by nobody who serves.
    (export / "LICENSE").write_text("never", encoding="utf-8")
    assert compared(export, home).verdict == PROVEN


def test_shards_need_their_index(export: Path, home: Path) -> None:
    (export / "model.safetensors").rename(export / "model-00001-of-00001.safetensors")
    (export / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    assert compared(export, home, weights=("model-00001-of-00001.safetensors",)).verdict == PROVEN


def test_the_vocabulary_that_a_tokenizer_is_read_from_is_compared_as_a_tokenizer(export: Path, home: Path) -> None:
    (export / "vocab.txt").write_text("a\nb\n", encoding="utf-8")
    assert "'vocab.txt' is not among the float model's files" in compared(export, home).reason
    (export / "tokenizer.json").unlink()
    assert compared(export, home).verdict == PROVEN


OTHER_FILES: dict[str, tuple[Change, str]] = {
    "weights under another name": (
        lambda folder: (folder / "consolidated.safetensors").write_bytes(b"x"),
        "'consolidated.safetensors' is none of the files that were compared",
    ),
    "weights of the float model": (
        lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"),
        "'pytorch_model.bin' is none of the files that were compared",
    ),
    "an adapter beside the config": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "'adapter_config.json' is none of the files that were compared",
    ),
    "another vocabulary": (
        lambda folder: (folder / "tokenizer.model").write_bytes(b"others"),
        "'tokenizer.model' is not the float model's",
    ),
    "a template for processors": (
        lambda folder: (folder / "chat_template.json").write_text("{}"),
        "'chat_template.json' is not among the float model's files",
    ),
    "an invisible letter": (
        lambda folder: (folder / "vocab\u200b.json").write_text("{}"),
        r"'vocab\u200b.json' is not among the float model's files",
    ),
    "texts that are cut": (
        lambda folder: (folder / "tokenizer.json").write_text(
            json.dumps({**TOKENIZER, "truncation": {"max_length": 8}})
        ),
        "tokenizer.json sets truncation for every text",
    ),
    "an end token that is added": (
        lambda folder: (folder / "tokenizer_config.json").write_text('{"add_eos_token": true}'),
        "tokenizer_config.json says add_eos_token True, and the float model's says None",
    ),
    "texts that are filled up": (
        lambda folder: (folder / "tokenizer.json").write_text(json.dumps({**TOKENIZER, "padding": {"pad_id": 0}})),
        "tokenizer.json sets padding for every text",
    ),
}


@pytest.mark.parametrize("fault", OTHER_FILES)
def test_files_that_engines_may_read_are_named(export: Path, home: Path, fault: str) -> None:
    change, said = OTHER_FILES[fault]
    change(export)
    finding = compared(export, home)
    assert finding.verdict == CONTRADICTED
    assert said in finding.reason


def test_truncation_of_the_float_model_itself_is_no_fault(export: Path, home: Path) -> None:
    cut = {**TOKENIZER, "truncation": {"max_length": 8}}
    (home / "tokenizer.json").write_text(json.dumps(cut), encoding="utf-8")
    assert compared(export, home).verdict == PROVEN  # it is set anew, or not at all
    (export / "tokenizer.json").write_text(json.dumps(cut, indent=1), encoding="utf-8")
    assert compared(export, home).verdict == PROVEN


def test_a_gguf_file_brings_no_files_along(export: Path, home: Path) -> None:
    reason = compared(export, home, kind="gguf").reason
    assert "'preprocessor_config.json' is not among the float model's files" in reason


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    pairs = {module: LoraPair(torch.ones(2, 8), torch.ones(8, 2), 2.0) for module in MODULES}
    write_adapter(folder, pairs, base_model="org/model", base_fingerprint="sha256:00")
    return folder


def _rename(front: str, ending: str) -> Change:
    def change(folder: Path) -> None:
        from cloq_export.files.safe_tensors import read_safetensors
        from cloq_export.files.tensor_writer import write_safetensors

        tensors, metadata = read_safetensors(folder / "adapter_model.safetensors")
        bare = {name.removeprefix("base_model.model.").removesuffix(".weight"): held for name, held in tensors.items()}
        renamed = {f"{front}{name}{ending}": held.clone() for name, held in bare.items()}
        write_safetensors(folder / "adapter_model.safetensors", renamed, metadata)

    return change


def _configure(**values: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")

    return change


def test_an_adapter_as_it_was_written_is_no_finding(adapter: Path, home: Path) -> None:
    assert judge_folder("mine", adapter, read_adapter(adapter), home) == []
    # A trainer may have saved the tokenizer too.
    (adapter / "tokenizer.json").write_bytes((home / "tokenizer.json").read_bytes())
    assert judge_folder("mine", adapter, read_adapter(adapter), home) == []


OTHER_ADAPTERS: dict[str, tuple[Change, str]] = {
    "no prefix": (_rename("", ".weight"), "a name that PEFT does not look for"),
    "an adapter's name": (_rename("base_model.model.", ".default.weight"), "a name that PEFT does not look for"),
    "a classifier": (_configure(task_type="SEQ_CLS"), "task_type 'SEQ_CLS'"),
    "a pickle": (lambda folder: (folder / "adapter_model.bin").write_bytes(b"x"), "'adapter_model.bin' too"),
    "another tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "'tokenizer.json' too"),
}


@pytest.mark.parametrize("fault", OTHER_ADAPTERS)
def test_what_others_would_read_otherwise_is_named(adapter: Path, home: Path, fault: str) -> None:
    change, said = OTHER_ADAPTERS[fault]
    change(adapter)
    [finding] = judge_folder("mine", adapter, read_adapter(adapter), home)
    assert (finding.what, finding.verdict) == ("adapter mine", CONTRADICTED)
    assert said in finding.reason
