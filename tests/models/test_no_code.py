"""No code that comes with a model is run, asked for or fetched, whoever reads what of it."""

from __future__ import annotations

import ast
import builtins
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloq_export.errors import SourceError, UnsupportedModelError
from cloq_export.models.library_calls import NO_CODE
from cloq_export.models.source import open_model
from cloq_export.models.tokenizer_files import read_tokenizer

# Readers of transformers, and of libraries built on it, that look for the code of a model.
READERS = {"from_pretrained", "from_config"}
# PEFT's read JSON and weights of a local folder.
WITHOUT_CODE = {"LoraConfig", "PeftModel"}


def calls() -> Iterator[tuple[str, ast.Call]]:
    spec = importlib.util.find_spec("cloq_export")
    assert spec is not None
    for home in spec.submodule_search_locations or ():
        # Path.rglob does not follow links, and a source tree may be linked together.
        for folder, _, names in os.walk(home, followlinks=True):
            for path in (Path(folder) / name for name in names if name.endswith(".py")):
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                    function = getattr(node, "func", None)
                    if isinstance(node, ast.Call) and isinstance(function, ast.Attribute) and function.attr in READERS:
                        yield f"{path.name}:{node.lineno}", node


def test_every_call_of_a_reader_says_that_no_code_is_run() -> None:
    found = dict(calls())
    assert len(found) > 5
    for place, node in found.items():
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        if owner.rpartition(".")[2] in WITHOUT_CODE:
            continue
        options = {keyword.arg or ast.unparse(keyword.value): ast.unparse(keyword.value) for keyword in node.keywords}
        assert options.get("trust_remote_code") == "False" or "NO_CODE" in options, place


def test_the_shared_options_say_it() -> None:
    assert NO_CODE == {"trust_remote_code": False, "local_files_only": True}


@pytest.fixture(autouse=True)
def _no_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object) -> str:
        raise AssertionError("a question on standard input")

    monkeypatch.setattr(builtins, "input", ask)


@pytest.fixture
def folder(write_model: Callable[[str], Path]) -> Path:
    """A model whose files name code, which tells when it is run."""
    folder = write_model("llama")
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nraise SystemExit\n")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text((folder / "code.py").read_text())
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("prefix", ["", "someone/else--"])
def test_a_family_that_transformers_knows_is_read_without_its_code(folder: Path, prefix: str) -> None:
    edit(folder / "config.json", auto_map={"AutoConfig": f"{prefix}code.A", "AutoModelForCausalLM": f"{prefix}code.B"})
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, f"{prefix}code.C"]})
    loaded = open_model(str(folder))
    assert type(loaded.model).__module__ == "transformers.models.llama.modeling_llama"
    assert loaded.tokenizer("w5")["input_ids"] == [5]
    assert not (folder / "ran").exists()


def test_a_family_that_only_its_code_knows_is_refused(folder: Path) -> None:
    edit(folder / "config.json", model_type="unheard-of", auto_map={"AutoConfig": "code.A"})
    with pytest.raises(UnsupportedModelError, match="needs Python code from its own repository") as error:
        open_model(str(folder))
    assert "\n" not in str(error.value)
    assert not (folder / "ran").exists()


def test_a_tokenizer_that_only_its_code_knows_is_refused(folder: Path) -> None:
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="UnheardOfTokenizer",
        auto_map={"AutoTokenizer": ["code.C", None]},
    )
    with pytest.raises(UnsupportedModelError, match="needs Python code from its own repository"):
        read_tokenizer(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("kept", [(), ("tokenizer_config.json",), ("special_tokens_map.json",)])
def test_a_missing_tokenizer_is_one_line_and_no_empty_vocabulary(folder: Path, kept: tuple[str, ...]) -> None:
    for path in folder.glob("*token*"):
        if path.name not in kept:
            path.unlink()
    with pytest.raises(SourceError, match=r"the tokenizer of .* holds no tokenizer\.json and no other") as error:
        read_tokenizer(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_that_a_config_would_fetch_are_refused(folder: Path, key: str) -> None:
    edit(folder / "config.json", **{key: "owner/kernels"})
    with pytest.raises(UnsupportedModelError, match=f"sets {key} to 'owner/kernels', which transformers would fetch"):
        open_model(str(folder))
    edit(folder / "config.json", **{key: None}, text_config={key: {"full": "owner/kernels@v1"}})
    with pytest.raises(UnsupportedModelError, match="no code of a model is run"):
        open_model(str(folder))
