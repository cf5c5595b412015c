"""What calibrates the experts that a router sends too few tokens: their own, and some of all tokens of their block.

An expert that saw t tokens, fewer than it has inputs n, has an H of rank t at most, and codes that fit those tokens
alone. It is given the mixture `H + (n - t) / s * S`, where S is the Gram matrix of s tokens of the block as the expert
would meet them: for its down projection, what its own gate and up make of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from cloq_export.calibrate.gram import GramAccumulator
from cloq_export.models.experts import DOWN, SplitExperts
from cloq_export.types import LayerStats


class ExpertTokens:
    """A sample of the tokens that each mixture of one block is given, spread evenly over all batches.

    Args:
        block: the block.
        prefix: dotted path of the block inside the model.
        batches: how many batches of tokens there are.
    """

    def __init__(self, block: nn.Module, prefix: str, batches: int) -> None:
        self.mixtures: Mapping[str, SplitExperts] = {
            f"{prefix}.{name}": module for name, module in block.named_modules() if isinstance(module, SplitExperts)
        }
        self._batches = batches
        self._kept: dict[str, list[torch.Tensor]] = {name: [] for name in self.mixtures}

    def keep(self, mixture: str, inputs: torch.Tensor) -> None:
        """Keep some tokens of one batch.

        Args:
            mixture: full name of the mixture.
            inputs: what it is given.
        """
        module = self.mixtures[mixture]
        tokens = module.inputs_of_all(inputs)
        widest = max(linear.in_features for linear in module.modules() if isinstance(linear, nn.Linear))
        wanted = min(len(tokens), -(-widest // self._batches))
        rows = torch.linspace(0, len(tokens) - 1, wanted, device=tokens.device).round().to(torch.int64)
        self._kept[mixture].append(tokens[rows].detach())

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Keep tokens of every batch that goes through the block meanwhile."""
        handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: self.keep(name, args[0]))
            for name, module in self.mixtures.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def completed(self, layer: str, stats: LayerStats, accumulator: Callable[[], GramAccumulator]) -> LayerStats:
        """Return statistics that other tokens of the block complete, if the layer is an expert's and saw too few.

        Call it with the weights in place that the layer will be solved behind, in the arithmetic of its products.

        Args:
            layer: full module name.
            stats: of the layer's own tokens.
            accumulator: makes one like that of `stats`.
        """
        mixture = self.mixture_of(layer)
        missing = stats.in_features - stats.tokens
        if not mixture or missing <= 0 or not self._kept[mixture] or self.mixtures[mixture].calls == "all":
            return stats
        number, _, projection = layer.removeprefix(f"{mixture}.").partition(".")
        tokens = torch.cat(self._kept[mixture])
        block = accumulator()
        with torch.no_grad():
            block.add(self.mixtures[mixture].expert(int(number)).activated(tokens) if projection == DOWN else tokens)
        lent = block.stats()
        return dataclasses.replace(stats, gram=stats.gram + lent.gram * (missing / len(tokens)), lent_tokens=missing)

    def mixture_of(self, layer: str) -> str:
        """Return the name of the mixture that a layer belongs to; empty if it is no expert's."""
        return next((mixture for mixture in self.mixtures if layer.startswith(f"{mixture}.")), "")
