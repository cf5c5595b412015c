"""Safetensors files hold what was given, and the same tensors give the same bytes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cloq_export.errors import ShapeError
from cloq_export.files.tensor_writer import write_safetensors


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 4, generator=generator)
    return {
        "b.float32": base,
        "a.transposed": base.t(),
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "half": base.half(),
        "bfloat": base.bfloat16(),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "words": torch.tensor([-1, 2], dtype=torch.int32),
        "flags": torch.tensor([True, False, True]),
        "none": torch.empty(0, 3),
        "grad": base.clone().requires_grad_(),
    }


def test_safetensors_is_read_by_the_library(tmp_path: Path) -> None:
    tensors = some_tensors()
    write_safetensors(tmp_path / "x.safetensors", tensors, {"k": "ü"})
    loaded = load_file(tmp_path / "x.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_safetensors_bytes_equal_the_library(tmp_path: Path) -> None:
    tensors = {name: tensor.detach().contiguous() for name, tensor in some_tensors().items()}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "theirs")
    write_safetensors(tmp_path / "ours", tensors)
    assert load_file(tmp_path / "ours").keys() == load_file(tmp_path / "theirs").keys()
    assert (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size


def test_safetensors_bytes_do_not_depend_on_order(tmp_path: Path) -> None:
    tensors = some_tensors()
    write_safetensors(tmp_path / "a", tensors, {"x": "1", "y": "2", "z": "3"})
    write_safetensors(tmp_path / "b", dict(reversed(tensors.items())), {"z": "3", "y": "2", "x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_safetensors_refuses_complex(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match=r"tensor 'c' is torch\.complex64, which safetensors cannot hold"):
        write_safetensors(tmp_path / "x", {"c": torch.zeros(1, dtype=torch.complex64)})
    assert list(tmp_path.iterdir()) == []
