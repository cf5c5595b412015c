"""The equality certificate: it says what was read back, and notices every change."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import jsonschema
import pytest
import torch

import cloq_export.artifact.certificate as certificate_module
from cloq_export.artifact.certificate import (
    CERTIFICATE_NAME,
    certify_checkpoint,
    same_bits,
    verify_certificate,
    verify_run,
)
from cloq_export.artifact.checkpoint_writer import FloatPart, LayerSource
from cloq_export.artifact.covered_files import FileEntry
from cloq_export.artifact.hub import is_left_out
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.errors import FormatError
from cloq_export.files.fingerprint import layer_digest
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.files.tensor_writer import write_safetensors
from cloq_export.formats.registry import LAYOUTS
from cloq_export.types import QuantSpec


def certified(write_quantized, folder, layout="gptq_v2", **options):
    written = write_quantized(folder, layout=LAYOUTS[layout], **options)
    layers = LayerSource.of_mapping(written.layers)
    floats = FloatPart.of_model(written.source, layers)
    certificate = certify_checkpoint(
        written.folder, layers, floats, base_fingerprint=written.fingerprint, facts={"forced": []}
    )
    return written, certificate


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_names_every_layer_and_file_and_can_be_repeated(tmp_path, write_quantized, layout, bits):
    spec = QuantSpec(bits, 32, LAYOUTS[layout].symmetric_only)
    written, certificate = certified(write_quantized, tmp_path, layout, spec=spec)
    assert json.loads((written.folder / CERTIFICATE_NAME).read_text()) == certificate.to_json()
    assert certificate.layout == layout
    assert certificate.base_fingerprint == written.fingerprint
    assert certificate.facts["forced"] == []
    assert {name: entry["sha256"] for name, entry in certificate.modules.items()} == {
        name: layer_digest(layer) for name, layer in written.layers.items()
    }
    assert set(certificate.files) == {path.name for path in written.folder.iterdir()} - {CERTIFICATE_NAME}
    schema = Path(certificate_module.__file__).with_name("certificate.schema.json")
    jsonschema.validate(certificate.to_json(), json.loads(schema.read_text()))
    repeated = verify_certificate(written.folder)
    assert repeated.modules == len(written.layers)
    assert repeated.files == len(certificate.files)
    assert repeated.not_covered == ()


@pytest.mark.parametrize("field", ["codes", "scales", "zeros"])
def test_a_layer_that_came_back_otherwise_is_refused(tmp_path, write_quantized, field):
    written = write_quantized(tmp_path)
    name = list(written.layers)[3]
    layer = written.layers[name]
    changed = getattr(layer, field).clone()
    if field == "scales":
        changed[1, 0] = torch.nextafter(changed[1, 0].float(), torch.tensor(9.0)).half() + 2**-12
    else:
        changed[1, 0] = layer.spec.max_code - changed[1, 0]
    meant = {**written.layers, name: dataclasses.replace(layer, **{field: changed})}
    with pytest.raises(FormatError, match=rf"{name}: the {field} read back differ from those written"):
        certify_checkpoint(written.folder, LayerSource.of_mapping(meant), None, base_fingerprint=written.fingerprint)
    assert not (written.folder / CERTIFICATE_NAME).exists()


def test_a_float_tensor_that_came_back_otherwise_is_refused(tmp_path, write_quantized):
    written = write_quantized(tmp_path)
    layers = LayerSource.of_mapping(written.layers)
    floats = FloatPart.of_model(written.source, layers)
    with torch.no_grad():
        written.source.model.norm.weight[3] += 1
    with pytest.raises(FormatError, match=r"model\.norm\.weight was read back with other numbers"):
        certify_checkpoint(written.folder, layers, floats, base_fingerprint=written.fingerprint)


def test_missing_modules_and_other_fingerprints_are_refused(tmp_path, write_quantized):
    written = write_quantized(tmp_path)
    layers = dict(written.layers)
    last = list(layers)[-1]
    layer = layers.pop(last)
    with pytest.raises(FormatError, match=f"differ in which modules they have: {last}"):
        certify_checkpoint(written.folder, LayerSource.of_mapping(layers), None, base_fingerprint=written.fingerprint)
    layers[last] = layer
    with pytest.raises(FormatError, match="and sha256:0 was to be written"):
        certify_checkpoint(written.folder, LayerSource.of_mapping(layers), None, base_fingerprint="sha256:0")


def test_every_change_is_noticed(tmp_path, write_quantized):
    written, certificate_of_it = certified(write_quantized, tmp_path)
    honest = certificate_of_it.to_json()
    name = next(iter(written.layers))

    def changed(change, message):
        folder = shutil.copytree(written.folder, tmp_path / "copy", dirs_exist_ok=True)
        change(folder)
        with pytest.raises(FormatError, match=message):
            verify_certificate(folder)
        shutil.rmtree(folder)

    def certificate(**fields):
        return lambda folder: (folder / CERTIFICATE_NAME).write_text(json.dumps({**honest, **fields}))

    def other_code(folder):
        tensors, metadata = read_safetensors(folder / "model.safetensors")
        held = {key: tensor.clone() for key, tensor in tensors.items()}
        held[f"{name}.qweight"][0, 0] ^= 1
        write_safetensors(folder / "model.safetensors", held, metadata)

    def other_code_and_hash(folder):
        other_code(folder)
        files = {**honest["files"], "model.safetensors": dataclasses.asdict(FileEntry.of(folder / "model.safetensors"))}
        certificate(files=files)(folder)

    changed(lambda folder: (folder / CERTIFICATE_NAME).unlink(), "has no cloq_certificate.json, so nothing says")
    changed(lambda folder: (folder / "config.json").unlink(), "lacks 'config.json', which its certificate names")
    changed(lambda folder: (folder / "config.json").write_text("{}"), "config.json is not the file that was certified")
    changed(other_code, "model.safetensors is not the file that was certified")
    changed(other_code_and_hash, f"the codes, scales or zeros of '{name}' are not those that were certified")
    changed(certificate(base_fingerprint="sha256:0"), "and its certificate 'sha256:0'; write the export again")
    changed(certificate(format_version=9), "this program reads 'cloq-certificate', version 1")
    changed(certificate(files={"../x": {"sha256": "0", "bytes": 1}}), "expected names inside the folder")
    changed(certificate(files={"x": 3}), "files has no hash for 'x'")
    changed(certificate(modules=[]), r"modules is \[\]; the file is damaged")


EXTRAS = {
    "notes.txt": r"notes\.txt is a file in the export and not in its certificate",
    "model-00002-of-00002.safetensors": "is a file in the export and not in its certificate, and engines may read it",
    "tokenizer.model": "is a file in the export",
    "modeling_x.py": "is a file in the export",
    "chat_template.jinja": "is a file in the export",
    "weights": "is a file in the export",
    ".hidden": "is a file in the export",
    ".cache/huggingface/download/a.py": "is a file in the export",
    "adapters/late/adapter_config.json": "late/adapter_config.json is a file in the export",
    "adapters/README.md": "README.md is a file in the export",
    "Config.json": "which names 'config.json', another file, and engines may read it",
    "README.MD": "is a file in the export",
}


@pytest.mark.parametrize("name", list(EXTRAS))
def test_whatever_lies_beside_what_was_certified_is_named(tmp_path, write_quantized, name):
    written, _ = certified(write_quantized, tmp_path)
    path = written.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    with pytest.raises(FormatError, match=EXTRAS[name]):
        verify_certificate(written.folder)


def test_the_card_may_be_edited_and_empty_folders_lie_there(tmp_path, write_quantized):
    written, _ = certified(write_quantized, tmp_path)
    (written.folder / "README.md").write_text("edited")
    (written.folder / "empty" / "folder").mkdir(parents=True)
    assert verify_certificate(written.folder).not_covered == ()


def test_files_of_the_hub_are_told_from_others_by_what_they_hold(tmp_path, write_quantized):
    written, _ = certified(write_quantized, tmp_path)
    attributes = written.folder / ".gitattributes"
    attributes.write_text("*.bin filter=lfs diff=lfs merge=lfs -text\n\n# more\n")
    record = written.folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    record.parent.mkdir(parents=True)
    record.write_text("0\n1\n2\n")
    noted = (".cache/huggingface/download/config.json.metadata", ".gitattributes")
    assert verify_certificate(written.folder).not_covered == noted
    attributes.write_text("import os\n")
    with pytest.raises(FormatError, match=r"\.gitattributes is a file in the export and not in its certificate"):
        verify_certificate(written.folder)


def test_what_an_upload_leaves_out_may_lie_there(tmp_path, write_quantized):
    written, _ = certified(write_quantized, tmp_path)
    (written.folder / ".git").mkdir()
    for name in (".DS_Store", ".git/config"):
        (written.folder / name).write_text("")
    with pytest.raises(FormatError, match=r"\.DS_Store is a file in the export"):
        verify_certificate(written.folder)
    assert verify_certificate(written.folder, left_out=is_left_out).not_covered == ()
    (written.folder / "more.py").write_text("")
    with pytest.raises(FormatError, match=r"more\.py is a file in the export"):
        verify_certificate(written.folder, left_out=is_left_out)


def test_links_and_devices_are_no_files_of_an_export(tmp_path, write_quantized):
    written, _ = certified(write_quantized, tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x").write_text("x")
    links = {
        "a": (outside / "x", "a is a link to a file in the export and not in its certificate"),
        "b": (outside, "b is a link to a folder in the export and not in its certificate"),
        "c": (tmp_path / "nowhere", "c is a link that leads nowhere in the export"),
        "d": (written.folder / "config.json", "d is a link to a file in the export"),
        "e": (written.folder, "e is a link to a folder in the export"),
        "f": (written.folder / "f", "f is a link that leads nowhere in the export"),
    }
    for name, (target, message) in links.items():
        link = written.folder / name
        link.symlink_to(target)
        with pytest.raises(FormatError, match=message):
            verify_certificate(written.folder)
        link.unlink()
    os.mkfifo(written.folder / "pipe")
    with pytest.raises(FormatError, match="pipe is a device, pipe or socket in the export"):
        verify_certificate(written.folder)
    (written.folder / "pipe").unlink()
    assert verify_certificate(written.folder).not_covered == ()


def test_a_certified_file_that_became_a_link_is_refused(tmp_path, write_quantized):
    written, _ = certified(write_quantized, tmp_path)
    path = written.folder / "config.json"
    path.rename(tmp_path / "config.json")
    path.symlink_to(tmp_path / "config.json")
    with pytest.raises(FormatError, match="leads out of"):
        verify_certificate(written.folder)
    path.unlink()
    (tmp_path / "config.json").rename(path)
    (written.folder / "README.md").symlink_to(path)
    with pytest.raises(FormatError, match=r"README\.md is a link to a file, and what it leads to may change"):
        verify_certificate(written.folder)


def test_names_in_another_normal_form_are_other_names(tmp_path, write_quantized):
    written, certificate = certified(write_quantized, tmp_path)
    composed, apart = "caf\u00e9.json", "cafe\u0301.json"
    (written.folder / composed).write_text("{}")
    entry = {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    honest = certificate.to_json()
    files = {**honest["files"], composed: entry}
    (written.folder / CERTIFICATE_NAME).write_text(json.dumps({**honest, "files": files}))
    verify_certificate(written.folder)
    (written.folder / apart).write_text("{}")
    with pytest.raises(FormatError, match=r"'cafe\\u0301.json' is a file .* which names 'caf\\xe9.json', another file"):
        verify_certificate(written.folder)
    (written.folder / composed).unlink()
    with pytest.raises(FormatError, match=r"'cafe\\u0301.json' is a file"):
        verify_certificate(written.folder)


def test_a_snapshot_of_the_hub_holds_links_into_its_blobs(tmp_path, write_quantized):
    written, _ = certified(write_quantized, tmp_path)
    home = tmp_path / "models--a--b"
    snapshot = home / "snapshots" / "0123"
    (home / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(written.folder.iterdir())):
        shutil.copy(path, home / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert verify_certificate(snapshot).not_covered == ()
    (home / "blobs" / "other").write_text("{}")
    (snapshot / "more.json").symlink_to("../../blobs/other")
    with pytest.raises(FormatError, match=r"more\.json is a link to a file in the export and not in its certificate"):
        verify_certificate(snapshot)
    (snapshot / "more.json").unlink()
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../blobs/other")
    with pytest.raises(FormatError, match=r"config\.json is not the file that was certified"):
        verify_certificate(snapshot)


def test_bits_are_compared_and_not_numbers():
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
    assert not same_bits(torch.ones(2), torch.ones(1, 2))
    assert not same_bits(torch.ones(2), torch.ones(2, dtype=torch.float16))
    assert same_bits(torch.empty(0), torch.empty(0))


def test_files_in_folders_are_certified_like_the_others(tmp_path, write_quantized):
    written = write_quantized(tmp_path)
    template = written.folder / "additional_chat_templates" / "tool_use.jinja"
    template.parent.mkdir()
    template.write_text("{{ messages }}")
    layers = LayerSource.of_mapping(written.layers)
    certificate = certify_checkpoint(written.folder, layers, None, base_fingerprint=written.fingerprint)
    assert "additional_chat_templates/tool_use.jinja" in certificate.files
    template.write_text("{{ others }}")
    with pytest.raises(FormatError, match=r"tool_use\.jinja is not the file that was certified"):
        verify_certificate(written.folder)
    template.write_text("{{ messages }}")
    assert verify_certificate(written.folder).not_covered == ()


@pytest.mark.parametrize("name", ["vocab.txt", "qwen.tiktoken", "additional_chat_templates/late.jinja", "LICENSE.txt"])
def test_a_file_that_would_travel_may_not_be_added(tmp_path, write_quantized, name):
    written, _ = certified(write_quantized, tmp_path)
    (written.folder / name).parent.mkdir(exist_ok=True)
    (written.folder / name).write_text("added")
    with pytest.raises(FormatError, match="is a file in the export and not in its certificate"):
        verify_certificate(written.folder)


def test_what_lies_beside_the_checkpoint_of_a_run_is_named(tmp_path, write_quantized):
    written, _ = certified(write_quantized, tmp_path)
    with RunDirectory.create_or_resume(tmp_path / "run", {"model": "m"}, "sha256:1", {}) as run:
        for name, layer in written.layers.items():
            run.write_layer(name, layer)
        shutil.copytree(written.folder, run.checkpoint_path)
    assert verify_run(run).digests == run.digests()
    (run.checkpoint_path / "more.json").write_text("{}")
    with pytest.raises(FormatError, match=r"checkpoint/more\.json is a file in the export and not in its certificate"):
        verify_run(run)
    (run.checkpoint_path / CERTIFICATE_NAME).unlink()
    assert verify_run(run).modules == len(written.layers)
