"""Weight files planned from headers and filled in any order: bounded, complete, the same bytes; and read one by one."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from cloq_export.errors import FormatError, RunDirectoryError, ShapeError
from cloq_export.files.safe_paths import require_inside
from cloq_export.files.safe_tensors import TensorFile
from cloq_export.files.shards import ShardWriter
from cloq_export.files.tensor_writer import TensorFileWriter, tensor_header, write_safetensors

TENSORS = {
    "a.codes": torch.arange(24, dtype=torch.int32).view(4, 6),
    "a.scales": torch.arange(6, dtype=torch.float16),
    "b.codes": torch.arange(24, dtype=torch.int32).view(6, 4) * 7,
    "empty": torch.empty(0, 3),
    "norm": torch.randn(5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "scalar": torch.tensor(True),
}
HEADERS = {name: tensor_header(name, tensor) for name, tensor in TENSORS.items()}


def bundles():
    groups: dict[str, dict] = {}
    for name, header in HEADERS.items():
        groups.setdefault(name.partition(".")[0], {})[name] = header
    return list(groups.values())


@pytest.mark.parametrize("order", [1, -1])
def test_a_file_filled_in_any_order_is_the_one_written_at_once(tmp_path, order):
    write_safetensors(tmp_path / "whole", TENSORS, {"k": "v"})
    with TensorFileWriter(tmp_path / "piecewise", HEADERS, {"k": "v"}) as writer:
        for name in list(TENSORS)[::order]:
            writer.write(name, TENSORS[name])
    assert (tmp_path / "piecewise").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["piecewise", "whole"]


def test_a_tensor_file_reads_what_the_library_reads(tmp_path):
    write_safetensors(tmp_path / "x", TENSORS, {"k": "v"})
    file = TensorFile(tmp_path / "x")
    assert file.metadata == {"k": "v"}
    with safe_open(tmp_path / "x", framework="pt") as theirs:
        assert set(theirs.keys()) == set(file.headers)
        for name in theirs.keys():  # noqa: SIM118
            read = file.read(name)
            assert read.dtype == TENSORS[name].dtype
            assert torch.equal(read, theirs.get_tensor(name))


def test_a_file_cut_after_it_was_opened_is_named(tmp_path):
    write_safetensors(tmp_path / "x", TENSORS)
    file = TensorFile(tmp_path / "x")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    with pytest.raises(FormatError, match="x is truncated or not a safetensors file"):
        file.read("scalar")


def test_what_was_not_announced_is_refused_and_nothing_stays(tmp_path):
    def filled(*names, **changed):
        with TensorFileWriter(tmp_path / "x", HEADERS) as writer:
            for name in names:
                writer.write(name, changed.get(name, TENSORS[name]))

    with pytest.raises(ShapeError, match=r"'norm' \('F32', \(5,\)\) was not announced for .*x, or comes twice"):
        filled("norm", norm=torch.zeros(5))
    with pytest.raises(ShapeError, match=r"'norm' .* was not announced for .*x, or comes twice"):
        filled("norm", "norm")
    with pytest.raises(ShapeError, match=r"'a.codes' of .*x was announced and did not come"):
        filled("norm", "scalar", "empty", "b.codes", "a.scales")
    assert list(tmp_path.iterdir()) == []


def test_bundles_stay_together_and_files_bounded(tmp_path):
    with ShardWriter(tmp_path, bundles(), 110) as shards:
        for name in sorted(TENSORS, reverse=True):
            shards.write({name: TENSORS[name]})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        "a.codes": "model-00001-of-00002.safetensors",
        "a.scales": "model-00001-of-00002.safetensors",
        "b.codes": "model-00002-of-00002.safetensors",
        "empty": "model-00002-of-00002.safetensors",
        "norm": "model-00002-of-00002.safetensors",
        "scalar": "model-00002-of-00002.safetensors",
    }
    assert index["metadata"]["total_size"] == 96 + 12 + 96 + 0 + 10 + 1
    for name, file in index["weight_map"].items():
        assert torch.equal(TensorFile(tmp_path / file).read(name), TENSORS[name])


def test_one_file_has_no_index(tmp_path):
    with ShardWriter(tmp_path, bundles(), 10**9) as shards:
        shards.write(TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_shards_refuse_what_was_not_planned(tmp_path):
    with pytest.raises(ShapeError, match="'norm' is announced twice"):
        ShardWriter(tmp_path, [*bundles(), {"norm": HEADERS["norm"]}], 100)
    with (
        pytest.raises(ShapeError, match=r"model-00001-of-00002.safetensors lacks 1 tensors that were announced"),
        ShardWriter(tmp_path, bundles(), 110) as shards,
    ):
        shards.write({"a.codes": TENSORS["a.codes"]})
    with pytest.raises(ShapeError, match="'ghost' was not announced"), ShardWriter(tmp_path, bundles(), 110) as shards:
        shards.write({"ghost": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    writer = TensorFileWriter(tmp_path / "x", HEADERS)
    monkeypatch.setattr("os.write", full)
    with pytest.raises(RunDirectoryError, match=r"the disk is full while writing .*x"), writer:
        writer.write("norm", TENSORS["norm"])
    assert list(tmp_path.iterdir()) == []


def test_links_out_of_a_folder_are_refused(tmp_path):
    outside = tmp_path / "secret"
    outside.write_text("key")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "inside").write_text("x")
    (folder / "alias").symlink_to("inside")
    (folder / "leak").symlink_to(outside)
    assert require_inside(folder, folder / "alias") == folder / "alias"
    with pytest.raises(FormatError, match=r"leak is a link that leads out of .*model, to .*secret; put the file"):
        require_inside(folder, folder / "leak")


def test_the_links_of_the_hub_cache_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "1234").write_text("x")
    (snapshot / "config.json").symlink_to("../../blobs/1234")
    assert require_inside(snapshot, snapshot / "config.json") == snapshot / "config.json"
