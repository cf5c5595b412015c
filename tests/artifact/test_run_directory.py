"""The run directory: resume, refusal, lock, full disk, damage, kill."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.artifact.run_layers import natural_order
from cloq_export.artifact.run_manifest import recipe_difference
from cloq_export.errors import FormatError, RunDirectoryError
from cloq_export.files.fingerprint import base_fingerprint, layer_digest
from cloq_export.files.safe_tensors import TensorFile, read_safetensors
from cloq_export.files.tensor_writer import write_safetensors
from cloq_export.recipe import Recipe
from cloq_export.types import LayerCertificate, LoraPair, QuantizedLayer, QuantSpec

RECIPE = {"model": "tiny", "bits": 2, "rank": 4, "overrides": [], "adapter_name": "cloq"}
SOURCE = "sha256:" + "a" * 64
VERSIONS = {"torch": "2.13.0"}


def start(path: Path, **changes: object) -> RunDirectory:
    return RunDirectory.create_or_resume(path, {**RECIPE, **changes}, SOURCE, VERSIONS)


def make_layer(seed: int = 0) -> QuantizedLayer:
    generator = torch.Generator().manual_seed(seed)
    return QuantizedLayer(
        codes=torch.randint(0, 4, (16, 32), dtype=torch.uint8, generator=generator),
        scales=(torch.rand(16, 2, generator=generator) + 0.1).half(),
        zeros=torch.randint(0, 4, (16, 2), dtype=torch.uint8, generator=generator),
        spec=QuantSpec(bits=2, group_size=16),
    )


def make_pair(seed: int = 0) -> LoraPair:
    generator = torch.Generator().manual_seed(seed)
    return LoraPair(torch.randn(4, 32, generator=generator).half(), torch.randn(16, 4, generator=generator).half(), 4.0)


def make_certificate(module: str) -> LayerCertificate:
    return LayerCertificate(
        module=module,
        method="optq",
        bits=2,
        group_size=16,
        rank=4,
        tokens=1000,
        damping=0.01,
        damping_increases=0,
        error_quantized=0.5,
        error_adapted=0.25,
        error_bound=0.25,
        condition=float("inf"),
        effective_rank=12.5,
        dead_columns=1,
        notes=("one", "two"),
    )


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


def test_full_disk_keeps_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(tmp_path)
    run.write_layer("a", make_layer())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(RunDirectoryError, match=r"the disk is full while writing .*b\.safetensors; free some"):
            run.write_layer("b", make_layer(1))
        with pytest.raises(RunDirectoryError, match="the disk is full"):
            run.set_state("done")
    run.close()
    with start(tmp_path) as run:
        assert run.completed_modules() == {"a"}
        assert torch.equal(run.read_layer("a").quantized.codes, make_layer().codes)
        assert run.state == "running"
        run.write_layer("b", make_layer(1))
        assert run.completed_modules() == {"a", "b"}


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="cannot be written: Not a directory; choose another folder"):
        start(tmp_path / "file" / "run")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunDirectoryError, match="cannot be written: Permission denied; choose another folder, or"):
            start(tmp_path / "run")
    finally:
        tmp_path.chmod(0o700)


def test_damaged_layer_counts_as_not_done(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        for module in ("a", "b", "c", "d"):
            run.write_layer(module, make_layer(), make_pair())
        layers = tmp_path / "layers"
        data = (layers / "a.safetensors").read_bytes()
        (layers / "a.safetensors").write_bytes(data[: len(data) // 2])
        (layers / "b.safetensors").rename(layers / "e.safetensors")
        write_safetensors(layers / "c.safetensors", {"codes": torch.zeros(1)})
        (layers / "notes.txt").write_text("")
        assert run.completed_modules() == {"d"}
        damaged = run.damaged_layers()
        assert set(damaged) == {"a", "c", "e"}
        assert "is truncated or not a safetensors file" in damaged["a"]
        assert "is not a layer of format version 1" in damaged["c"]
        assert "holds the module 'b'; expected 'e'" in damaged["e"]
        with pytest.raises(FormatError, match=r"a\.safetensors is truncated .* Delete this file and run the same comm"):
            run.read_layer("a")
        with pytest.raises(FormatError, match="has no finished layer b; run the command again"):
            run.read_layer("b")
        run.write_layer("a", make_layer())
        assert run.completed_modules() == {"a", "d"}


def rewrite(path: Path, change) -> None:
    tensors, metadata = read_safetensors(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors, metadata)
    write_safetensors(path, tensors, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("codes"), r"holds the tensors \['lora_A', 'lora_B', 'scales', 'zeros'\]; expected"),
        (lambda t, m: m.pop("alpha"), "holds the tensors"),
        (lambda t, m: t.update(codes=t["codes"].int()), "codes must be .* uint8"),
        (lambda t, m: t.update(codes=t["codes"] + 4), "the largest code is 7; 2 bits hold 0..3"),
        (lambda t, m: t.update(scales=t["scales"] * float("nan")), "a scale is NaN"),
        (lambda t, m: t.update(scales=t["scales"][:, :1]), "scales must be"),
        (lambda t, m: t.update(lora_A=t["lora_A"] * float("inf")), "LoRA A holds NaN or Inf"),
        (lambda t, m: t.update(lora_A=t["lora_A"][:, :8]), "do not fit codes"),
        (lambda t, m: t.update(codes=3 - t["codes"]), "codes, scales or zeros are not those that were written. Delete"),
        (lambda t, m: m.update(sha256="x"), "has a damaged header"),
        (lambda t, m: m.update(alpha="x"), "has a damaged header"),
        (lambda t, m: m.update(alpha="nan"), "has a damaged header"),
        (lambda t, m: m.update(spec="{"), "spec is not valid JSON"),
        (lambda t, m: m.update(spec="{}"), "has a damaged header"),
        (lambda t, m: m.update(spec='{"bits": 5}'), "has a damaged header .bits is 5"),
        (lambda t, m: m.update(spec='{"bits": 2.0, "group_size": 16}'), "has a damaged header"),
        (lambda t, m: m.update(spec='{"bits": 2, "group_size": "16"}'), "has a damaged header"),
        (lambda t, m: m.update(certificate='{"module": "a"}'), "has a damaged header"),
        (lambda t, m: m.update(format_version="2"), "is not a layer of format version 1"),
    ],
)
def test_hostile_layer(tmp_path: Path, change, message: str) -> None:
    with start(tmp_path) as run:
        run.write_layer("a", make_layer(), make_pair(), make_certificate("a"))
        rewrite(run.layer_path("a"), change)
        with pytest.raises(FormatError, match=message) as caught:
            run.read_layer("a")
    assert str(run.layer_path("a")) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_certificates_come_in_the_order_of_the_blocks(tmp_path: Path) -> None:
    modules = ["model.layers.10.q", "model.layers.2.q", "model.layers.2.k"]
    with start(tmp_path) as run:
        for module in modules:
            run.write_layer(module, make_layer(), None, make_certificate(module))
        run.write_layer("bare", make_layer())
        assert [certificate.module for certificate in run.certificates()] == [modules[2], modules[1], modules[0]]
        assert run.certificates()[0].condition == float("inf")
    assert sorted(["a10", "a9", "b"], key=natural_order) == ["a9", "a10", "b"]


def test_reports(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.write_report("evaluation", {"layers": [make_certificate("m")], "time": float("nan")})
        report = run.read_report("evaluation")
        expected = dataclasses.asdict(make_certificate("m")) | {"condition": None, "notes": ["one", "two"]}
        assert report == {"layers": [expected], "time": None}
        with pytest.raises(RunDirectoryError, match="has no report 'other'; it has evaluation"):
            run.read_report("other")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a\0b", "x" * 201, "a b"])
def test_names_that_are_no_file_names(tmp_path: Path, name: str) -> None:
    with start(tmp_path) as run:
        for call in (lambda: run.write_layer(name, make_layer()), lambda: run.write_report(name, {})):
            with pytest.raises(RunDirectoryError, match="cannot be a file name; allowed are"):
                call()
        with pytest.raises(RunDirectoryError, match=r"the adapter name .* cannot be a file name"):
            run.adapter_path(name)


def test_paths_and_adapters(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        assert run.checkpoint_path == tmp_path / "checkpoint"
        assert run.adapters.names == []
        run.adapter_path("cloq").mkdir(parents=True)
        (run.adapter_path("cloq") / "adapter_config.json").write_text("{}")
        assert run.adapters.names == ["cloq"]
        assert run.adapter_path("cloq") == tmp_path / "adapters" / "cloq"


KILLED_RUN = """
import os, signal, sys
import torch
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.types import QuantizedLayer, QuantSpec

def work(path, fatal):
    fsync, calls = os.fsync, [0]
    def counted(descriptor):
        calls[0] += 1
        if calls[0] == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)
    os.fsync = counted
    run = RunDirectory.create_or_resume(path, {"bits": 2}, "sha256:0", {"torch": "x"})
    for index in range(3):
        if f"m.{index}" not in run.completed_modules():
            codes = torch.full((16, 32), index, dtype=torch.uint8)
            zeros = torch.zeros(16, 2, dtype=torch.uint8)
            run.write_layer(f"m.{index}", QuantizedLayer(codes, torch.ones(16, 2).half(), zeros, QuantSpec(2, 16)))
    run.set_state("quantized")
    run.write_report("summary", {"layers": sorted(run.completed_modules())})
    run.set_state("done")
    run.close()

def killed(path, fatal):
    child = os.fork()  # torch is imported once, not once a kill
    if child == 0:
        work(path, fatal)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])

root = sys.argv[1]
assert not killed(f"{root}/whole", 0)
kills = 0
while killed(f"{root}/once-{kills}", kills + 1):  # one kill, at every place in turn, then the same command again
    kills += 1
    assert not killed(f"{root}/once-{kills - 1}", 0)
for fatal in range(1, kills + 1):  # many kills of one run
    killed(f"{root}/many", fatal)
assert not killed(f"{root}/many", 0)
print(kills)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_run_killed_anywhere_ends_with_the_same_bytes(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED_RUN, str(tmp_path)],
        check=True,
        timeout=120,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert int(child.stdout) == 14  # two for each of 7 writes: the file and its folder
    whole = contents(tmp_path / "whole")
    assert len(whole) == 6
    for folder in tmp_path.iterdir():
        assert contents(folder) == whole, folder.name


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
