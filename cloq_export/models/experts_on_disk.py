"""Where the experts of mixtures lie in the files of their model, so that those of one block can be read at a time.

Files hold them one by one, under the names of the hub, or fused as the class of transformers holds them. In the second
case one expert is some rows of a tensor; in the first each matrix is a tensor, and transformers would join them all.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cloq_export.models.blocks import BlockList
from cloq_export.models.experts import ExpertStorage, holds_fused_experts, storage_of
from cloq_export.models.weight_files import TensorReader, WeightFiles
from cloq_export.models.weight_names import NameInMemory, loaded_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What transformers does to tensors of single experts: stack those of one projection, and put gate and up together.
_JOINING = ({"MergeModulelist"}, {"MergeModulelist", "Concatenate"})


@dataclasses.dataclass(frozen=True)
class StoredMatrix:
    """A matrix in a file: a tensor of its own, or the part of one expert in a fused one.

    Args:
        file: reads it.
        stored: name of the tensor.
        expert: number of the expert in a fused tensor; None for a tensor of its own.
        storage: how the fused tensor holds its experts.
        parts: projections that the fused tensor holds.
        part: the one that is wanted.
    """

    file: TensorReader
    stored: str
    expert: int | None = None
    storage: ExpertStorage | None = None
    parts: tuple[str, ...] = ()
    part: int = 0

    @property
    def paths(self) -> tuple[Path, ...]:
        """Return the files that it is read from."""
        return self.file.paths(self.stored)

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix in a dtype.

        Raises:
            FormatError: the file changed since it was opened.
        """
        if self.expert is None or self.storage is None:
            return self.file.read_as_mapped(self.stored, dtype)
        mine = self.file.read_as_mapped(self.stored, dtype, (self.expert, self.expert + 1))
        return self.storage.cut(mine, 0, self.parts, weight=True)[self.part]


@dataclasses.dataclass(frozen=True)
class FusedOnDisk:
    """What a fused tensor of a mixture is in files.

    Args:
        shape: of the fused tensor in memory.
        parts: the projections that it holds, in order.
        storage: how it holds them.
        stored: for each projection its tensors, one for each expert; or the fused tensor alone.
    """

    shape: tuple[int, ...]
    parts: tuple[str, ...]
    storage: ExpertStorage
    stored: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> list[str]:
        """Return the names of all its tensors."""
        return [name for of_part in self.stored for name in of_part]

    def matrix(self, files: WeightFiles, expert: int, part: int) -> StoredMatrix:
        """Return where a projection of one expert is read."""
        names = self.names
        if len(names) == 1:
            return StoredMatrix(files.files[names[0]], names[0], expert, self.storage, self.parts, part)
        name = self.stored[part][expert]
        return StoredMatrix(files.files[name], name)


def fused_on_disk(model: PreTrainedModel, blocks: BlockList, files: WeightFiles) -> dict[str, FusedOnDisk] | str:
    """Find the fused tensors of a model's blocks in its files.

    Args:
        model: without numbers.
        blocks: its blocks.
        files: its weight files.

    Returns:
        Full name of each fused tensor in memory -> what it is in files; or why its experts cannot be read one block at
        a time.
    """
    held: dict[str, tuple[ExpertStorage, tuple[str, ...]]] = {}
    for index, block in enumerate(blocks):
        for inner, module in block.named_modules():
            if not holds_fused_experts(module):
                continue
            name = f"{blocks.prefix(index)}.{inner}"
            storage = storage_of(module)
            if isinstance(storage, str):
                return f"{name} holds its experts in one tensor, and {storage}"
            held |= {f"{name}.{fused}": (storage, parts) for fused, parts in storage.parts.items()}
    state = model.state_dict()
    of_name: dict[str, list[NameInMemory]] = collections.defaultdict(list)
    for entry in loaded_names(model, files.headers, state):
        of_name[entry.name].append(entry)
    # Placeholders are loaded under the name in memory, which must mean that tensor to the loader too.
    meant = {
        entry.stored
        for entry in loaded_names(model, held, state)
        if (entry.name, entry.pattern) == (entry.stored, None)
    }
    found: dict[str, FusedOnDisk] = {}
    for full, (storage, parts) in held.items():
        stored = _stored(of_name[full], storage, parts)
        if stored is None or full not in meant:
            return f"transformers makes {full} of its files in a way that is not known"
        found[full] = FusedOnDisk(tuple(state[full].shape), parts, storage, stored)
    return found


def first_of_each_build(model: torch.nn.Module, fused: Mapping[str, FusedOnDisk]) -> set[str]:
    """Return one mixture of each class and size, by the full name of its module: those that are loaded and compared."""
    seen: dict[tuple[object, ...], str] = {}
    for name in dict.fromkeys(tensor.rpartition(".")[0] for tensor in fused):
        module = model.get_submodule(name)
        shapes = tuple((key, tuple(each.shape)) for key, each in module.named_parameters(recurse=False))
        seen.setdefault((type(module), shapes), name)
    return set(seen.values())


def _stored(
    entries: Sequence[NameInMemory], storage: ExpertStorage, parts: Sequence[str]
) -> tuple[tuple[str, ...], ...] | None:
    """Return the tensors in files that a fused one is made of; None if they are joined in another way."""
    if len(entries) == 1 and entries[0].pattern is None:
        return ((entries[0].stored,),)
    if not entries or entries[0].pattern is None or set(entries[0].operations) not in _JOINING:
        return None
    of_part = tuple(
        tuple(entry.stored for entry in entries if entry.pattern == pattern) for pattern in entries[0].patterns
    )
    # Interleaved rows and transposed matrices would need another operation.
    plain = not storage.transposed and not (storage.interleaved and len(parts) > 1)
    return of_part if plain and len(of_part) == len(parts) else None
