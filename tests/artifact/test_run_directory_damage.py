"""A run directory whose disk fills up, whose files are damaged, and whose process is killed."""

import dataclasses
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_layers import make_certificate, make_layer, make_pair, rewrite, start

from cloq_export.artifact.run_layers import natural_order
from cloq_export.errors import FormatError, RunDirectoryError
from cloq_export.files.tensor_writer import write_safetensors


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
