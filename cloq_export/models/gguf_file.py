"""GGUF files: what of them can be read, and whether transformers made of a file all that it says.

Keys and tensors that change what the model computes and have no place in what transformers makes are refused by name.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cloq_export.errors import SourceError, UnsupportedModelError
from cloq_export.models.gguf_header import header_differences
from cloq_export.models.weight_files import listed

REMEDY = "Give the model as a Hugging Face folder, which says all of it"
ROPE_FACTORS = "rope_freqs.weight"

_LONGEST_ARRAY = 4096


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A GGUF file: its keys are read, its tensors are not.

    Args:
        name: of the model, for messages.
        path: the file.
        reader: the reader of the package gguf.
        header: its keys, without the vocabulary and its merges.
    """

    name: str
    path: Path
    reader: Any
    header: Mapping[str, Any]

    @classmethod
    def open(cls, name: str, path: Path) -> GgufFile:
        """Read the keys of a file.

        Args:
            name: of the model, for messages.
            path: the file.
        """
        import gguf

        reader = gguf.GGUFReader(path)
        # Arrays of one number a layer are shorter than any vocabulary.
        short = {key: field for key, field in reader.fields.items() if len(field.data) <= _LONGEST_ARRAY}
        return cls(name, path, reader, {key: field.contents() for key, field in short.items()})

    @property
    def architecture(self) -> str:
        """Return what llama.cpp calls the model's architecture."""
        return str(self.header.get("general.architecture"))

    @functools.cached_property
    def own(self) -> Mapping[str, Any]:
        """Return the keys of the architecture, without its name."""
        prefix = f"{self.architecture}."
        return {key.removeprefix(prefix): value for key, value in self.header.items() if key.startswith(prefix)}

    def numbers(self, tensor_name: str) -> np.ndarray | None:
        """Return the numbers of a tensor; None if the file has none of this name."""
        import gguf

        tensor = next((tensor for tensor in self.reader.tensors if tensor.name == tensor_name), None)
        return None if tensor is None else gguf.dequantize(tensor.data, tensor.tensor_type)

    def rope_factors(self) -> np.ndarray | None:
        """Return what llama.cpp divides each rotation's frequency by; None where all of it is one."""
        factors = self.numbers(ROPE_FACTORS)
        return None if factors is None or np.all(factors == 1) else factors


def check_gguf(file: GgufFile, model: Any, unexpected: Sequence[str] = ()) -> list[str]:
    """Refuse a GGUF file that says more about its model than transformers made of it.

    Args:
        file: the file.
        model: as transformers loaded it, with the rope scaling of `gguf_rope`.
        unexpected: names of tensors that transformers found no place for, as far as it says so.

    Returns:
        list: what is read otherwise than the header says and does not change what the model computes.

    Raises:
        UnsupportedModelError: a key or tensor changes what the model computes, and the loaded model lacks it.
        SourceError: a tensor has another shape than the header says.
    """
    rope_from_tensor = file.rope_factors() is not None
    for key, value, seen in header_differences(file.own, model.config, rope_from_tensor=rope_from_tensor):
        loaded = "transformers does not read it" if seen is None else f"the model that transformers makes has {seen}"
        raise UnsupportedModelError(
            f"the header of {file.name} says {file.architecture}.{key} = {value!s:.80}, and {loaded}: it would compute "
            f"something else. {REMEDY}."
        )
    return _check_tensors(file, model, unexpected)


def refuse_other_files(file: GgufFile) -> None:
    """Refuse a GGUF file that is no whole model of float weights, before any of it is loaded.

    Args:
        file: the file.

    Raises:
        SourceError: the file is a part of a model, or something else than a model.
        UnsupportedModelError: it holds scales beside its weights.
    """
    kind = file.header.get("general.type", "model")
    if kind != "model" or any(key.startswith("adapter.") for key in file.header):
        raise SourceError(f"{file.name} is a GGUF file of the type {kind}, not a model; give the model it belongs to.")
    parts = file.header.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise SourceError(
            f"{file.name} is one of {parts} parts of a model; put them together first with llama.cpp's gguf-split "
            "--merge."
        )
    scales = [tensor.name for tensor in file.reader.tensors if tensor.name.endswith((".scale", ".input_scale"))]
    if scales:
        raise UnsupportedModelError(
            f"{file.name} holds {len(scales)} scales beside its weights ({listed(scales)}), which transformers does "
            f"not read: it would compute something else. {REMEDY}."
        )


def _check_tensors(file: GgufFile, model: Any, unexpected: Sequence[str]) -> list[str]:
    """Refuse tensors that have no place in the model, except those that change nothing."""
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.weight.shape != (module.out_features, module.in_features):
            raise SourceError(
                f"{file.name} holds {module_name} with shape {tuple(module.weight.shape)}, and its header gives it "
                f"{(module.out_features, module.in_features)} (numbers and widths of heads); the header is wrong, or "
                f"transformers reads it otherwise. {REMEDY}."
            )
    stored = [tensor.name for tensor in file.reader.tensors]
    used = _names_in_use(file.architecture, model)
    idle = (
        sorted(unexpected) if used is None else sorted(stored_name for stored_name in stored if not used(stored_name))
    )
    refused: list[str] = []
    zeros: list[str] = []
    for tensor_name in idle:
        if tensor_name == ROPE_FACTORS:
            continue  # all one, or made into the config's rope scaling
        numbers = file.numbers(tensor_name)
        if numbers is not None and tensor_name.startswith("rope_") and np.all(numbers == 1):
            continue
        if numbers is not None and tensor_name.endswith(".bias") and not np.any(numbers):
            zeros.append(tensor_name)
        else:
            refused.append(tensor_name)
    if refused:
        raise UnsupportedModelError(
            f"{file.name} holds {len(refused)} tensors that transformers has no place for in {type(model).__name__} "
            f"({listed(refused)}): without them it would compute something else. {REMEDY}."
        )
    if zeros:
        return [
            f"{len(zeros)} biases of {file.name} that are zero and have no place were left out, {zeros[0]} among them"
        ]
    return []


def _names_in_use(architecture: str, model: Any) -> Callable[[str], bool] | None:
    """Return what says whether transformers reads a tensor; None where its report of the loading says so."""
    try:
        from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
    except ImportError:
        reported = False
    else:
        reported = architecture in GGUF_ARCHS
    if reported:
        return None
    from transformers import modeling_gguf_pytorch_utils as loader

    processor = loader.TENSOR_PROCESSORS.get(architecture, loader.TensorProcessor)(config={})
    places = loader.get_gguf_hf_weights_map(model, processor)
    # Fused experts are looked up without the suffix; GPT-2's head is put in by name.
    return lambda tensor: (
        tensor in places
        or tensor.removesuffix(".weight") in places
        or (architecture, tensor) == ("gpt2", "output.weight")
    )
