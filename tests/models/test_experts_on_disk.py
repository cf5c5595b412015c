"""Experts that are read from disk with their block: the numbers that transformers loads, however they are stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_mixtures import MIXTURES, build_mixture

from cloq_export.errors import UnsupportedModelError
from cloq_export.models import block_loading, experts_on_disk
from cloq_export.models.experts import SplitExperts
from cloq_export.models.placeholders import is_placeholder
from cloq_export.models.source import open_model
from cloq_export.models.weights_on_disk import in_memory, tensor_of, weights_on_disk

WriteTokenizer = Callable[[Path], None]


@pytest.fixture
def write_mixture(tmp_path: Path, write_tokenizer: WriteTokenizer) -> Callable[[str], Path]:
    """Return a function that writes a family's random model and gives the folder."""

    def write(family: str) -> Path:
        build_mixture(family).save_pretrained(tmp_path / family)
        write_tokenizer(tmp_path / family)
        return tmp_path / family

    return write


@pytest.mark.parametrize("family", MIXTURES)
def test_every_family_streams(family: str, write_mixture: Callable[[str], Path]) -> None:
    folder = write_mixture(family)
    whole = open_model(str(folder), stream="never").model
    streamed = open_model(str(folder), stream="always").model
    mixtures = [module for module in streamed.modules() if isinstance(module, SplitExperts)]
    matrices = [parameter for module in mixtures for parameter in module.parameters() if parameter.ndim > 1]
    assert matrices
    assert all(is_placeholder(parameter) for parameter in matrices)
    for name, tensor in streamed.state_dict().items():
        assert torch.equal(tensor_of(streamed, name, tensor), whole.state_dict()[name]), name
    ids = torch.arange(4, 40).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(streamed(ids).logits, whole(ids).logits)
    assert all(is_placeholder(parameter) for parameter in matrices)


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss"])
def test_only_the_used_block_is_in_memory(family: str, write_mixture: Callable[[str], Path]) -> None:
    model = open_model(str(write_mixture(family)), stream="always").model
    weights = weights_on_disk(model)
    assert weights is not None
    blocks = list(weights.blocks)
    mixture = next(module for module in blocks[1].modules() if isinstance(module, SplitExperts))
    with in_memory(blocks[1]):
        assert not any(is_placeholder(parameter) for parameter in mixture.parameters())
        assert all(is_placeholder(parameter) for parameter in blocks[0].parameters() if parameter.ndim > 1)


def test_experts_that_are_not_what_transformers_loads_are_refused(
    write_mixture: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_mixture("mixtral")
    matrix = experts_on_disk.FusedOnDisk.matrix

    def wrong(self: experts_on_disk.FusedOnDisk, files: Any, expert: int, part: int) -> Any:
        return matrix(self, files, expert, (part + 1) % len(self.parts))

    monkeypatch.setattr(experts_on_disk.FusedOnDisk, "matrix", wrong)
    with pytest.raises(UnsupportedModelError, match=r"is not what transformers makes of .*w3.weight.*`stream=never`"):
        open_model(str(folder), stream="always")


def test_experts_in_an_unknown_way_are_held_in_memory_and_said(
    write_mixture: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_mixture("mixtral")
    loaded_names = experts_on_disk.loaded_names

    def transposing(*arguments: Any) -> Any:
        for entry in loaded_names(*arguments):
            yield entry._replace(operations=(*entry.operations, "Transpose")) if entry.operations else entry

    monkeypatch.setattr(experts_on_disk, "loaded_names", transposing)
    with pytest.raises(
        UnsupportedModelError, match=r"gate_up_proj of its files in a way that is not known.*stream=never"
    ):
        open_model(str(folder), stream="always")
    monkeypatch.setattr(block_loading, "free_bytes", lambda: 1000)
    loaded = open_model(str(folder), stream="auto")
    assert weights_on_disk(loaded.model) is None
    assert "cannot be read from disk block by block" in loaded.reading[0]
