"""Names of single experts in files, by the rules with which transformers joins them into its fused tensors.

Files of most mixtures hold experts one by one, under names that differ between families (`experts.3.gate_proj.weight`,
`experts.3.w1.weight`); transformers knows how to stack them. Where files hold them fused, single experts keep their
names in memory, which is what other quantizers write for such families.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from cloq_export.formats.peft.stacked import ExpertStack
from cloq_export.models.experts import SplitExperts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ANY = "*"


def expert_stacks(model: nn.Module) -> list[ExpertStack]:
    """Return the fused tensors of a model's class whose experts are split, those of one module in its order."""
    return [
        ExpertStack(
            f"{name}.{fused}",
            len(module),
            parts,
            interleaved=module.storage.interleaved and len(parts) > 1,
            # PEFT asks the class, by the name that transformers' decorator gives it.
            turned=module.storage.transposed and not getattr(module.family, "is_transposed", False),
        )
        for name, module in model.named_modules()
        if isinstance(module, SplitExperts)
        for fused, parts in module.parts.items()
    ]


def fused_places(model: PreTrainedModel) -> dict[str, SplitExperts]:
    """Return the fused tensors that a model would have if its experts were not split -> where they are now."""
    return {
        f"{name}.{fused}": module
        for name, module in model.named_modules()
        if isinstance(module, SplitExperts)
        for fused in module.parts
    }


def expert_names_in_files(model: PreTrainedModel, conversions: Sequence[Any]) -> dict[str, str]:
    """Return single expert's linear in memory -> its name in files, of those that files hold one by one.

    Args:
        model: the model, its experts split.
        conversions: as transformers loaded it, see `stored_names`.
    """
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    backwards = [entry.reverse_transform() for entry in conversions[::-1]]
    renamings = [entry for entry in backwards if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in backwards if not isinstance(entry, WeightRenaming)]
    stored: dict[str, str] = {}
    for fused, mixture in fused_places(model).items():
        owner, _, tensor = fused.rpartition(".")
        parts = mixture.parts[tensor]
        first, used = rename_source_key(fused, renamings, converters, reverse=True)
        known = (entry.target_patterns for entry in converters if used in entry.source_patterns)
        patterns: list[str] = next(known, [])
        if used is None or len(patterns) != len(parts) or not all(_ANY in one for one in patterns):
            continue
        for part, pattern in zip(parts, patterns, strict=True):
            name = first.replace(patterns[0], pattern, 1)
            for number in range(len(mixture)):
                in_files = name.replace(_ANY, str(number)).removesuffix(".weight")
                stored[f"{owner}.{number}.{part}"] = in_files
    return stored


def name_in_memory(
    stored: str, fused: str, mixture: SplitExperts | None, patterns: Sequence[str], used: str
) -> str | None:
    """Return what the weight of a single expert in files is called in memory; None if it is none.

    Args:
        stored: name in the files, e.g. "model.layers.0.mlp.experts.3.up_proj.weight".
        fused: the tensor that transformers would put it into, e.g. "model.layers.0.mlp.experts.gate_up_proj".
        mixture: the experts that would hold that tensor; None if it is another kind of tensor.
        patterns: what is put into that tensor, one pattern for each projection, in order.
        used: the pattern that the name matched.
    """
    number = re.search(used.replace(f"{_ANY}.", r"(\d+)\."), stored)
    owner, _, tensor = fused.rpartition(".")
    if mixture is None or number is None or not number.groups() or len(patterns) != len(mixture.parts[tensor]):
        return None
    return f"{owner}.{int(number[1])}.{mixture.parts[tensor][list(patterns).index(used)]}.weight"
