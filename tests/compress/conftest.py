"""Models whose weights were changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.files.tensor_writer import write_safetensors


@pytest.fixture
def changed(tmp_path: Path, model_folder: Callable[..., Path]) -> Callable[..., str]:
    """Return a function that writes a model whose weights a function has changed, by name."""

    def write(family: str, change: Callable[[str, torch.Tensor], torch.Tensor], name: str = "model") -> str:
        folder = tmp_path / name
        shutil.copytree(model_folder(family), folder)
        tensors, metadata = read_safetensors(folder / "model.safetensors")
        write_safetensors(
            folder / "model.safetensors", {key: change(key, tensor) for key, tensor in tensors.items()}, metadata
        )
        return str(folder)

    return write
