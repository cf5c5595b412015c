"""Adapters that name fused experts (PEFT's `target_parameters`) over packed models, whose experts are split."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key
from torch import nn

from cloq_export.artifact.expert_names import expert_stacks
from cloq_export.errors import FormatError
from cloq_export.formats.peft import tensor_name
from cloq_export.formats.peft.stacked import ExpertStack, StackedPair, side_names, unstack_pairs


def target_split_experts(config: Any, model: nn.Module) -> None:
    """Let a LoRA config name the layers of single experts where it names fused tensors, of the same rank and alpha.

    Args:
        config: of PEFT; it is changed.
        model: packed, its experts split.

    Raises:
        FormatError: the config names a tensor that the model has not.
    """
    wanted = set(getattr(config, "target_parameters", None) or ())
    if not wanted:
        return
    layers = {
        stack.parameter: [name for expert in range(stack.experts) for name in stack.linears(expert)]
        for stack in expert_stacks(model)
    }
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    layers |= {f"{name}.weight": [name] for name in linears}
    meant = {
        parameter: names
        for parameter, names in layers.items()
        if any(parameter == target or parameter.endswith(f".{target}") for target in wanted)
    }
    for target in sorted(wanted):
        if not any(parameter == target or parameter.endswith(f".{target}") for parameter in meant):
            raise FormatError(
                f"target_parameters names {target:.200}, and {type(model).__name__} has no experts or linear layers of "
                "that name; name those of config.json's model, e.g. experts.gate_up_proj and experts.down_proj."
            )
    for option, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        patterns = dict(getattr(config, option, None) or {})

        def value(name: str, patterns: Mapping[str, Any] = patterns, default: str = default) -> Any:
            return patterns.get(get_pattern_key(patterns, name), getattr(config, default))

        own = {name: value(parameter) for parameter, names in meant.items() for name in names}
        # The first that matches counts.
        exact = {re.escape(name): number for name, number in own.items() if number != value(name)}
        # PEFT warns of patterns that match no module.
        kept = {
            pattern: number
            for pattern, number in patterns.items()
            if not _matches(pattern, meant) or _matches(pattern, linears)
        }
        setattr(config, option, {**exact, **kept})
    names = {name for of_one in meant.values() for name in of_one}
    modules = config.target_modules
    if not isinstance(modules, str):
        config.target_modules = {*(modules or ()), *names}
    elif modules.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        config.target_modules = "|".join([f"(?:{modules})", *map(re.escape, sorted(names))])
    config.target_parameters = None


def split_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors, those of stacked pairs as pairs of single experts.

    Args:
        model: packed, its experts split.
        tensors: as an adapter's file has them.

    Raises:
        FormatError: a stacked pair fits none of its module's tensors.
    """
    split = dict(tensors)
    of_mixture: dict[str, list[ExpertStack]] = {}
    for stack in expert_stacks(model):
        of_mixture.setdefault(stack.mixture, []).append(stack)
    for mixture, stacks in of_mixture.items():
        if tensor_name(mixture, "A") not in split:
            continue
        inside = side_names(stacks)
        whole = all(tensor_name(place, "A") in split for place in inside.values())
        adapted = stacks if whole else [stack for stack in stacks if _fits(model, stack, split)]
        if len(adapted) != 1 and not whole:
            raise FormatError(
                f"the pair of {mixture} fits {len(adapted)} of its tensors {', '.join(one.parameter for one in stacks)}"
                "; give the adapter a pair for each of them."
            )
        for stack in adapted:
            place = inside[stack.parameter] if whole else mixture
            lora_a, lora_b = (split.pop(tensor_name(place, side)) for side in ("A", "B"))
            rank = len(lora_a) // stack.experts
            pairs = unstack_pairs(stack, StackedPair(lora_a, lora_b, rank, float(rank)), "the adapter")
            for name, pair in pairs.items():
                split |= {tensor_name(name, "A"): pair.lora_A, tensor_name(name, "B"): pair.lora_B}
    return split


def _matches(pattern: str, names: Iterable[str]) -> bool:
    return any(get_pattern_key([pattern], name) == pattern for name in names)


def _fits(model: nn.Module, stack: ExpertStack, tensors: Mapping[str, torch.Tensor]) -> bool:
    lora_a, lora_b = (tensors[tensor_name(stack.mixture, side)] for side in ("A", "B"))
    linears: list[Any] = [model.get_submodule(name) for name in stack.linears(0)]
    outputs = sum(linear.out_features for linear in linears)
    sizes = (lora_a.shape[1], lora_b.shape[0])
    return sizes == ((outputs, linears[0].in_features) if stack.turned else (linears[0].in_features, outputs))
