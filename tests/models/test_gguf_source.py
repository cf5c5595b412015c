"""Opening GGUF files, and what is said about those that cannot be opened."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from cloq_export.errors import MissingPackageError, SourceError, UnsupportedModelError
from cloq_export.models.saving import save_source_files
from cloq_export.models.source import find_source, open_model


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as llama.cpp would write it, with a byte-level tokenizer of single letters."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    width, inner, layers, words = 32, 64, 2, 96
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(words)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(chr(33 + number) for number in range(words - 4)), "he"])
    writer.add_token_types([3, 3, 3] + [1] * (words - 3))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    generator = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, generator.normal(scale=0.1, size=shape).astype(np.float32))

    add("token_embd.weight", words, width)
    add("output_norm.weight", width)
    for layer in range(layers):
        for name, shape in {
            "attn_norm": (width,),
            "attn_q": (width, width),
            "attn_k": (width // 2, width),
            "attn_v": (width // 2, width),
            "attn_output": (width, width),
            "ffn_norm": (width,),
            "ffn_gate": (inner, width),
            "ffn_up": (inner, width),
            "ffn_down": (width, inner),
        }.items():
            add(f"blk.{layer}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_opened_and_can_be_saved_as_a_folder(
    gguf_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = open_model(str(gguf_file))
    assert capfd.readouterr().err == ""
    assert loaded.source.kind == "gguf"
    assert loaded.source.weights == (gguf_file,)
    assert loaded.model.config.num_hidden_layers == 2
    assert loaded.tokenizer("abc", add_special_tokens=False)["input_ids"] == [ord(letter) - 30 for letter in "abc"]

    names = save_source_files(loaded, tmp_path)
    assert {"config.json", "tokenizer.json"} <= set(names)
    assert str(gguf_file.parent) not in (tmp_path / "config.json").read_text()
    loaded.model.save_pretrained(tmp_path / "weights")
    shutil.copy(tmp_path / "weights" / "model.safetensors", tmp_path)
    again = open_model(str(tmp_path))
    ids = torch.arange(3, 19).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, loaded.model(ids).logits)
    assert again.tokenizer("he!")["input_ids"] == loaded.tokenizer("he!")["input_ids"]


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.3, 0.9, 0.9999])
def test_truncated_gguf_files_are_refused(gguf_file: Path, tmp_path: Path, share: float) -> None:
    data = gguf_file.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(SourceError, match=r"the weights of .*cut\.gguf cannot be read .*truncated, damaged") as error:
        open_model(str(path))
    one_line(error)


def test_a_gguf_of_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(path, "no-such-type")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        UnsupportedModelError, match="no causal language model that the installed transformers"
    ) as error:
        open_model(str(path))
    one_line(error)


def test_a_gguf_file_cannot_be_streamed(gguf_file: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="it is a GGUF file, which transformers decodes whole") as error:
        open_model(str(gguf_file), stream="always")
    assert "`stream=never`" in one_line(error)


def test_gguf_without_its_package_names_the_extra(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"needs the package gguf; .*pip install cloq-export\[demo\]"):
        find_source(str(gguf_file))
