"""What travels with a model beside its weights, by kind and not by name."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pytest

import cloq_export.models.companions as companions_module
from cloq_export.errors import FormatError, SourceError
from cloq_export.files.fingerprint import file_digests, file_fingerprint
from cloq_export.models.companions import companion_files, copy_companions, hub_patterns, is_companion, is_legal

TRAVEL = [
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v3", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "dict.txt", "bpe.codes"),
    *("spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm", "qwen.tiktoken", "tekken.json"),
    *("normalizer.json", "byte_maps.json", "emoji.json", "entity_vocab.json", "prophetnet.tokenizer"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("audio_tokenizer_config.json", "generation_config.json", "chat_template.jinja", "chat_template.json"),
    *("additional_chat_templates/tool_use.jinja", "decoder_tokenizer/tokenizer.json", "decoder_tokenizer/vocab.txt"),
    *("LICENSE", "LICENSE.md", "LICENCE.txt", "Notice", "USE_POLICY.md", "Gemma Terms of Use.pdf", "COPYING"),
]
STAY = [
    *("config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "consolidated.00.pth"),
    *("model.gguf", "model.onnx", "tokenizer.pkl", "tokenizer.py", "tokenization_x.py", "modeling_x.py", "license.py"),
    *("README.md", "readme.txt", ".env", ".gitattributes", "notes.txt", "requirements.txt", "data.jsonl", "run.json"),
    *("quantize_config.json", "hf_quant_config.json", "adapter_config.json", "params.json", "trainer_state.json"),
    *("eval_results.json", "cloq_certificate.json", "credentials.json", "training_args.bin", "tokenizer.tar.gz"),
    *("additional_chat_templates/run.py", "original/tokenizer.model", "original/params.json", "tower/config.json"),
    *("tower/tokenizer.json", "notes/plan.json", ".cache/tokenizer.json", "decoder_tokenizer/deep/vocab.txt"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    home = tmp_path / "model"
    for name in (*TRAVEL, *STAY):
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return home


def test_files_travel_by_their_kind(folder: Path, tmp_path: Path) -> None:
    found = companion_files(folder)
    assert {path.relative_to(folder).as_posix() for path in found} == set(TRAVEL)
    out = tmp_path / "out"
    out.mkdir()
    assert copy_companions(folder, found, out) == sorted(TRAVEL)
    assert {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*") if path.is_file()} == {
        name: name for name in TRAVEL
    }


def test_the_hub_is_asked_for_what_would_travel() -> None:
    wanted, left = hub_patterns()

    def is_fetched(name: str) -> bool:
        asked, refused = (any(fnmatch.fnmatch(name, pattern) for pattern in each) for each in (wanted, left))
        return asked and not refused

    assert [name for name in TRAVEL if not is_fetched(name)] == []
    dangerous = [
        name for name in STAY if name.endswith((".py", ".bin", ".pth", ".pkl", ".gguf", ".onnx", ".safetensors"))
    ]
    assert [name for name in dangerous if is_fetched(name)] == []


def test_every_vocabulary_file_that_transformers_names_travels() -> None:
    from transformers.models.auto import tokenization_auto

    names: set[str] = set()
    for class_name in set(filter(None, tokenization_auto.TOKENIZER_MAPPING_NAMES.values())):
        try:
            found = tokenization_auto.tokenizer_class_from_name(class_name)
            names |= {name for name in getattr(found, "vocab_files_names", {}).values() if name}
        except ImportError:  # of an optional package
            continue
    assert len(names) > 10
    assert sorted(name for name in names if not is_companion(name)) == []


@pytest.mark.parametrize("name", ["LICENSE", "License.txt", "NOTICE", "use_policy.md"])
def test_legal_files_are_known(name: str) -> None:
    assert is_legal(name)
    assert not is_legal("vocab.txt")
    assert not is_legal("license.json")


def test_a_file_that_is_larger_than_its_kind_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companions_module, "MAX_BYTES", 2**20)
    (folder / "huge.json").write_bytes(bytes(2**20 + 1))
    with pytest.raises(SourceError, match=r"huge\.json has 1 MiB; .*Take the file out"):
        companion_files(folder)


@pytest.mark.parametrize("name", ["secrets.jinja", "additional_chat_templates/other.jinja"])
def test_a_link_to_somewhere_else_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "private").write_text("mine")
    (folder / name).symlink_to(tmp_path / "private")
    with pytest.raises(FormatError, match="is a link that leads out of"):
        companion_files(folder)


def test_a_folder_of_links_to_one_model_and_the_hubs_cache_are_fine(folder: Path, tmp_path: Path) -> None:
    farm = tmp_path / "farm"
    farm.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (farm / name).symlink_to(folder / name)
    assert companion_files(farm) == [farm / "tokenizer.json"]
    # A cache whose blobs lie on another disk.
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "123").write_text("{}")
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--x" / "blobs").symlink_to(tmp_path / "disk")
    for name in ("config.json", "vocab.json"):
        (snapshot / name).symlink_to("../../blobs/123")
    assert companion_files(snapshot) == [snapshot / "vocab.json"]


def test_a_fingerprint_tells_where_in_the_folder_a_file_lies(folder: Path) -> None:
    one, other = folder / "vocab.txt", folder / "decoder_tokenizer" / "vocab.txt"
    other.write_text(one.read_text())
    assert file_fingerprint(file_digests([one])) == file_fingerprint(file_digests([other]))
    assert file_fingerprint(file_digests([one], home=folder)) == file_fingerprint(file_digests([one]))
    assert file_fingerprint(file_digests([other], home=folder)) != file_fingerprint(file_digests([one], home=folder))


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "chat_template.jinja"])
def test_a_byte_order_mark_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"\xef\xbb\xbf{}")
    with pytest.raises(FormatError, match=rf"{name} begins with a byte order mark of UTF-8; .* Save the file as UTF-8"):
        companion_files(folder)
