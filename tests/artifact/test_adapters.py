"""The shelf of adapters: what lies on it, what is left out and said, and what is bound to which base."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from cloq_export.artifact.adapters import (
    AdapterShelf,
    carried_note,
    forced_note,
    read_bound_adapter,
)
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.errors import BindingError, FormatError, RunDirectoryError
from cloq_export.formats.onnx.record import ADAPTER_NAME, RECORD_FORMAT, RECORD_NAME


@pytest.fixture
def run(tmp_path, written):
    with RunDirectory.create_or_resume(tmp_path / "run", {"model": "m"}, "sha256:1", {}) as run:
        shutil.copytree(written.folder, run.checkpoint_path)
        shutil.copytree(written.adapter, run.adapter_path("cloq"))
        shutil.copytree(written.adapter, run.adapter_path("b"))
        run.adapter_path("stray").mkdir()
        (run.adapter_path("stray") / "notes.txt").write_text("")
        (run.path / "adapters" / ".c.0123abcd.partial").mkdir()
        (run.path / "adapters" / "README").write_text("")
    return run


def test_a_folder_that_holds_no_adapter_is_left_out_and_said(run):
    shelf = AdapterShelf.of(run.path)
    assert shelf.folders == {"b": run.adapter_path("b"), "cloq": run.adapter_path("cloq")}
    assert shelf == run.adapters
    (note,) = shelf.notes
    assert note.startswith(
        f"{run.adapter_path('stray')} holds no adapter_config.json, so it is no adapter and was left"
    )
    assert AdapterShelf.of(run.checkpoint_path) == AdapterShelf(run.checkpoint_path, {}, ())


def test_an_adapter_is_found_by_its_name_or_its_folder(run, written):
    shelf = AdapterShelf.of(run.path)
    assert shelf.find("cloq") == run.adapter_path("cloq")
    assert shelf.find(str(written.adapter)) == shelf.find(written.adapter) == written.adapter
    with pytest.raises(RunDirectoryError, match=r"has no adapter 'ghost'; it has b, cloq\. Give one of these, or an "):
        shelf.find("ghost")
    with pytest.raises(FormatError, match=r"adapters/stray is no adapter folder; give the folder that holds adapter_"):
        shelf.find("stray")
    with pytest.raises(FormatError, match=r"ghost is no adapter folder; give the folder that holds adapter_config"):
        AdapterShelf.of(run.checkpoint_path).find("ghost")


def test_onnx_exports_hold_adapters_of_their_own_kind(tmp_path):
    (tmp_path / RECORD_NAME).write_text(json.dumps({"format": RECORD_FORMAT}))
    (tmp_path / "adapters" / "a").mkdir(parents=True)
    (tmp_path / "adapters" / "a" / ADAPTER_NAME).write_bytes(b"")
    shelf = AdapterShelf.of(tmp_path)
    assert shelf.names == ["a"]
    assert shelf.find("a") == shelf.find(tmp_path / "adapters" / "a") == tmp_path / "adapters" / "a"
    with pytest.raises(FormatError, match=r"none is no adapter in .* or the folder that holds adapter\.onnx_ada"):
        shelf.find("none")
    (tmp_path / RECORD_NAME).unlink()
    assert AdapterShelf.of(tmp_path).notes[0].startswith(f"{tmp_path / 'adapters' / 'a'} holds no adapter_config.json")


def rebound(written, folder, fingerprint):
    folder = shutil.copytree(written.adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    if fingerprint is None:
        (folder / "cloq_adapter.json").unlink()
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder
    binding = json.loads((folder / "cloq_adapter.json").read_text())
    (folder / "cloq_adapter.json").write_text(json.dumps({**binding, "base_fingerprint": fingerprint}))
    save_file(tensors, folder / "adapter_model.safetensors", {"cloq_base_fingerprint": fingerprint})
    return folder


def test_an_adapter_of_another_base_is_refused_or_taken_by_force(tmp_path, written):
    base = Checkpoint.open(written.folder)
    assert set(read_bound_adapter(written.adapter, base, force=False).pairs) == set(written.pairs)
    assert forced_note("mine", written.fingerprint, base) is None
    other, bare = rebound(written, tmp_path / "other", "sha256:0"), rebound(written, tmp_path / "bare", None)
    for folder, message, note in (
        (other, "is bound to the base sha256:0, but .*cloq adapt.*`force`", "bound to sha256:0, not to"),
        (bare, "does not say which quantized base it belongs to; .*`force`", "bound to no base, not to"),
    ):
        with pytest.raises(BindingError, match=message):
            read_bound_adapter(folder, base, force=False)
        taken = read_bound_adapter(folder, base, force=True)
        assert note in str(forced_note("mine", taken.base_fingerprint, base))


def test_what_an_adapters_folder_carries_beside_it_is_said(tmp_path, written):
    folder = shutil.copytree(written.adapter, tmp_path / "mine")
    for name in ("README.md", "optimizer.pt", "trainer_state.json"):
        (folder / name).write_text("")
    assert carried_note("mine", folder) is None
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "new_embeddings.safetensors",
        "adapter_model.bin",
        "vocab.txt",
    ):
        (folder / name).write_text("")
    note = carried_note("mine", folder)
    assert note is not None
    assert "holds more than an adapter: 'adapter_model.bin', 'chat_template.jinja', " in note
    assert "'tokenizer.json' and more. A and B alone are read" in note
