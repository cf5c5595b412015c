"""Open a model with the matrices of its blocks left on disk, where that gives what transformers would load."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from cloq_export.errors import UnsupportedModelError
from cloq_export.files.tensor_writer import DTYPES
from cloq_export.models.blocks import BlockList, find_blocks
from cloq_export.models.experts import SplitExperts
from cloq_export.models.experts_on_disk import FusedOnDisk, StoredMatrix, first_of_each_build, fused_on_disk
from cloq_export.models.library_calls import NO_CODE
from cloq_export.models.model_class import model_class
from cloq_export.models.placeholders import is_placeholder, placeholder
from cloq_export.models.weight_files import TensorReader, WeightFiles
from cloq_export.models.weight_names import loaded_names
from cloq_export.models.weights_on_disk import WeightsOnDisk
from cloq_export.process.host_memory import free_bytes

# Whether the weights of blocks are read from disk while they are used: where memory asks for it, always, or never.
Streaming = Literal["auto", "always", "never"]
# Share of the model's bytes that is written and measured in addition to it.
_WORK = 1.3


@dataclasses.dataclass(frozen=True)
class ModelOnDisk:
    """A model whose blocks can be read one after the other.

    Args:
        empty: the model without numbers.
        blocks: of the empty model.
        files: its weight files.
        places: tensor in its files -> matrix in the blocks of the model in memory.
        fused: full name of each fused tensor of experts in the blocks -> what it is in the files.
    """

    empty: Any
    blocks: BlockList
    files: WeightFiles
    places: Mapping[str, str]
    fused: Mapping[str, FusedOnDisk]

    @classmethod
    def of(cls, files: WeightFiles, empty: Any, path: str) -> ModelOnDisk | str:
        """Return the model in a folder, or why its blocks cannot be read one after the other.

        Args:
            files: of its weights.
            empty: the model without numbers.
            path: of its blocks; empty to search.
        """
        try:
            blocks = find_blocks(empty, path)
        except UnsupportedModelError as error:
            return f"its blocks are not known ({error})"
        fault = _fault(empty, blocks)
        if fault is not None:
            return fault
        fused = fused_on_disk(empty, blocks, files)
        if isinstance(fused, str):
            return fused
        inside = f"{blocks.name}."
        # In memory stay biases of fused experts, which are stacked to a matrix, and what uses its weight in a way of
        # its own (routers).
        left = {name.rpartition(".")[0] for name in fused} | {
            name
            for name, module in empty.named_modules()
            if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
        }
        matrices = {
            name
            for name, each in empty.named_parameters()
            if each.ndim > 1 and name.startswith(inside) and name.rpartition(".")[0] not in left
        }
        places: dict[str, str] = {}
        for entry in loaded_names(empty, files.headers, empty.state_dict()):
            if entry.name not in matrices:
                continue
            if entry.pattern is not None:
                return f"transformers makes {entry.name} of several tensors"
            if DTYPES.get(files.headers[entry.stored][0], torch.int8).is_floating_point:
                places[entry.stored] = entry.name
        return cls(empty, blocks, files, places, fused)

    def load(self, config: Any, dtype: torch.dtype) -> tuple[Any, Mapping[str, Any]]:
        """Return the model, its blocks' matrices placeholders, and what transformers reports on the loading.

        One mixture of experts of each size is loaded as transformers does it, for `attach` to compare.
        """
        instead: dict[str, torch.Tensor | None] = {
            stored: placeholder(self.files.headers[stored][1], self.empty.get_parameter(name).dtype)
            for stored, name in self.places.items()
        }
        compared = first_of_each_build(self.empty, self.fused)
        for full, tensor in self.fused.items():
            if full.rpartition(".")[0] not in compared:
                instead |= dict.fromkeys(tensor.names)
                instead[full] = placeholder(tensor.shape, self.empty.get_parameter(full).dtype)
        return load_from(self.files, type(self.empty), config, dtype, instead)

    def attach(self, source: str, model: Any) -> None:
        """Let the blocks of a loaded model be read from disk whenever they are used.

        Args:
            source: name of the model, for messages.
            model: as `load` returned it, its experts split.

        Raises:
            UnsupportedModelError: experts that were loaded are not what is read here.
        """
        blocks = find_blocks(model, self.blocks.name)
        places = {
            name: StoredMatrix(self.files.files[stored], stored)
            for stored, name in self.places.items()
            if is_placeholder(model.get_parameter(name))
        }
        mixtures = [(name, each) for name, each in model.named_modules() if isinstance(each, SplitExperts)]
        for name, mixture in mixtures:
            places |= self._experts(source, name, mixture)
        WeightsOnDisk(source, model, blocks, places)

    def _experts(self, source: str, name: str, mixture: SplitExperts) -> dict[str, StoredMatrix]:
        """Return where the matrices of a mixture are read; those in memory are compared and given up."""
        places: dict[str, StoredMatrix] = {}
        for fused, parts in mixture.parts.items():
            on_disk = self.fused.get(f"{name}.{fused}")
            if on_disk is None:
                continue
            for expert, part in itertools.product(range(len(mixture)), range(len(parts))):
                full = f"{name}.{expert}.{parts[part]}.weight"
                place = on_disk.matrix(self.files, expert, part)
                parameter = getattr(mixture.expert(expert), parts[part]).weight
                if not is_placeholder(parameter):
                    if not torch.equal(place.read(parameter.dtype), parameter):
                        raise UnsupportedModelError(
                            f"{full} of {source} is not what transformers makes of {place.stored}, so its experts "
                            "cannot be read from disk block by block. Hold the model in memory with `stream=never`."
                        )
                    parameter.data = placeholder(tuple(parameter.shape), parameter.dtype)
                places[full] = place
        return places


def without_numbers(source: str, config: Any, dtype: torch.dtype) -> Any:
    """Return the model that a config describes, its tensors on the meta device.

    Args:
        source: name of the model, for messages.
        config: as transformers reads it.
        dtype: of the weights in memory.

    Raises:
        UnsupportedModelError: transformers has no causal language model of this type.
    """
    with torch.device("meta"):
        return model_class(source, config)._from_config(copy.deepcopy(config), dtype=dtype)


def load_from(
    files: WeightFiles,
    kind: type[Any],
    config: Any,
    dtype: torch.dtype,
    instead: Mapping[str, torch.Tensor | None] | None = None,
) -> tuple[Any, Mapping[str, Any]]:
    """Load a model from tensors as our reader gives them, decoded where they are stored in low precision.

    Args:
        files: of its weights.
        kind: its class.
        config: as transformers reads it, without what it says about quantization.
        dtype: of the weights in memory.
        instead: tensor in its files, or in memory -> what is taken for it; None leaves it out.

    Returns:
        The model, and what transformers reports on the loading.
    """
    import transformers

    state: dict[str, Any] = {stored: _Stored(file, stored) for stored, file in files.files.items()}
    state |= instead or {}
    model, report = kind.from_pretrained(
        None,
        config=config,
        state_dict={name: tensor for name, tensor in state.items() if tensor is not None},
        dtype=dtype,
        output_loading_info=True,
        # So that they come back with their names: `refuse_gaps` refuses them.
        ignore_mismatched_sizes=True,
        **NO_CODE,
    )
    folder = files.paths[0].parent
    model.config.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, **NO_CODE)
    return model, report


def left_on_disk(
    source: str, files: WeightFiles, empty: Any, *, stream: Streaming, path: str
) -> tuple[ModelOnDisk | None, tuple[str, ...]]:
    """Decide whether the matrices of a model's blocks stay on disk.

    Args:
        source: name of the model, for messages.
        files: of its weights.
        empty: the model without numbers.
        stream: what was asked.
        path: of the blocks; empty to search.

    Returns:
        The model on disk, or None if it is to be held in memory whole; and what is to be said of it.

    Raises:
        UnsupportedModelError: they always are to, and cannot.
    """
    if stream == "never":
        return None, ()
    demand = Demand.of(files, empty.dtype)
    if stream == "auto" and demand.fits:
        return None, ()
    on_disk = ModelOnDisk.of(files, empty, path)
    if isinstance(on_disk, ModelOnDisk):
        return on_disk, (f"the weights of {source} are read from disk block by block: {demand}",)
    if stream == "always":
        raise UnsupportedModelError(
            f"the weights of {source} cannot be read from disk block by block: {on_disk}. Hold the model in memory "
            "with `stream=never`."
        )
    return None, (f"the weights of {source} cannot be read from disk block by block ({on_disk}): {demand}",)


@dataclasses.dataclass(frozen=True)
class Demand:
    """What a model takes in memory whole, and what is free, in bytes."""

    model: int
    free: int

    @classmethod
    def of(cls, files: WeightFiles, dtype: torch.dtype) -> Demand:
        """Return the demand of a model with its weights in a dtype."""
        count = sum(torch.Size(shape).numel() for _, shape in files.headers.values())
        return cls(count * dtype.itemsize, free_bytes())

    @property
    def fits(self) -> bool:
        """Return whether the model fits together with the work that is done with it."""
        return _WORK * self.model <= self.free

    def __str__(self) -> str:
        return f"in memory it takes {self.model / 10**9:.2f} GB, and {self.free / 10**9:.2f} GB are free"


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor of a file, read when transformers asks for it, as it asks safetensors."""

    file: TensorReader
    name: str

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.file.read_as_mapped(self.name)[index]

    def get_dtype(self) -> str:
        return self.file.headers[self.name][0]

    def get_shape(self) -> list[int]:
        return list(self.file.headers[self.name][1])


def _fault(empty: Any, blocks: BlockList) -> str | None:
    """Return why the blocks of a model cannot be read one after the other, as far as its class tells."""
    inside = f"{blocks.name}."
    names: dict[int, str] = {}
    for name, parameter in empty.named_parameters(remove_duplicate=False):
        other = names.setdefault(id(parameter), name)
        if other != name and (name.startswith(inside) or other.startswith(inside)):
            return f"{other} and {name} are one tensor"
    tied = empty.get_expanded_tied_weights_keys(all_submodels=True)
    shared = next((pair for pair in tied.items() if any(name.startswith(inside) for name in pair)), None)
    return None if shared is None else f"{shared[0]} and {shared[1]} are one tensor"
