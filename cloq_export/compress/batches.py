"""Windows in the batches of forward passes: those that judge are in batches of their own."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Batches:
    """Windows one behind the other, those that judge last.

    Args:
        windows: token ids, (windows, seqlen) int64.
        sizes: how many windows each forward pass takes.
        judging: the batches that judge.
    """

    windows: torch.Tensor
    sizes: tuple[int, ...]
    judging: range

    @classmethod
    def of(cls, trained: torch.Tensor, judging: torch.Tensor, at_once: int) -> Batches:
        """Return the batches of windows that are solved or trained on, and of those that judge.

        Args:
            trained: token ids, (windows, seqlen) int64.
            judging: the same; none where nothing is judged.
            at_once: windows of a forward pass, at most.
        """
        sizes = [
            tuple(min(at_once, len(windows) - start) for start in range(0, len(windows), at_once))
            for windows in (trained, judging)
        ]
        first, last = len(sizes[0]), len(sizes[0]) + len(sizes[1])
        return cls(torch.cat([trained, judging]), (*sizes[0], *sizes[1]), range(first, last))
