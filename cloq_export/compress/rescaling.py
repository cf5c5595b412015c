"""Bring weights that float16 scales cannot hold into their range, where a neighbour takes over the factor exactly.

`v_proj` and `o_proj`, and `up_proj` and `down_proj` of a gated network, meet in a product that is linear in both: what
a row of the first is multiplied by, the matching column of the second can be divided by. Powers of two change no digit
of a weight, and the model is run before and after to see that it says the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cloq_export.compress.plan import ModulePlan
from cloq_export.models.blocks import BlockList, find_linears
from cloq_export.models.weights_on_disk import in_memory, times, weights_on_disk
from cloq_export.quantize import LOST_SHARE, exceeds_float16, lost_energy, lost_groups
from cloq_export.types import QuantSpec

# What lies between the two must pass a factor through unchanged. Names only say where to try; a test run decides.
_NEIGHBOURS = (("v_proj", "o_proj"), ("v_proj", "out_proj"), ("up_proj", "down_proj"))
_PROBE_TOKENS = 16
# Of the largest logit. Powers of two change nothing at all, unless a kernel sums in another order.
_TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Two neighbours, and the factors that balance them.

    Args:
        names: full module names of the first and the second.
        linears: the two.
        parent: class of the module that holds them: what stands between them is its doing.
        factors: powers of two that both weights are multiplied by: (out of the first, 1) and (in of the second),
            float64.
        is_exact: whether the dtype of the weights can hold them multiplied without loss.
    """

    names: tuple[str, str]
    linears: tuple[nn.Linear, nn.Linear]
    parent: type[nn.Module]
    factors: tuple[torch.Tensor, torch.Tensor]
    is_exact: bool

    @classmethod
    def of(
        cls,
        names: tuple[str, str],
        linears: tuple[nn.Linear, nn.Linear],
        parent: type[nn.Module],
        exponents: torch.Tensor,
        columns: torch.Tensor,
    ) -> _Pair:
        """Return the pair for what each row of the first is multiplied by.

        Args:
            names: as in the class.
            linears: as in the class, their weights in memory.
            parent: as in the class.
            exponents: of two, (out of the first) float64.
            columns: for each column of the second, the row of the first that it meets, (in of the second).
        """
        factors = torch.exp2(exponents)[:, None], 1.0 / torch.exp2(exponents)[columns]
        weights = [linear.weight.detach() for linear in linears]
        exact = all(
            torch.equal(times(times(weight, factor), 1.0 / factor), weight)
            for weight, factor in zip(weights, factors, strict=True)
        )
        return cls(names, linears, parent, factors, exact)

    def move(self, model: nn.Module, *, back: bool = False) -> None:
        """Multiply both weights by their factors, or undo that."""
        on_disk = weights_on_disk(model)
        for name, linear, factor in zip(self.names, self.linears, self.factors, strict=True):
            weight = f"{name}.weight"
            if on_disk is not None and weight in on_disk:
                on_disk.multiply(weight, 1.0 / factor if back else factor)
            else:
                linear.weight.data = times(linear.weight.detach(), 1.0 / factor if back else factor)


def rescale_neighbours(model: nn.Module, blocks: BlockList, planned: Mapping[str, ModulePlan]) -> list[str]:
    """Move powers of two between neighbours of a model in memory where codes could not hold the weights otherwise.

    Args:
        model: the float model; its function stays what it was.
        blocks: its decoder blocks.
        planned: the layers that are to be quantized. Others are not touched, and neither is a pair whose first layer
            has a bias: so no tensor that stays float changes.

    Returns:
        What was done, in plain words; empty for ordinary weights.
    """
    notes: list[str] = []
    for neighbours in _NEIGHBOURS:
        pairs = list(_pairs_to_balance(blocks, planned, neighbours))
        if pairs and _move(model, pairs):
            first, second = neighbours
            notes.append(
                f"float16 scales cannot hold {first} of {len(pairs)} layers (the first {pairs[0].names[0]}) beside "
                f"{second}: rows of {first} were multiplied by powers of two (2^{_extreme(pairs, 'amin')} to "
                f"2^{_extreme(pairs, 'amax')}) and the matching columns of {second} divided by them, which leaves "
                "the model's function exactly as it is"
            )
    return notes


def _pairs_to_balance(
    blocks: BlockList, planned: Mapping[str, ModulePlan], neighbours: tuple[str, str]
) -> Iterator[_Pair]:
    for index, block in enumerate(blocks):
        with in_memory(block):
            yield from _pairs_of_block(block, blocks.prefix(index), planned, neighbours)


def _pairs_of_block(
    block: nn.Module, prefix: str, planned: Mapping[str, ModulePlan], neighbours: tuple[str, str]
) -> Iterator[_Pair]:
    linears = find_linears(block, prefix)
    for name, first in linears.items():
        parent, _, last = name.rpartition(".")
        beside = f"{parent}.{neighbours[1]}"
        if last != neighbours[0] or getattr(first, "bias", None) is not None or beside not in linears:
            continue
        if name not in planned or beside not in planned:
            continue
        second = linears[beside]
        holder = block.get_submodule(parent.removeprefix(prefix).removeprefix("."))
        columns = _matching_rows(first, second, holder)
        if columns is None:
            continue
        exponents = _exponents(first, second, columns, planned[name].spec, planned[beside].spec)
        if exponents is not None:
            yield _Pair.of((name, beside), (first, second), type(holder), exponents, columns)


def _matching_rows(first: nn.Linear, second: nn.Linear, parent: nn.Module) -> torch.Tensor | None:
    """Return for each input of the second the output of the first that it comes from, or None if that is not known."""
    rows, columns = first.out_features, second.in_features
    if rows == columns:
        return torch.arange(rows)
    head = getattr(parent, "head_dim", None)
    if not isinstance(head, int) or head < 1 or rows % head or columns % rows:
        return None
    # Grouped queries: the heads of a group lie side by side and read one head of values.
    return torch.arange(rows).view(-1, 1, head).expand(-1, columns // rows, -1).reshape(-1)


def _exponents(
    first: nn.Linear, second: nn.Linear, columns: torch.Tensor, first_spec: QuantSpec, second_spec: QuantSpec
) -> torch.Tensor | None:
    """Return the exponents that balance what codes could not hold, 0 elsewhere; None if that is next to nothing.

    What a row counts is the product of its norm and that of the columns that it meets: no rescaling changes that.
    """
    above, below = (linear.weight.detach() for linear in (first, second))
    lost_above, lost_below = lost_groups(above, first_spec), lost_groups(below, second_spec)
    large = exceeds_float16(above) or exceeds_float16(below)
    if not large and not bool(lost_above.any()) and not bool(lost_below.any()):
        return None

    def met(of_columns: torch.Tensor) -> torch.Tensor:
        return torch.zeros(above.shape[0], dtype=torch.float64).index_add_(0, columns, of_columns.to(torch.float64))

    row_energy = above.to(torch.float64).square().sum(1)
    column_energy = met(below.to(torch.float64).square().sum(0))
    lost_rows = lost_energy(above, lost_above).sum(1) > 0.5 * row_energy
    lost_columns = met(lost_energy(below, lost_below).sum(0)) > 0.5 * column_energy
    moved = lost_rows | lost_columns | large
    moved &= (row_energy > 0) & (column_energy > 0)
    counts = row_energy * column_energy
    if not bool(moved.any()) or float(counts[moved].sum()) <= LOST_SHARE * float(counts.sum()):
        return None
    each_row = row_energy / above.shape[1]
    each_column = column_energy / (below.shape[0] * (columns.numel() // above.shape[0]))
    exponents = ((torch.log2(each_column) - torch.log2(each_row)) / 4.0).round()
    exponents = torch.where(moved, exponents, 0.0)
    return exponents if bool(exponents.any()) else None


def _move(model: nn.Module, pairs: Sequence[_Pair]) -> bool:
    """Rescale the pairs, and undo it if the model then says something else or nothing tells; return whether it was."""
    if not all(pair.is_exact for pair in pairs):
        return False
    tried: set[type[nn.Module]] = set()
    handles = [
        pair.linears[1].register_forward_pre_hook(lambda _, __, parent=pair.parent: tried.add(parent)) for pair in pairs
    ]
    try:
        before = _says(model)
    finally:
        for handle in handles:
            handle.remove()
    # Experts are reached by some tokens only, but all of a class compute alike.
    if before is None or not tried.issuperset(pair.parent for pair in pairs):
        return False
    for pair in pairs:
        pair.move(model)
    after = _says(model)
    if after is not None and bool((after - before).abs().max() <= _TOLERANCE * before.abs().max()):
        return True
    for pair in pairs:
        # Powers of two, and tried before: what comes back is what was there.
        pair.move(model, back=True)
    return False


def _says(model: nn.Module) -> torch.Tensor | None:
    """Return the logits of a few tokens, or None where they are no numbers or the model wants more than tokens."""
    find: Any = getattr(model, "get_input_embeddings", lambda: None)()
    rows = getattr(find, "num_embeddings", _PROBE_TOKENS)
    device = next(model.parameters()).device
    ids = torch.arange(_PROBE_TOKENS, device=device)[None] * max(1, rows // _PROBE_TOKENS) % rows
    try:
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits.to(torch.float64)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None
    return logits if bool(torch.isfinite(logits).all()) else None


def _extreme(pairs: Sequence[_Pair], which: str) -> int:
    exponents = torch.cat([torch.log2(pair.factors[0]).round().flatten() for pair in pairs])
    return int(getattr(exponents[exponents != 0], which)())
