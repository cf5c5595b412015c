"""Which linear layers stay float without being asked to, and which get no adapter, each with its reason."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from cloq_export.errors import ShapeError
from cloq_export.formats.registry import LAYOUTS
from cloq_export.models.blocks import BlockList
from cloq_export.types import QuantSpec

if TYPE_CHECKING:
    from cloq_export.compress.plan import ModelPlan

# Share of the weights of all linear layers above which layers that do not fit are a mistake in the recipe.
MOST_UNFIT = 0.1
# PEFT knows a layer by its first name alone, and would put the adapter on its first use.
SHARED = "several blocks share its weight"
# A layer with fewer inputs or outputs than this share of the model's width is a gate, or one half of a low rank: what
# codes would save is negligible, and what they would cost in accuracy is not.
_GATE_SHARE = 1 / 16
# Mamba's first form multiplies their weight without calling the layer, so codes would not be used.
_NOT_CALLED = "dt_proj"
# Of these families PEFT refuses an adapter on the layer, because kernels multiply its weight without calling it.
_MAMBAS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_UNADAPTED = "out_proj"
_SHOWN_KINDS = 8


def spared_reason(name: str, linear: nn.Linear, blocks: BlockList) -> str:
    """Return why a linear layer stays float in every run that does not name it; empty if it does not.

    Args:
        name: of the layer.
        linear: the layer.
        blocks: of its model.
    """
    for side, size in (("inputs", linear.in_features), ("outputs", linear.out_features)):
        if size < _GATE_SHARE * blocks.hidden_size:
            return f"a gate of {size} {side}"
    if name.rpartition(".")[2] == _NOT_CALLED:
        return "its weight is multiplied without the layer being called"
    return ""


def layout_fault(name: str, linear: nn.Linear, spec: QuantSpec, format: str) -> str:
    """Return why a layout cannot hold a layer on a grid; empty if it can.

    Args:
        name: of the layer.
        linear: the layer.
        spec: its grid.
        format: the layout.
    """
    try:
        spec.group_count(linear.in_features)
    except ShapeError as error:
        return f"{name}: {error} `overrides='{name}:skip=true'` leaves it in float."
    try:
        LAYOUTS[format].check_packable(linear.out_features, linear.in_features, spec, name=name)
    except ShapeError as error:
        return str(error)
    return ""


def short_reason(name: str, fault: str) -> str:
    """Return a fault of `layout_fault` without the layer's name and without what could be done."""
    without_name = fault.removeprefix(f"{name} ").removeprefix(f"{name}: ")
    return without_name.partition(". ")[0].partition("; choose")[0].removeprefix("has ")


def adapter_fault(name: str, blocks: BlockList) -> str:
    """Return why PEFT puts no adapter on a layer; empty if it does."""
    if blocks.model_type in _MAMBAS and name.rpartition(".")[2] == _UNADAPTED:
        return f"PEFT refuses it in models of the type {blocks.model_type}"
    return ""


def describe_left_float(plan: ModelPlan) -> list[str]:
    """Return in plain words what stays float by itself, with its share of the weights, and what gets no adapter.

    Args:
        plan: of a model.
    """
    lines = []
    if plan.spared:
        share = sum(plan.sizes[name] for name in plan.spared) / sum(plan.sizes.values())
        lines.append(
            f"{len(plan.spared)} of {len(plan.sizes)} linear layers stay float by themselves, {share:.2%} of their "
            f"weights: {_by_kind(plan.spared)}"
        )
    if plan.unadapted:
        lines.append(f"{len(plan.unadapted)} layers get no adapter: {_by_kind(plan.unadapted)}")
    return lines


def _by_kind(reasons: Mapping[str, str]) -> str:
    kinds: dict[str, collections.Counter[str]] = {}
    for name, reason in reasons.items():
        kinds.setdefault(reason, collections.Counter())[name.rpartition(".")[2]] += 1
    texts = [f"{', '.join(sorted(names))} ({reason})" for reason, names in kinds.items()]
    more = f", and others for {len(texts) - _SHOWN_KINDS} more reasons" if len(texts) > _SHOWN_KINDS else ""
    return "; ".join(texts[:_SHOWN_KINDS]) + more
