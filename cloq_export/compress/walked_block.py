"""One block on the walk through a model: its layers, the groups that are still to be solved, and where batches wait."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from cloq_export.compress.expert_tokens import ExpertTokens
from cloq_export.compress.plan import ModulePlan


@dataclasses.dataclass(frozen=True)
class Stop:
    """Where all batches wait for each other on their way through a block.

    Args:
        modules: whose inputs are waited for.
        group: names of layers that share the input and are solved there.
        mixture: name of a mixture whose experts follow, instead of a group.
    """

    modules: list[nn.Module]
    group: tuple[str, ...] = ()
    mixture: str = ""


@dataclasses.dataclass(frozen=True)
class WalkedBlock:
    """One block while its layers are solved.

    Args:
        index: its number.
        linears: full module name -> layer.
        plans: full module name -> plan, of the layers that are quantized.
        original: full module name -> float weight.
        tokens: tokens of the block for experts that saw too few of their own.
        groups: names of layers that share an input and are still to be solved.
    """

    index: int
    linears: Mapping[str, nn.Linear]
    plans: Mapping[str, ModulePlan]
    original: Mapping[str, torch.Tensor]
    tokens: ExpertTokens
    groups: tuple[tuple[str, ...], ...] = ()

    def width(self, group: Sequence[str]) -> int:
        """Return the number of inputs of a group's layers."""
        return self.linears[group[0]].in_features

    def stops(self) -> list[Stop]:
        """Return the groups in order, and before the first group of a mixture's experts the mixture itself."""
        stops: list[Stop] = []
        for group in self.groups:
            mixture = self.tokens.mixture_of(group[0])
            if mixture and all(stop.mixture != mixture for stop in stops):
                stops.append(Stop([self.tokens.mixtures[mixture]], mixture=mixture))
            stops.append(Stop([self.linears[name] for name in group], group))
        return stops
