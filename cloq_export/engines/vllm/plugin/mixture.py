"""A mixture of experts from packed codes on the CPU: the tokens of each expert, gathered once, and their adapters.

Every expert is two layers: gate and up one after the other, which one pass computes, and down. The codes of all experts
of a layer lie in one tensor. vLLM is not imported here, so that the mathematics can be tested without it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from cloq_export import kernels
from cloq_export.engines.vllm.plugin.deterministic import is_deterministic
from cloq_export.engines.vllm.plugin.parts import WORD_BITS, Fused
from cloq_export.kernels.bitpack import pack_columns, pack_rows
from cloq_export.kernels.cpu import linear as cpu_linear
from cloq_export.kernels.cpu import lora as cpu_lora
from cloq_export.kernels.cpu import weight as cpu_weight

Pair = tuple[torch.Tensor, torch.Tensor]
"""A (rank, in), and B (out, rank) with the scaling in it."""


@dataclasses.dataclass(frozen=True)
class StackedWeight:
    """One layer of every expert of a mixture.

    Args:
        tensors: words, scales and zeros of all experts, (experts, ...) each, in the layout of what computes them.
        bits: width of a code.
        out_features: outputs of one expert.
        in_features: inputs of one expert.
        native: computed by the native CPU library; otherwise by the package's operator in plain torch.
    """

    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    bits: int
    out_features: int
    in_features: int
    native: bool

    @functools.cached_property
    def experts(self) -> list[cpu_weight.CpuWeight]:
        """Return the layers of the experts as the native library takes them, views of the stacked tensors."""
        size = (self.bits, self.out_features, self.in_features)
        same = is_deterministic()
        return [cpu_weight.CpuWeight(*of_expert, *size, same) for of_expert in zip(*self.tensors, strict=True)]

    def linear(
        self, expert: int, x: torch.Tensor, lora: StackedLora | None = None, index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return `x Q^T` of one expert, and every token's own `(x A^T) B^T`.

        Args:
            expert: which one.
            x: (tokens, in).
            lora: the adapters of this layer, or None.
            index: (tokens) int32, the slot of each token's adapter, negative for none; None means no adapter at all.

        Returns:
            torch.Tensor: (tokens, out), the dtype of x.
        """
        adapted = lora is not None and index is not None and lora.adapts(expert)
        if self.native and not adapted:
            return cpu_linear.linear(x, self.experts[expert])
        if self.native and lora is not None and lora.native:
            return cpu_linear.lora_linear(x, self.experts[expert], None, lora.packed[expert], index)
        if self.native:
            y = cpu_linear.linear(x, self.experts[expert])
        else:
            words, scales, zeros = (tensor[expert] for tensor in self.tensors)
            y = kernels.packed_linear(x, words, zeros, scales, self.bits)[..., : self.out_features]
        if adapted:
            assert lora is not None
            assert index is not None
            y = lora.add_to(y, expert, x, index)
        return y


def stack_weights(pieces: Iterable[Fused], count: int, *, native: bool) -> StackedWeight:
    """Bring one layer of every expert into the layout that computes it, one expert after the other.

    Args:
        pieces: the experts in order, all of one grid and one shape.
        count: how many.
        native: for the native library, which takes float16 scales; otherwise for plain torch.

    Returns:
        StackedWeight: in new memory.
    """
    stacked: list[torch.Tensor] = []
    for number, piece in enumerate(pieces):
        packed = _packed(piece, native=native)
        if not stacked:
            out_features, in_features, bits = *piece.codes.shape, piece.bits
            stacked = [torch.empty(count, *tensor.shape, dtype=tensor.dtype) for tensor in packed]
        for whole, tensor in zip(stacked, packed, strict=True):
            whole[number] = tensor
    words, scales, zeros = stacked
    return StackedWeight((words, scales, zeros), bits, out_features, in_features, native)


def _packed(piece: Fused, *, native: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if native:
        weight = cpu_weight.pack_weight(piece.codes, piece.scales, piece.zeros, piece.bits)
        return weight.words, weight.scales, weight.zeros
    short = -piece.codes.shape[0] % WORD_BITS
    codes, zeros = (nn.functional.pad(tensor, (0, 0, 0, short)) for tensor in (piece.codes, piece.zeros))
    scales = nn.functional.pad(piece.scales, (0, 0, 0, short), value=1.0)
    return (
        pack_columns(codes, piece.bits),
        scales.t().contiguous(),
        pack_rows(zeros.t().contiguous(), piece.bits),
    )


class StackedLora:
    """Room for adapters of one layer of every expert; memory is taken for the experts that an adapter adapts.

    Args:
        slots: adapters that can be active at a time.
        rank: the largest of one.
        weight: the layer.
        outputs: of its slices: of gate and up, or of down alone.
        dtype: of A and B.
    """

    def __init__(
        self, slots: int, rank: int, weight: StackedWeight, outputs: Sequence[int], dtype: torch.dtype
    ) -> None:
        self.native = weight.native and cpu_lora.can_slice(outputs)
        self._room = functools.partial(cpu_lora.allocate_lora, slots, rank, weight.in_features, outputs, dtype)
        self._outputs = list(outputs)
        self._dtype = dtype
        self.packed: dict[int, cpu_lora.CpuLora] = {}
        self._pairs: dict[tuple[int, int], list[Pair | None]] = {}

    def adapts(self, expert: int) -> bool:
        """Return whether any adapter has a pair for an expert."""
        return expert in self.packed or any(of == expert for _, of in self._pairs)

    def clear(self, slot: int) -> None:
        """Take the adapter out of a slot."""
        for lora in self.packed.values():
            lora.ranks[slot] = 0
        self._pairs = {place: pairs for place, pairs in self._pairs.items() if place[0] != slot}

    def place(self, slot: int, expert: int, pairs: Sequence[Pair | None]) -> None:
        """Put the pairs of one expert's slices into a slot; None where the adapter adds nothing.

        Raises:
            ValueError: a pair does not fit.
        """
        used = [pair if pair is not None and _adds(pair) else None for pair in pairs]
        if not any(pair is not None for pair in used):
            return
        cast: list[Pair | None] = [
            None if pair is None else (pair[0].to(self._dtype), pair[1].to(self._dtype)) for pair in used
        ]
        if not self.native:
            self._pairs[slot, expert] = cast
            return
        if expert not in self.packed:
            self.packed[expert] = self._room()
        cpu_lora.place_adapter(self.packed[expert], slot, cast)

    def add_to(self, y: torch.Tensor, expert: int, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Return y with every token's own term, summed in float32, where the native library does not compute it."""
        total = y.to(torch.float32)
        for slot in torch.unique(index).tolist():
            rows = (index == slot).nonzero()[:, 0]
            first = 0
            for size, pair in zip(self._outputs, self._pairs.get((slot, expert), ()), strict=False):
                if pair is not None:
                    a, b = (factor.to(torch.float32) for factor in pair)
                    total[rows, first : first + size] += x[rows].to(torch.float32) @ a.t() @ b.t()
                first += size
        return total.to(y.dtype)


def _adds(pair: Pair) -> bool:
    return bool((pair[0] != 0).any() and (pair[1] != 0).any())


def _gated(function: Callable[[torch.Tensor], torch.Tensor], both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return function(gate) * up


def _squared_relu(x: torch.Tensor) -> torch.Tensor:
    return functional.relu(x).square()


_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "relu2": _squared_relu,
}
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{name: functools.partial(_gated, function) for name, function in _FUNCTIONS.items()},
    **{f"{name}_no_mul": function for name, function in _FUNCTIONS.items()},
}
"""What vLLM calls an activation -> what down is given for the outputs of gate and up (of up alone: `_no_mul`)."""


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The experts of one layer that a rank holds.

    Args:
        up: gate and up of every expert one after the other, or up alone.
        down: down of every expert.
        activation: a name of `ACTIVATIONS`.
        weighs_input: the router's weight multiplies what an expert is given, instead of what it gives.
    """

    up: StackedWeight
    down: StackedWeight
    activation: str
    weighs_input: bool = False


@dataclasses.dataclass(frozen=True)
class MixtureLora:
    """The adapters of a mixture, and whose tokens are whose.

    Args:
        up: of gate and up.
        down: of down.
        index: (tokens) int32, the slot of each token's adapter, negative for none.
    """

    up: StackedLora
    down: StackedLora
    index: torch.Tensor


def compute_mixture(
    mixture: Mixture,
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    lora: MixtureLora | None = None,
) -> torch.Tensor:
    """Return the sum of the chosen experts' outputs, weighted as the router says.

    `y_t = sum_k w_tk (D_e (a(U_e x_t)))` over the experts e that this rank holds, each layer with the low-rank term of
    the token's adapter. The sum is float32, over experts in order, so other tokens of the batch change nothing.

    Args:
        mixture: the experts.
        x: (tokens, hidden) float32, bfloat16 or float16.
        chosen: (tokens, chosen) integer, the place of each expert among those of this rank; negative ones are held by
            another rank.
        weights: (tokens, chosen) float.
        lora: the adapters, or None.

    Returns:
        torch.Tensor: (tokens, hidden), the dtype of x.
    """
    activate = ACTIVATIONS[mixture.activation]
    up_lora, down_lora, index = (None, None, None) if lora is None else (lora.up, lora.down, lora.index)
    result = torch.zeros(x.shape, dtype=torch.float32)
    for expert, rows, weight in _visits(chosen, weights):
        mine = x if rows is None else x[rows]
        whose = index if rows is None or index is None else index[rows]
        if mixture.weighs_input:
            mine = mine * weight.to(mine.dtype)
        inner = activate(mixture.up.linear(expert, mine, up_lora, whose))
        given = mixture.down.linear(expert, inner, down_lora, whose).to(torch.float32)
        if not mixture.weighs_input:
            given = given * weight
        if rows is None:
            result += given
        else:
            result.index_add_(0, rows, given)
    return result.to(x.dtype)


def _visits(chosen: torch.Tensor, weights: torch.Tensor) -> Iterable[tuple[int, torch.Tensor | None, torch.Tensor]]:
    """Yield (expert, its tokens, their weights (tokens, 1) float32); None stands for the only token of a batch."""
    flat, by_place = chosen.reshape(-1), weights.reshape(-1).to(torch.float32)
    if chosen.shape[0] == 1:
        for place, expert in sorted(enumerate(flat.tolist()), key=lambda entry: entry[1]):
            if expert >= 0:
                yield expert, None, by_place[place : place + 1, None]
        return
    # Stable, so that the tokens of an expert come in order.
    order = torch.argsort(flat, stable=True)
    experts, counts = torch.unique_consecutive(flat[order], return_counts=True)
    end = 0
    for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
        places = order[end : end + count]
        end += count
        if expert >= 0:
            yield expert, places // chosen.shape[1], by_place[places, None]


@torch.library.custom_op(
    "cloq_export::cpu_mixture",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor chosen, Tensor weights, Tensor[] up, int[] up_sizes, Tensor[] down, int[] down_sizes, "
        "str activation, bool weighs_input) -> Tensor"
    ),
)
def cpu_mixture_op(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    up: list[torch.Tensor],
    up_sizes: list[int],
    down: list[torch.Tensor],
    down_sizes: list[int],
    activation: str,
    weighs_input: bool,
) -> torch.Tensor:
    """Compute what `compute_mixture` returns without adapters; for compiled models, which cannot look inside."""
    mixture = Mixture(_stacked(up, up_sizes), _stacked(down, down_sizes), activation, weighs_input)
    return compute_mixture(mixture, x, chosen, weights)


@cpu_mixture_op.register_fake
def _cpu_mixture_shape(x: torch.Tensor, *_: Any) -> torch.Tensor:
    """Return an empty tensor of the shape and dtype that `cpu_mixture_op` returns."""
    return torch.empty_like(x)


def operands(layer: StackedWeight) -> tuple[list[torch.Tensor], list[int]]:
    """Return a layer as operators of torch take it."""
    return list(layer.tensors), [layer.bits, layer.out_features, layer.in_features, int(layer.native)]


def _stacked(tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> StackedWeight:
    words, scales, zeros = tensors
    bits, out_features, in_features, native = sizes
    return StackedWeight((words, scales, zeros), bits, out_features, in_features, bool(native))
