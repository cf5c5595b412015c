"""The run directory: resume, refusal, lock, full disk, damage, kill."""

import json
import os
from pathlib import Path

import pytest
import torch
from run_layers import RECIPE, SOURCE, VERSIONS, make_certificate, make_layer, make_pair, rewrite, start

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.artifact.run_manifest import recipe_difference
from cloq_export.errors import FormatError, RunDirectoryError
from cloq_export.files.fingerprint import base_fingerprint, layer_digest
from cloq_export.files.safe_tensors import TensorFile
from cloq_export.recipe import Recipe


def test_layer_comes_back_as_it_was(tmp_path: Path) -> None:
    with start(tmp_path / "run") as run:
        run.write_layer("model.layers.0.q", make_layer(), make_pair(), make_certificate("model.layers.0.q"))
        run.write_layer("model.layers.0.k", make_layer(1))
    run = RunDirectory.open(tmp_path / "run")
    assert run.completed_modules() == {"model.layers.0.q", "model.layers.0.k"}
    stored = run.read_layer("model.layers.0.q")
    layer, pair = make_layer(), make_pair()
    assert torch.equal(stored.quantized.codes, layer.codes)
    assert torch.equal(stored.quantized.scales, layer.scales)
    assert torch.equal(stored.quantized.zeros, layer.zeros)
    assert stored.quantized.spec == layer.spec
    assert stored.lora is not None
    assert torch.equal(stored.lora.lora_A, pair.lora_A)
    assert torch.equal(stored.lora.lora_B, pair.lora_B)
    assert stored.lora.alpha == 4.0
    assert stored.certificate == make_certificate("model.layers.0.q")
    bare = run.read_layer("model.layers.0.k")
    assert bare.lora is None
    assert bare.certificate is None


def test_codes_pair_and_certificate_are_read_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    stock = TensorFile.read
    monkeypatch.setattr(TensorFile, "read", lambda self, name: read.append(name) or stock(self, name))
    with start(tmp_path) as run:
        run.write_layer("a", make_layer(), make_pair(), make_certificate("a"))
        assert run.digests() == {"a": layer_digest(make_layer())}
        assert run.base_fingerprint() == base_fingerprint([("a", make_layer())])
        assert run.certificates() == [make_certificate("a")]
        assert (run.layer_file("a").shape, run.layer_file("a").spec) == ((16, 32), make_layer().spec)
        assert read == []
        pair = run.read_pair("a")
        assert pair is not None
        assert torch.equal(pair.lora_A, make_pair().lora_A)
        assert read == ["lora_A", "lora_B"]
        assert torch.equal(run.read_codes("a").codes, make_layer().codes)
        assert read[2:] == ["codes", "scales", "zeros"]


def test_a_layer_of_before_has_its_digest_computed(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.write_layer("a", make_layer(), make_pair())
        rewrite(run.layer_path("a"), lambda tensors, metadata: metadata.pop("sha256"))
        assert run.digests() == {"a": layer_digest(make_layer())}
        assert torch.equal(run.read_layer("a").quantized.codes, make_layer().codes)


def test_manifest_and_state(tmp_path: Path) -> None:
    with start(tmp_path / "run") as run:
        assert run.state == "running"
        run.set_state("quantized")
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest == {
        "format": "cloq-run",
        "format_version": 1,
        "recipe": RECIPE,
        "source_fingerprint": SOURCE,
        "state": "quantized",
        "versions": VERSIONS,
    }
    again = RunDirectory.open(tmp_path / "run")
    assert again.manifest.to_json() == manifest
    assert again.state == "quantized"
    assert again.recipe == Recipe.from_mapping(RECIPE)
    assert again.source_fingerprint == SOURCE


def test_a_real_recipe_resumes(tmp_path: Path) -> None:
    recipe = Recipe.from_mapping({"model": "m", "overrides": {"*.down_proj": {"bits": 4}, "*": {"bits": 3}}})
    for _ in range(2):
        with RunDirectory.create_or_resume(tmp_path / "run", recipe.to_mapping(), SOURCE, VERSIONS) as run:
            assert run.recipe == recipe
            assert list(run.manifest.recipe)[:3] == ["model", "bits", "group_size"]


def test_resume_keeps_what_is_done(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.write_layer("a", make_layer())
        run.set_state("quantized")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with start(tmp_path) as run:
        assert run.completed_modules() == {"a"}
        assert run.state == "quantized"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_two_runs_have_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with start(tmp_path / name) as run:
            run.write_layer("a", make_layer(), make_pair(), make_certificate("a"))
            run.write_report("evaluation", {"float": {"perplexity": 29.6}})
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert [str(file) for file in files] == [".lock", "layers/a.safetensors", "reports/evaluation.json", "run.json"]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_other_recipe_is_refused_with_what_differs(tmp_path: Path) -> None:
    start(tmp_path).close()
    with pytest.raises(
        RunDirectoryError,
        match=r"holds another run: adapter_name: cloq in the run, mine asked; bits: 2 in the run, 3 asked\. Use the "
        r"run's own options to continue it, or choose another folder with `out`\.",
    ):
        start(tmp_path, bits=3, adapter_name="mine")
    with pytest.raises(RunDirectoryError, match="source model: sha256:aaaaaaaaaaaa… in the run, sha256:bbbbbbbbbbbb… "):
        RunDirectory.create_or_resume(tmp_path, RECIPE, "sha256:" + "b" * 64, VERSIONS)
    start(tmp_path).close()  # a refusal does not keep the lock


def test_options_that_do_not_change_the_bytes_may_change(tmp_path: Path) -> None:
    start(tmp_path, format="gptq_v2", eval_windows=16, max_shard_size="5GB").close()
    with start(tmp_path, format="gptq", eval_windows=4, max_shard_size="1GB") as run:
        assert run.recipe.format == "gptq"
    assert RunDirectory.open(tmp_path).recipe.eval_windows == 4


def test_difference_lines() -> None:
    held = {"bits": 2, "overrides": [{"pattern": "a"}], "old": True, "text": "", "eval_window": 3}
    asked = {"bits": 2, "overrides": [], "new": 0.5, "text": "x"}
    assert recipe_difference(held, asked) == [
        "new: not set in the run, 0.5 asked",
        "old: true in the run, not set asked",
        'overrides: [{"pattern": "a"}] in the run, [] asked',
        "text: empty in the run, x asked",
    ]


def test_other_versions_are_noted_once(tmp_path: Path) -> None:
    start(tmp_path).close()
    for _ in range(2):
        RunDirectory.create_or_resume(tmp_path, RECIPE, SOURCE, {"torch": "2.14.0"}).close()
    manifest = RunDirectory.open(tmp_path).manifest.to_json()
    assert manifest["versions"] == VERSIONS
    assert manifest["later_versions"] == [{"torch": "2.14.0"}]


def test_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "b", "c", "d"):
        (tmp_path / name).write_text("")
    with pytest.raises(RunDirectoryError, match=r"holds a\.txt, b, c and 1 more but no run\.json, so it is not a run"):
        start(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b", "c", "d"]
    with pytest.raises(RunDirectoryError, match=r"a\.txt is a file; choose a folder with `out`"):
        start(tmp_path / "a.txt")


def test_foreign_or_damaged_manifest(tmp_path: Path) -> None:
    manifest = tmp_path / "run.json"
    manifest.write_text("{}")
    with pytest.raises(RunDirectoryError, match=r"run\.json was not written by cloq"):
        start(tmp_path)
    manifest.write_text("{")
    with pytest.raises(FormatError, match=r"run\.json is not valid JSON"):
        RunDirectory.open(tmp_path)
    manifest.write_text('{"format": "cloq-run", "format_version": 99}')
    with pytest.raises(FormatError, match=r"has format version 99; this program reads 1"):
        RunDirectory.open(tmp_path)
    manifest.write_text('{"format": "cloq-run", "format_version": 1, "recipe": 3}')
    with pytest.raises(FormatError, match="lacks a valid 'recipe'"):
        RunDirectory.open(tmp_path)


def test_open_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"none does not exist, so it is not a run; make one with: cloq run"):
        RunDirectory.open(tmp_path / "none")
    with pytest.raises(RunDirectoryError, match=r"holds no run\.json, so it is not a run"):
        RunDirectory.open(tmp_path)


def test_second_writer_is_refused_and_readers_are_not(tmp_path: Path) -> None:
    with start(tmp_path):
        with pytest.raises(RunDirectoryError, match=rf"is in use by process {os.getpid()}; wait until it ends"):
            start(tmp_path)
        reader = RunDirectory.open(tmp_path)
        assert reader.completed_modules() == set()
        with pytest.raises(RunDirectoryError, match="is in use by process"):
            reader.write_report("x", {})
    reader.write_report("x", {"a": 1})
    with pytest.raises(RunDirectoryError, match="is in use by process"):
        start(tmp_path)
    reader.close()
    assert (tmp_path / ".lock").read_bytes() == b""


def test_late_writer_sees_the_newest_manifest(tmp_path: Path) -> None:
    start(tmp_path).close()
    reader = RunDirectory.open(tmp_path)
    with start(tmp_path) as writer:
        writer.set_state("quantized")
    assert reader.state == "running"
    reader.write_report("x", {})
    reader.close()
    assert reader.state == "quantized"
