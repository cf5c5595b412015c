"""Low-rank adapters of one layer in the layout of the native CPU library."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from cloq_export.kernels.cpu import library
from cloq_export.kernels.cpu.weight import DTYPES, LANES


@dataclasses.dataclass(frozen=True)
class CpuLora:
    """Low-rank adapters of one layer in the kernels' layout; made by `pack_lora` or `allocate_lora`.

    Where several layers are computed as one (q, k and v; gate and up), each is a slice of the outputs, and every
    adapter has an A and a rank of its own there.

    Args:
        a: (adapters, slices, rank, in), any of float32, bfloat16, float16.
        b: (adapters, blocks, rank, 16), same dtype: B in blocks of sixteen output channels.
        scaling: (adapters) float32, the factor in front of B A.
        ranks: (adapters, slices) int32, how many of the rank rows of A, and columns of B, count; 0 adds nothing.
        ends: (slices) int32, the block after each slice.

    Raises:
        ValueError: the tensors do not belong together.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: torch.Tensor
    ranks: torch.Tensor
    ends: torch.Tensor

    def __post_init__(self) -> None:
        _check_lora(self.a, self.b, self.scaling, self.ranks, self.ends)

    def structure(self, index: torch.Tensor | None) -> library.LoraStructure:
        """Return the adapters as the library takes them, while this object and the index live."""
        return library.LoraStructure(
            self.a.data_ptr(),
            self.b.data_ptr(),
            self.scaling.data_ptr(),
            self.ranks.data_ptr(),
            self.ends.data_ptr(),
            None if index is None else index.data_ptr(),
            *self.a.shape[:3],
            DTYPES[self.a.dtype],
        )


def pack_lora(lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: torch.Tensor) -> CpuLora:
    """Bring the adapters of a layer into the kernels' layout.

    Args:
        lora_a: (adapters, rank, in) float32, bfloat16 or float16.
        lora_b: (adapters, out, rank), same dtype.
        scaling: (adapters), alpha / rank of each.

    Returns:
        CpuLora: the adapters; B is copied.

    Raises:
        ValueError: the tensors do not belong together.
    """
    if lora_a.ndim != 3 or lora_b.ndim != 3 or lora_a.shape[0] != lora_b.shape[0]:
        raise ValueError(
            f"adapters are A (adapters, rank, in) and B (adapters, out, rank); got {tuple(lora_a.shape)} and "
            f"{tuple(lora_b.shape)}."
        )
    if lora_a.shape[1] != lora_b.shape[2] or lora_a.dtype != lora_b.dtype:
        raise ValueError(
            f"A {tuple(lora_a.shape)} {lora_a.dtype} and B {tuple(lora_b.shape)} {lora_b.dtype} disagree about the "
            "rank or the dtype."
        )
    adapters, _, rank = lora_b.shape
    blocked = _lora_in_blocks(lora_b)
    return CpuLora(
        lora_a.unsqueeze(1).contiguous(),
        blocked,
        scaling.to(torch.float32).contiguous(),
        torch.full((adapters, 1), rank, dtype=torch.int32),
        torch.tensor([blocked.shape[1]], dtype=torch.int32),
    )


def allocate_lora(adapters: int, rank: int, in_features: int, outputs: Sequence[int], dtype: torch.dtype) -> CpuLora:
    """Return room for adapters of a layer, none of which adds anything until `place_adapter` fills it.

    Args:
        adapters: how many.
        rank: the largest of an adapter.
        in_features: inputs of the layer.
        outputs: of every slice; all but the last a multiple of 16.
        dtype: of A and B, float32, bfloat16 or float16.

    Returns:
        CpuLora: with scaling 1 and ranks of 0.

    Raises:
        ValueError: a slice begins within a block, or the sizes allow no layer.
    """
    if not can_slice(outputs) or min(adapters, rank, in_features) < 1:
        raise ValueError(
            f"{adapters} adapters of rank {rank} for {in_features} inputs and slices of {tuple(outputs)} outputs are "
            f"not possible; all slices but the last are multiples of {LANES}."
        )
    ends = torch.tensor([-(-size // LANES) for size in outputs], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return CpuLora(
        torch.zeros(adapters, len(outputs), rank, in_features, dtype=dtype),
        torch.zeros(adapters, int(ends[-1]), rank, LANES, dtype=dtype),
        torch.ones(adapters),
        torch.zeros(adapters, len(outputs), dtype=torch.int32),
        ends,
    )


def can_slice(outputs: Sequence[int]) -> bool:
    """Return whether slices of these sizes begin at whole blocks."""
    return bool(outputs) and min(outputs) > 0 and not any(size % LANES for size in outputs[:-1])


def place_adapter(
    lora: CpuLora, adapter: int, pairs: Sequence[tuple[torch.Tensor, torch.Tensor] | None], scaling: float = 1.0
) -> None:
    """Write one adapter over what stood in its place. Trailing ranks that add nothing are left out of the computation.

    Args:
        lora: the adapters, changed in place.
        adapter: which one.
        pairs: A (rank, in) and B (out, rank) of every slice, or None where the adapter adds nothing.
        scaling: alpha / rank.

    Raises:
        ValueError: there is no such place, or a pair does not fit it.
    """
    count, slices, most, in_features = lora.a.shape
    if not 0 <= adapter < count or len(pairs) != slices:
        raise ValueError(
            f"adapter {adapter} with {len(pairs)} pairs was given; there is room for {count} with {slices} each."
        )
    ends = [0, *lora.ends.tolist()]
    for index, pair in enumerate(pairs):
        lora.ranks[adapter, index] = 0
        if pair is None:
            continue
        a, b = pair
        blocks = ends[index + 1] - ends[index]
        rank = a.shape[0]
        if a.shape != (rank, in_features) or b.ndim != 2 or b.shape[1] != rank or -(-b.shape[0] // LANES) != blocks:
            raise ValueError(
                f"A {tuple(a.shape)} and B {tuple(b.shape)} do not fit slice {index}, which has {in_features} inputs "
                f"and {blocks} blocks of {LANES} outputs."
            )
        used = ((a != 0).any(1) & (b != 0).any(0)).nonzero()
        rank = int(used[-1]) + 1 if len(used) else 0
        if rank > most:
            raise ValueError(f"the adapter has rank {rank}; there is room for {most}.")
        lora.a[adapter, index, :rank] = a[:rank]
        lora.b[adapter, ends[index] : ends[index + 1], :rank] = _lora_in_blocks(b[None, :, :rank])[0]
        lora.ranks[adapter, index] = rank
    lora.scaling[adapter] = scaling


def _lora_in_blocks(b: torch.Tensor) -> torch.Tensor:
    """Return (adapters, blocks, rank, 16) of (adapters, out, rank), padded with zeros."""
    adapters, out_features, rank = b.shape
    blocks = -(-out_features // LANES)
    padded = torch.zeros(adapters, blocks * LANES, rank, dtype=b.dtype)
    padded[:, :out_features] = b
    return padded.view(adapters, blocks, LANES, rank).transpose(2, 3).contiguous()


def _check_lora(
    a: torch.Tensor, b: torch.Tensor, scaling: torch.Tensor, ranks: torch.Tensor, ends: torch.Tensor
) -> None:
    if a.ndim != 4 or b.ndim != 4 or b.shape[3] != LANES or (a.shape[0], a.shape[2]) != (b.shape[0], b.shape[2]):
        raise ValueError(
            f"adapters are A (adapters, slices, rank, in) and B (adapters, blocks, rank, {LANES}); got "
            f"{tuple(a.shape)} and {tuple(b.shape)}."
        )
    if a.dtype != b.dtype or a.dtype not in DTYPES:
        raise ValueError(
            f"A is {a.dtype} and B is {b.dtype}; allowed is one of float32, bfloat16 and float16 for both."
        )
    if scaling.shape != (a.shape[0],) or scaling.dtype != torch.float32:
        raise ValueError(f"scaling is {tuple(scaling.shape)} {scaling.dtype}; allowed is ({a.shape[0]},) float32.")
    for name, tensor, shape in (("ranks", ranks, tuple(a.shape[:2])), ("ends", ends, (a.shape[1],))):
        if tuple(tensor.shape) != shape or tensor.dtype != torch.int32:
            raise ValueError(f"{name} are {tuple(tensor.shape)} {tensor.dtype}; allowed is {shape} int32.")
    for tensor in (a, b, scaling, ranks, ends):
        if not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError("adapters must be contiguous and on the CPU.")
    if a.shape[1] < 1 or int(ends[-1]) != b.shape[1] or bool((ends.diff() <= 0).any()) or int(ends[0]) < 1:
        raise ValueError(f"the slices end at the blocks {ends.tolist()}; allowed are rising ends up to {b.shape[1]}.")
    if ranks.numel() and not 0 <= int(ranks.min()) <= int(ranks.max()) <= a.shape[2]:
        raise ValueError(f"ranks are {ranks.tolist()}; allowed are 0 to {a.shape[2]}.")
