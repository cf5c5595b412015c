"""Packed linear layers on the CPU: `y = x Q^T (+ bias) (+ low-rank term)`, `Q = scales * (codes - zeros)`.

A layer is brought into the kernels' own layout once (`pack_weight`); cloq_cpu.h describes it. `linear` and
`lora_linear` then compute with it, in one of two precisions:

- "exact": activations as they are and float32 sums. One exception has the error of the activations' own dtype and no
  more: with AMX, bfloat16 activations of several tokens meet weights and low-rank factors rounded to bfloat16, as in
  any bfloat16 layer;
- "int8": every token's activations are first rounded to 255 steps between minus and plus their largest. With AMX,
  those of several tokens then meet weights rounded to bfloat16.

Both are registered with torch (fake tensors, gradients by activations and bias); outside of tracing and gradients the
library is called directly, because the way through torch's dispatcher costs as much as a small layer.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch

from cloq_export.kernels.cpu import library

LANES = 16
UNIT = 32
WIDTHS = (2, 3, 4, 8)
Precision = Literal["exact", "int8"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclasses.dataclass(frozen=True)
class CpuWeight:
    """One layer in the kernels' layout; made by `pack_weight`.

    Args:
        words: (blocks, words per lane, 16) int32, the codes.
        scales: (blocks, groups, 16) float16.
        zeros: (blocks, groups, 16) uint8.
        bits: width of a code.
        out_features: output channels; the last block is padded to sixteen.
        in_features: input channels; each group is padded to a multiple of 32.

    Raises:
        ValueError: the tensors do not belong together.
    """

    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int
    out_features: int
    in_features: int

    def __post_init__(self) -> None:
        _check_weight(self.words, self.scales, self.zeros, self.bits, self.out_features, self.in_features)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy the tensors only: the structure below points into the memory of this one."""
        return CpuWeight, (self.words, self.scales, self.zeros, self.bits, self.out_features, self.in_features)

    @property
    def groups(self) -> int:
        """Return the number of groups along the input."""
        return self.scales.shape[1]

    @functools.cached_property
    def _kept(self) -> library.WeightStructure:
        return library.WeightStructure(None, None, None, self.out_features, self.in_features, self.groups, self.bits)

    def structure(self) -> library.WeightStructure:
        """Return the layer as the library takes it, while this object lives."""
        # Addresses are asked for at every call: sharing a model with another process moves its tensors.
        kept = self._kept
        kept.words, kept.scales, kept.zeros = self.words.data_ptr(), self.scales.data_ptr(), self.zeros.data_ptr()
        return kept


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
            _DTYPES[self.a.dtype],
        )


def pack_weight(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> CpuWeight:
    """Bring the canonical form of a layer into the kernels' layout.

    Args:
        codes: (out, in) uint8, each below `2**bits`.
        scales: (out, groups) float16.
        zeros: (out, groups) uint8, each below `2**bits`.
        bits: 2, 3, 4 or 8.

    Returns:
        CpuWeight: the layer, in new memory.

    Raises:
        TypeError: a dtype is not the one above.
        ValueError: shapes disagree, a code or zero does not fit, or bits is not allowed.
        RuntimeError: there is no native library; `describe()` says why.
    """
    if bits not in WIDTHS:
        raise ValueError(f"bits is {bits}; allowed are 2, 3, 4 and 8.")
    for name, tensor, dtype in (
        ("codes", codes, torch.uint8),
        ("scales", scales, torch.float16),
        ("zeros", zeros, torch.uint8),
    ):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}; got {tensor.dtype}.")
        if tensor.ndim != 2 or tensor.device.type != "cpu":
            raise ValueError(f"{name} must be a matrix on the CPU; got {tuple(tensor.shape)} on {tensor.device}.")
        if dtype == torch.uint8 and tensor.numel() and int(tensor.max()) >= 1 << bits:
            raise ValueError(f"the largest of {name} is {int(tensor.max())}; {bits} bits hold 0..{(1 << bits) - 1}.")
    out_features, in_features = codes.shape
    groups = scales.shape[1]
    if scales.shape != zeros.shape or scales.shape[0] != out_features or not groups or in_features % groups:
        raise ValueError(
            f"codes {tuple(codes.shape)}, scales {tuple(scales.shape)} and zeros {tuple(zeros.shape)} disagree; "
            "allowed are (out, in) and twice (out, groups) with groups dividing in."
        )
    if not out_features or not in_features:
        raise ValueError(f"codes are {tuple(codes.shape)}; a layer has at least one input and one output channel.")
    native = _require_library()
    blocks, units = _extent(out_features, in_features, groups)
    weight = CpuWeight(
        torch.empty(blocks, units * bits, LANES, dtype=torch.int32),
        _in_blocks(scales),
        _in_blocks(zeros),
        bits,
        out_features,
        in_features,
    )
    codes = codes.contiguous()
    native.cloq_pack_weight(weight.structure(), codes.data_ptr(), weight.words.data_ptr(), torch.get_num_threads())
    return weight


def unpack_weight(weight: CpuWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the canonical form that `pack_weight` was given: codes, scales and zeros."""
    codes = torch.empty(weight.out_features, weight.in_features, dtype=torch.uint8)
    _require_library().cloq_unpack_weight(weight.structure(), codes.data_ptr(), torch.get_num_threads())
    scales, zeros = (
        blocked.transpose(1, 2).reshape(-1, weight.groups)[: weight.out_features].contiguous()
        for blocked in (weight.scales, weight.zeros)
    )
    return codes, scales, zeros


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


def dequantize(
    weight: CpuWeight, dtype: torch.dtype = torch.float32, *, first_row: int = 0, rows: int | None = None
) -> torch.Tensor:
    """Return Q or some of its rows, computed in float32 and rounded once.

    Args:
        weight: the layer.
        dtype: float32, bfloat16 or float16.
        first_row: a multiple of 16.
        rows: how many; None means all that follow.

    Returns:
        torch.Tensor: (rows, in), contiguous.

    Raises:
        ValueError: the rows are not in the layer, or the dtype is not allowed.
    """
    rows = weight.out_features - first_row if rows is None else rows
    if dtype not in _DTYPES:
        raise ValueError(f"Q is made in float32, bfloat16 or float16; got {dtype}.")
    if first_row < 0 or first_row % LANES or rows < 0 or first_row + rows > weight.out_features:
        raise ValueError(
            f"rows {first_row} to {first_row + rows} were asked for; allowed are a first row that is a multiple of "
            f"{LANES} and rows up to {weight.out_features}."
        )
    result = torch.empty(rows, weight.in_features, dtype=dtype)
    _require_library().cloq_dequantize(
        weight.structure(), first_row, rows, _DTYPES[dtype], result.data_ptr(), torch.get_num_threads()
    )
    return result


def linear(
    x: torch.Tensor, weight: CpuWeight, bias: torch.Tensor | None = None, *, precision: Precision = "exact"
) -> torch.Tensor:
    """Return `x Q^T + bias`. Differentiable by x and bias in the precision "exact".

    Args:
        x: (..., in) float32, bfloat16 or float16.
        weight: the layer.
        bias: (out) float, or None.
        precision: "exact" or "int8".

    Returns:
        torch.Tensor: (..., out), the dtype of x.

    Raises:
        ValueError: the tensors do not belong together.
        RuntimeError: there is no native library, or gradients are asked for in the precision "int8".
    """
    return lora_linear(x, weight, bias, precision=precision)


def lora_linear(
    x: torch.Tensor,
    weight: CpuWeight,
    bias: torch.Tensor | None = None,
    lora: CpuLora | None = None,
    index: torch.Tensor | None = None,
    *,
    precision: Precision = "exact",
) -> torch.Tensor:
    """Return `x Q^T + bias + scaling_i (x A_i^T) B_i^T`, with an adapter i for every token.

    The low-rank term is computed from the activations as they are, in both precisions. It is for serving: gradients
    reach x, but not A and B.

    Args:
        x: (..., in) float32, bfloat16 or float16.
        weight: the layer.
        bias: (out) float, or None.
        lora: the adapters, or None.
        index: one adapter per token, int32 of the leading shape of x, -1 for none; None means adapter 0 for all.
        precision: "exact" or "int8".

    Returns:
        torch.Tensor: (..., out), the dtype of x.

    Raises:
        ValueError: the tensors do not belong together, or an index names no adapter.
        RuntimeError: there is no native library, or gradients are asked for in the precision "int8".
    """
    if precision not in ("exact", "int8"):
        raise ValueError(f"the precision is {precision!r}; allowed are 'exact' and 'int8'.")
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if wants_grad and precision == "int8":
        raise RuntimeError("8-bit activations have no gradient; fine-tune in the precision 'exact'.")
    if wants_grad or type(x) is not torch.Tensor or torch.compiler.is_compiling():
        parts = (weight.words, weight.scales, weight.zeros, weight.bits, weight.out_features, weight.in_features)
        adapters = (None,) * 5 if lora is None else (lora.a, lora.b, lora.scaling, lora.ranks, lora.ends)
        result: torch.Tensor = cpu_linear_op(x, *parts, bias, *adapters, index, precision == "int8")
        return result
    return _compute(x, weight, bias, lora, index, precision == "int8")


def _compute(
    x: torch.Tensor,
    weight: CpuWeight,
    bias: torch.Tensor | None,
    lora: CpuLora | None,
    index: torch.Tensor | None,
    int8_activations: bool,
) -> torch.Tensor:
    """Check what is not checked yet, and call the library."""
    out_features, in_features = weight.out_features, weight.in_features
    shape, dtype = x.shape, _DTYPES.get(x.dtype)
    if dtype is None or shape[-1:] != (in_features,) or x.device.type != "cpu":
        raise ValueError(
            f"the input is {tuple(shape)} {x.dtype} on {x.device}; this layer takes (..., {in_features}) float32, "
            "bfloat16 or float16 on the CPU."
        )
    if bias is not None:
        if bias.shape != (out_features,) or not bias.is_floating_point():
            raise ValueError(f"the bias is {tuple(bias.shape)} {bias.dtype}; this layer takes ({out_features},) float.")
        bias = bias.detach().to(torch.float32).contiguous()
    if lora is None:
        if index is not None:
            raise ValueError("an adapter index was given, but no adapters.")
    else:
        blocks = weight.words.shape[0]
        if lora.a.shape[3] != in_features or lora.b.shape[1] != blocks:
            raise ValueError(
                f"the adapters are A {tuple(lora.a.shape)} and B {tuple(lora.b.shape)}; this layer has {in_features} "
                f"inputs and {blocks} blocks of outputs."
            )
        if index is not None:
            if index.shape != shape[:-1] or index.dtype != torch.int32:
                raise ValueError(
                    f"the adapter index is {tuple(index.shape)} {index.dtype}; allowed is {tuple(shape[:-1])} int32."
                )
            index = index.contiguous()
    x = x.contiguous()
    y = torch.empty((*shape[:-1], out_features), dtype=x.dtype)
    failed = _require_library().cloq_linear(
        weight.structure(),
        x.data_ptr(),
        x.numel() // in_features,
        dtype,
        None if bias is None else bias.data_ptr(),
        None if lora is None else lora.structure(index),
        int8_activations,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        assert index is not None
        assert lora is not None
        raise ValueError(f"the adapter index names {int(index.max())}; there are {lora.a.shape[0]} adapters.")
    return y


@torch.library.custom_op(
    "cloq_export::cpu_linear",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor words, Tensor scales, Tensor zeros, int bits, int out_features, int in_features, "
        "Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor? scaling, Tensor? ranks, Tensor? ends, Tensor? index, "
        "bool int8_activations) -> Tensor"
    ),
)
def cpu_linear_op(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    out_features: int,
    in_features: int,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scaling: torch.Tensor | None,
    ranks: torch.Tensor | None,
    ends: torch.Tensor | None,
    index: torch.Tensor | None,
    int8_activations: bool,
) -> torch.Tensor:
    """Compute what `lora_linear` returns."""
    weight = CpuWeight(words, scales, zeros, bits, out_features, in_features)
    lora = None
    if lora_a is not None:
        if lora_b is None or scaling is None or ranks is None or ends is None:
            raise ValueError("adapters are A, B, their scaling, ranks and slices; one of them is missing.")
        lora = CpuLora(lora_a, lora_b, scaling, ranks, ends)
    return _compute(x, weight, bias, lora, index, int8_activations)


@cpu_linear_op.register_fake
def _cpu_linear_shape(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    out_features: int,
    in_features: int,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scaling: torch.Tensor | None,
    ranks: torch.Tensor | None,
    ends: torch.Tensor | None,
    index: torch.Tensor | None,
    int8_activations: bool,
) -> torch.Tensor:
    """Return an empty tensor of the shape and dtype that `cpu_linear_op` returns."""
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op(
    "cloq_export::cpu_linear_input_grad",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor words, Tensor scales, Tensor zeros, int bits, int out_features, int in_features, "
        "Tensor? lora_a, Tensor? lora_b, Tensor? scaling, Tensor? ranks, Tensor? ends, Tensor? index) -> Tensor"
    ),
)
def cpu_linear_input_grad_op(
    grad: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    out_features: int,
    in_features: int,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scaling: torch.Tensor | None,
    ranks: torch.Tensor | None,
    ends: torch.Tensor | None,
    index: torch.Tensor | None,
) -> torch.Tensor:
    """Compute `grad Q`, and the adapters' share of it in float32."""
    weight = CpuWeight(words, scales, zeros, bits, out_features, in_features)
    if grad.dtype not in _DTYPES or grad.device.type != "cpu" or grad.shape[-1:] != (out_features,):
        raise ValueError(
            f"the gradient is {tuple(grad.shape)} {grad.dtype} on {grad.device}; this layer takes "
            f"(..., {out_features}) float32, bfloat16 or float16 on the CPU."
        )
    grad = grad.contiguous()
    result = torch.empty(*grad.shape[:-1], in_features, dtype=grad.dtype)
    tokens = grad.numel() // out_features
    _require_library().cloq_linear_input_grad(
        weight.structure(),
        grad.data_ptr(),
        tokens,
        _DTYPES[grad.dtype],
        result.data_ptr(),
        torch.get_num_threads(),
    )
    if lora_a is None:
        return result
    assert lora_b is not None
    assert scaling is not None
    assert ranks is not None
    assert ends is not None
    CpuLora(lora_a, lora_b, scaling, ranks, ends)  # checks them
    with torch.autocast("cpu", enabled=False):
        rows, total = grad.view(-1, out_features).to(torch.float32), result.view(-1, in_features).to(torch.float32)
        which = torch.zeros(rows.shape[0], dtype=torch.int32) if index is None else index.reshape(-1)
        starts = [0, *ends.tolist()]
        for adapter in range(lora_a.shape[0]):
            chosen = (which == adapter).nonzero()[:, 0]
            for number, rank in enumerate(ranks[adapter].tolist()):
                first, last = starts[number] * LANES, min(starts[number + 1] * LANES, out_features)
                blocked = lora_b[adapter, starts[number] : starts[number + 1], :rank]
                b = blocked.transpose(1, 2).reshape(-1, rank)[: last - first].to(torch.float32)
                inner = rows[chosen, first:last] @ b * scaling[adapter]
                total.index_add_(0, chosen, inner @ lora_a[adapter, number, :rank].to(torch.float32))
    return total.to(grad.dtype).view(result.shape)


@cpu_linear_input_grad_op.register_fake
def _cpu_linear_input_grad_shape(
    grad: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    out_features: int,
    in_features: int,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scaling: torch.Tensor | None,
    ranks: torch.Tensor | None,
    ends: torch.Tensor | None,
    index: torch.Tensor | None,
) -> torch.Tensor:
    """Return an empty tensor of the shape and dtype that `cpu_linear_input_grad_op` returns."""
    return grad.new_empty(*grad.shape[:-1], in_features)


def _keep_for_backward(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
    """Keep references to packed tensors only: no activation is needed."""
    _, words, scales, zeros, bits, out_features, in_features, bias, *adapters, _ = inputs
    ctx.save_for_backward(words, scales, zeros, *adapters)
    ctx.sizes = (bits, out_features, in_features)  # type: ignore[attr-defined]
    ctx.bias_dtype = None if bias is None else bias.dtype  # type: ignore[attr-defined]


def _cpu_linear_backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple:
    """Return the gradients by x and bias; everything else is frozen and gets none."""
    words, scales, zeros, *adapters = ctx.saved_tensors  # type: ignore[attr-defined]
    input_grad = bias_grad = None
    if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
        sizes = ctx.sizes  # type: ignore[attr-defined]
        input_grad = cpu_linear_input_grad_op(grad, words, scales, zeros, *sizes, *adapters)
    if ctx.needs_input_grad[7]:  # type: ignore[attr-defined]
        summed = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32)
        bias_grad = summed.to(ctx.bias_dtype)  # type: ignore[attr-defined]
    return (input_grad, *[None] * 6, bias_grad, *[None] * 7)


cpu_linear_op.register_autograd(_cpu_linear_backward, setup_context=_keep_for_backward)


def _require_library() -> ctypes.CDLL:
    native = library.load()
    if native is None:
        raise RuntimeError(library.describe())
    return native


def _extent(out_features: int, in_features: int, groups: int) -> tuple[int, int]:
    """Return the blocks of output channels and the units of input channels, padding included."""
    return -(-out_features // LANES), groups * -(-(in_features // groups) // UNIT)


def _in_blocks(matrix: torch.Tensor) -> torch.Tensor:
    """Return (blocks, groups, 16) of (out, groups), padded with zeros."""
    out_features, groups = matrix.shape
    blocks = -(-out_features // LANES)
    padded = torch.zeros(blocks * LANES, groups, dtype=matrix.dtype)
    padded[:out_features] = matrix
    return padded.view(blocks, LANES, groups).transpose(1, 2).contiguous()


def _check_weight(
    words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, out_features: int, in_features: int
) -> None:
    groups = scales.shape[1] if scales.ndim == 3 else 0
    if bits not in WIDTHS or out_features < 1 or in_features < 1 or groups < 1 or in_features % groups:
        raise ValueError(
            f"a layer of {out_features} outputs, {in_features} inputs, {groups} groups and {bits} bits is not possible."
        )
    blocks, units = _extent(out_features, in_features, groups)
    for name, tensor, shape, dtype in (
        ("words", words, (blocks, units * bits, LANES), torch.int32),
        ("scales", scales, (blocks, groups, LANES), torch.float16),
        ("zeros", zeros, (blocks, groups, LANES), torch.uint8),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} are {tuple(tensor.shape)} {tensor.dtype}"
                f"{'' if tensor.is_contiguous() else ', not contiguous'}; this layer has contiguous {shape} {dtype}."
            )
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} are on {tensor.device}; these kernels compute on the CPU.")


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
    if a.dtype != b.dtype or a.dtype not in _DTYPES:
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
