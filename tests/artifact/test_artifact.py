"""What a folder is, asked in one place."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from cloq_export.artifact.artifact import Artifact
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.errors import FormatError


def test_a_run_gives_what_it_keeps(tmp_path, written):
    with RunDirectory.create_or_resume(tmp_path / "run", {"model": "m"}, "sha256:1", {}) as run:
        for name, layer in written.layers.items():
            run.write_layer(name, layer, written.pairs[name])
    artifact = Artifact.open(run.path)
    assert artifact.kind == "run"
    assert artifact.run is not None
    assert artifact.fingerprint == written.fingerprint
    assert set(artifact.layers.specs) == set(written.layers)
    with pytest.raises(FormatError, match="is a run without a checkpoint yet; write it with: cloq export"):
        artifact.checkpoint_folder  # noqa: B018
    shutil.copytree(written.folder, run.checkpoint_path)
    assert artifact.checkpoint_folder == run.checkpoint_path
    assert artifact.base is artifact.checkpoint


def test_a_checkpoint_gives_layers_floats_and_adapters(tmp_path, written):
    folder = shutil.copytree(written.folder, tmp_path / "export")
    shutil.copytree(written.adapter, folder / "adapters" / "cloq")
    artifact = Artifact.open(folder)
    assert (artifact.kind, artifact.run, artifact.fingerprint) == ("checkpoint", None, written.fingerprint)
    assert artifact.adapters.names == ["cloq"]
    name, layer = next(iter(written.layers.items()))
    assert torch.equal(artifact.layers.read(name).codes, layer.codes)
    floats = artifact.floats
    assert set(floats.headers) == set(artifact.checkpoint.float_names())
    embeddings = written.source.get_input_embeddings().weight
    assert torch.equal(floats.read("model.embed_tokens.weight"), embeddings)


@pytest.mark.parametrize(
    ("file", "content", "kind"),
    [
        ("adapter_config.json", {}, "adapter"),
        ("cloq_onnx.json", {"format": "cloq-onnx"}, "onnx export"),
        ("cloq_onnx.json", {"format": "other"}, "unknown"),
        ("adapter.onnx_adapter", {}, "onnx adapter"),
        ("config.json", {}, "checkpoint"),
        ("run.json", {}, "run"),
        ("README.md", {}, "unknown"),
    ],
)
def test_a_folder_is_what_its_files_mark_it_as(tmp_path, file, content, kind):
    (tmp_path / file).write_text(json.dumps(content))
    assert Artifact.open(tmp_path).kind == kind
    assert Artifact.open(tmp_path / "nothing").kind == "unknown"
