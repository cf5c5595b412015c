"""Whether the headers of weight files fit the class that they are for, asked before a number is read."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from cloq_export.errors import SourceError
from cloq_export.models.experts import holds_fused_experts
from cloq_export.models.weight_files import WeightFiles
from cloq_export.models.weight_names import NameInMemory, loaded_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What transformers does to tensors of single experts: stack them, and put gate and up together.
_STACKING, _JOINING = "MergeModulelist", {"MergeModulelist", "Concatenate"}
# Of the numbers in files: those of a model that ties all it can.
_TIED = 2


def refuse_misfits(name: str, empty: PreTrainedModel, files: WeightFiles) -> None:
    """Refuse weight files that a class cannot be filled from, where reading them would not say it, or say it late.

    What is not stacked of several tensors is compared again when it was loaded (`loaded_weights.refuse_gaps`).

    Args:
        name: of the model, for messages.
        empty: of its class, without numbers.
        files: its weight files.

    Raises:
        SourceError: experts are not alike, some are missing, a tensor has another shape than its place, or the config
            describes a far larger model.
    """
    state = empty.state_dict()
    found: dict[str, list[NameInMemory]] = collections.defaultdict(list)
    for entry in loaded_names(empty, files.headers, state):
        if entry.name in state:
            found[entry.name].append(entry)
    others: list[str] = []
    for place, entries in found.items():
        if _STACKING in entries[0].operations:
            _refuse_uneven(name, entries, tuple(state[place].shape), files)
        elif entries[0].pattern is None and len(entries) == 1:
            held, shape = files.headers[entries[0].stored][1], tuple(state[place].shape)
            if held != shape:
                others.append(f"{place} among them ({held}, and not {shape})")
    if others:
        raise SourceError(
            f"{name} holds {len(others)} weights of other shapes than {type(empty).__name__} has, {others[0]}; its "
            "config.json is another model's. Fetch it again."
        )
    parameters = {id(each): each.numel() for each in empty.parameters()}
    stored = sum(torch.Size(shape).numel() for _, shape in files.headers.values())
    filled = {made for entries in found.values() for entry in entries for made in entry.made}
    absent = sorted(set(dict(empty.named_parameters())) - filled)
    fused = {
        f"{module}.{tensor}"
        for module, each in empty.named_modules()
        if holds_fused_experts(each)
        for tensor, _ in each.named_parameters(recurse=False)
    }
    if fused.intersection(absent) or (absent and sum(parameters.values()) > _TIED * stored):
        raise SourceError(
            f"{name} lacks {len(absent)} weights of {type(empty).__name__}, {absent[0]} among them: its files hold "
            f"{stored} numbers, and the model that its config.json describes has {sum(parameters.values())}. Fetch it "
            "again."
        )


def _refuse_uneven(name: str, entries: list[NameInMemory], shape: tuple[int, ...], files: WeightFiles) -> None:
    """Refuse tensors that are stacked to one of a shape and are not alike, or too many, or too few."""
    of_pattern: Mapping[str | None, list[str]] = {
        pattern: [entry.stored for entry in entries if entry.pattern == pattern]
        for pattern in dict.fromkeys(entry.pattern for entry in entries)
    }
    usual: list[tuple[int, ...]] = []
    for stored in of_pattern.values():
        shapes = collections.Counter(files.headers[each][1] for each in stored)
        usual.append(shapes.most_common(1)[0][0])
        other = next((each for each in stored if files.headers[each][1] != usual[-1]), None)
        if other is not None:
            like = next(each for each in stored if files.headers[each][1] == usual[-1])
            raise SourceError(
                f"the experts of {name} disagree: {other} has shape {files.headers[other][1]}, and {like} has "
                f"{usual[-1]}; the model is damaged. Fetch it again."
            )
        if len(stored) != shape[0]:
            raise SourceError(
                f"{name} holds {len(stored)} tensors such as {stored[0]}, and its config.json describes {shape[0]} "
                "experts; some are missing or too many, or the config is another model's. Fetch it again."
            )
    joined = (sum(each[0] for each in usual if each), *usual[0][1:])
    if set(entries[0].operations) <= _JOINING and joined != shape[1:]:
        raise SourceError(
            f"{entries[0].stored} of {name} has shape {usual[0]}, of which no {shape[1:]} can be made as its "
            "config.json describes; one of them is another model's. Fetch it again."
        )
