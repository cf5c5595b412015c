"""Readers of files that nobody vouches for end in one line that names the file."""

import json
import struct
from pathlib import Path

import pytest
import torch

from cloq_export.errors import FormatError
from cloq_export.files.safe_json import read_json
from cloq_export.files.safe_tensors import TensorFile, read_safetensors, read_safetensors_header, require_tensor
from cloq_export.files.tensor_writer import write_safetensors


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.arange(12, dtype=torch.int32).view(3, 4)}, {"k": "v"})
    return path


def with_header(path: Path, header: object, body: bytes = b"", claimed: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if claimed is None else claimed) + text + body)
    return path


def test_reads_tensors_and_metadata(whole: Path) -> None:
    tensors, metadata = read_safetensors(whole)
    assert torch.equal(tensors["a"], torch.arange(12, dtype=torch.int32).view(3, 4))
    assert metadata == {"k": "v"}
    assert read_safetensors_header(whole) == ({"a": ("I32", (3, 4))}, {"k": "v"})


@pytest.mark.parametrize("reader", [read_safetensors, read_safetensors_header])
def test_truncated_at_every_length(whole: Path, reader) -> None:
    data = whole.read_bytes()
    for length in range(len(data)):
        whole.write_bytes(data[:length])
        with pytest.raises(FormatError, match="is truncated or not a safetensors file") as caught:
            reader(whole)
        assert "\n" not in str(caught.value)


def test_trailing_bytes(whole: Path) -> None:
    whole.write_bytes(whole.read_bytes() + b"more")
    with pytest.raises(FormatError, match="is truncated or not a safetensors file"):
        read_safetensors(whole)


@pytest.mark.parametrize(
    ("header", "claimed"),
    [
        ({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, None),
        ({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}}, None),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, None),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, None),
        ({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, None),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, None),
        ({"a": {"shape": [2]}}, None),
        ([], None),
        (b"{not json", None),
        (b"\xff\xfe", None),
        (b"{}", 2**63 - 1),
        (b"{}", 2**64 - 1),
        (b'{"a":' * 50_000, None),
    ],
)
def test_lying_headers(tmp_path: Path, header: object, claimed: int | None) -> None:
    path = with_header(tmp_path / "x.safetensors", header, b"\0" * 8, claimed)
    with pytest.raises(FormatError, match=r"x\.safetensors is truncated or not a safetensors file") as caught:
        read_safetensors(path)
    assert "\n" not in str(caught.value)


def test_overlapping_tensors(tmp_path: Path) -> None:
    entry = {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}
    path = with_header(tmp_path / "x.safetensors", {"a": entry, "b": entry}, b"\0" * 8)
    with pytest.raises(FormatError, match="is truncated or not a safetensors file"):
        read_safetensors(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"none\.safetensors does not exist; check the path\."):
        read_safetensors(tmp_path / "none.safetensors")
    with pytest.raises(FormatError, match="is a folder; expected a safetensors file"):
        read_safetensors(tmp_path)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_tensors_lie_as_in_a_mapped_file(tmp_path: Path, dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    tensors = {
        "odd": torch.randn(3, 5, dtype=torch.bfloat16),
        "wide": torch.randn(7, 33),
        "half": torch.randn(5).to(torch.float16),
        "number": torch.tensor(2.5),
        "nothing": torch.empty(0, 4),
    }
    write_safetensors(tmp_path / "model.safetensors", tensors)
    file = TensorFile(tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    places = {name: start + entry["data_offsets"][0] for name, entry in json.loads(content[8:start]).items()}
    for name, tensor in tensors.items():
        read = file.read_as_mapped(name, dtype)
        wanted = dtype or tensor.dtype
        assert torch.equal(read, tensor.to(wanted))
        assert read.dtype == wanted
        if tensor.numel() and places[name] % tensor.element_size() == 0:
            assert read.data_ptr() % 64 == (places[name] % 64 if wanted == tensor.dtype else 0)
        # It is nobody else's: writing to it changes neither the file nor what is read next.
        read.fill_(1)
        assert torch.equal(file.read_as_mapped(name, dtype), tensor.to(wanted))


def test_require_tensor() -> None:
    tensors = {"a": torch.zeros(2, 3)}
    assert require_tensor(tensors, "a", source="x", dtype=torch.float32, shape=(2, 3)) is tensors["a"]
    with pytest.raises(FormatError, match="x lacks the tensor 'b'; it holds a"):
        require_tensor(tensors, "b", source="x")
    with pytest.raises(FormatError, match=r"x: a is torch\.float32; expected torch\.int32"):
        require_tensor(tensors, "a", source="x", dtype=torch.int32)
    with pytest.raises(FormatError, match=r"x: a has shape \(2, 3\); expected \(3, 2\)"):
        require_tensor(tensors, "a", source="x", shape=(3, 2))
    with pytest.raises(FormatError, match=r"x: a has shape \(2, 3\); expected 1 dimensions"):
        require_tensor(tensors, "a", source="x", ndim=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"\xff", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[1]", "holds a JSON list; expected an object"),
        (b"3", "holds a JSON int; expected an object"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"is not valid JSON \(a number in it has more than \d+ digits\)"),
        (b'\xef\xbb\xbf{"a": 1}', "begins with a byte order mark of UTF-8; .* Save the file as UTF-8 without"),
        ('{"a": 1}'.encode("utf-16"), "begins with a byte order mark of UTF-16"),
        ('{"a": 1}'.encode("utf-32"), "begins with a byte order mark of UTF-32"),
        ('{"a": 1}'.encode("utf-16-le"), "is not valid JSON"),
    ],
)
def test_bad_json(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=rf"a\.json {message}") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_missing_json(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"a\.json does not exist"):
        read_json(tmp_path / "a.json")
    with pytest.raises(FormatError, match="cannot be read: Is a directory"):
        read_json(tmp_path)
