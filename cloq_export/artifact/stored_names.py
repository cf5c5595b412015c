"""Names of tensors in files against names in memory, as transformers maps the one to the other.

Files of many models keep names that their classes no longer use: those of a vision-language wrapper hold
`language_model.model.layers.0...` where the class in memory has `model.language_model.layers.0...`. Adapters, recipes
and fingerprints speak of modules in memory; files keep the names that engines know from the model's own files.
"""

from __future__ import annotations

import functools
import json
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloq_export.artifact.expert_names import expert_names_in_files, fused_places, name_in_memory
from cloq_export.formats.registry import LAYOUTS
from cloq_export.models.experts import split_experts
from cloq_export.models.library_calls import NO_CODE, quiet_transformers
from cloq_export.models.model_class import model_class
from cloq_export.models.weight_names import loaded_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PARTS = frozenset(part for layout in LAYOUTS.values() for part in layout.roles)
# Sizes that cost time where a model is built without numbers; every other size costs nothing there.
_COUNTS = re.compile(r"(layers?|depth|blocks|experts)$")


def has_names_of_its_own(config: Mapping[str, Any]) -> bool:
    """Return whether transformers renames tensors of the class that a config names, or of a part of it."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    architectures = config.get("architectures")
    asked = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    parts = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    asked += [str(part["model_type"]) for part in parts if part.get("model_type")]
    return any(get_checkpoint_conversion_mapping(name) for name in asked)


def names_in_memory(folder: Path, config: Mapping[str, Any], stored: Collection[str]) -> dict[str, str]:
    """Return what the tensors of a checkpoint are called in the class that its config describes.

    Args:
        folder: of the checkpoint.
        config: content of its config.json.
        stored: names of the tensors in its files, packed parts of quantized modules among them.

    Returns:
        dict: stored name -> name in memory, of those that differ; empty if transformers cannot build the model.
    """
    if _largest_count(config) > len(stored):
        return {}
    return dict(_names_in_memory(folder, json.dumps(config, sort_keys=True), tuple(sorted(stored))))


# Verbs open one checkpoint several times.
@functools.lru_cache(maxsize=4)
def _names_in_memory(folder: Path, config: str, stored: tuple[str, ...]) -> Mapping[str, str]:
    import torch
    from transformers import AutoConfig

    try:
        with quiet_transformers(), warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            built = AutoConfig.from_pretrained(folder, **NO_CODE)
            model = model_class(str(folder), built)._from_config(built)
        split_experts(model)
    except Exception:  # a caller that needs the model builds it too and reports the error
        return {}
    return renamed_in(model, stored)


def renamed_in(model: PreTrainedModel, stored: Collection[str]) -> dict[str, str]:
    """Return what tensors in files are called in a model, as transformers' loader maps them.

    Args:
        model: the model, with or without numbers.
        stored: names in files, packed parts of quantized modules among them.

    Returns:
        dict: stored name -> name in memory, of those that differ.
    """
    mixtures = fused_places(model)
    places: Mapping[str, Any] = {**model.state_dict(), **mixtures}

    def weight_of(name: str) -> str:
        module, _, part = name.rpartition(".")
        return f"{module}.weight" if part in _PARTS and name not in places else name

    in_memory: dict[str, str] = {}
    taken = set(stored)
    for name, asked, renamed, pattern, patterns, *_ in loaded_names(model, stored, places, weight_of):
        if pattern is not None:
            renamed = name_in_memory(asked, renamed, mixtures.get(renamed), patterns, pattern) or asked
        if renamed not in places or renamed == asked:
            continue
        if asked != name:
            if not renamed.endswith(".weight"):
                continue
            renamed = f"{renamed.removesuffix('.weight')}.{name.rpartition('.')[2]}"
        if renamed not in taken:
            in_memory[name] = renamed
            taken.add(renamed)
    return in_memory


def stored_names(model: PreTrainedModel, names: Iterable[str], modules: Iterable[str]) -> dict[str, str]:
    """Return what a model's own files call its tensors and modules, as `save_pretrained` would write them.

    Only what is read back under its own name is renamed; a tensor that transformers cuts or joins when it saves keeps
    its name in memory, under which transformers reads it too.

    Args:
        model: the float model, best as `from_pretrained` gave it: it knows which names its files had.
        names: of tensors in memory.
        modules: of quantized modules in memory, whose tensors in files have other parts than a weight.

    Returns:
        dict: name of a tensor or module in memory -> its name in files, of those that differ.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming, rename_source_key

    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        # No file of this model has an optional prefix.
        mapped = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [entry for entry in mapped if not isinstance(entry, PrefixChange)]
    backwards = [entry.reverse_transform() for entry in conversions[::-1] if isinstance(entry, WeightRenaming)]
    asked = {name: name for name in names} | {module: f"{module}.weight" for module in modules}
    single_experts = expert_names_in_files(model, conversions)
    mixtures = {fused.rpartition(".")[0] for fused in fused_places(model)}
    in_files: dict[str, str] = {}
    for name, tensor in asked.items():
        module, _, part = tensor.rpartition(".")
        renamed = rename_source_key(tensor, backwards, [], reverse=True)[0]
        owner = next((place for place in mixtures if tensor.startswith(f"{place}.")), None)
        if module in single_experts:
            renamed = f"{single_experts[module]}.{part}"
        elif owner is not None:
            # Rules for other layers of the same names do not hold for experts that files hold fused.
            place = rename_source_key(f"{owner}.weight", backwards, [], reverse=True)[0].removesuffix(".weight")
            renamed = place + tensor.removeprefix(owner)
        if renamed != tensor and (tensor == name or renamed.endswith(".weight")):
            in_files[name] = renamed
    # A name that reading does not map back to itself is not renamed.
    back = renamed_in(model, set(in_files.values()))
    kept = {name for name, renamed in in_files.items() if back.get(renamed) == asked[name]}
    return {
        name: renamed if asked[name] == name else renamed.removesuffix(".weight")
        for name, renamed in in_files.items()
        if name in kept
    }


def _largest_count(config: Any) -> int:
    """Return the largest number in a config that says how many modules a model has."""
    largest, open_parts = 0, [config]
    # Without recursion: an untrusted config may be nested to any depth.
    while open_parts:
        part = open_parts.pop()
        if not isinstance(part, Mapping):
            continue
        open_parts += part.values()
        counts = (value for key, value in part.items() if isinstance(value, int) and _COUNTS.search(str(key)))
        largest = max(largest, *counts, 0)
    return largest
