"""One layer in the layout of the native CPU library; cloq_cpu.h describes it."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch

from cloq_export.kernels.cpu import library

LANES = 16
UNIT = 32
WIDTHS = (2, 3, 4, 8)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


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
        deterministic: a token gets the same bits whatever the others of its batch are, and however many.

    Raises:
        ValueError: the tensors do not belong together.
    """

    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int
    out_features: int
    in_features: int
    deterministic: bool = False

    def __post_init__(self) -> None:
        _check_weight(self.words, self.scales, self.zeros, self.bits, self.out_features, self.in_features)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy the tensors only: the structure below points into the memory of this one."""
        return weight_of, self.operands()

    @property
    def groups(self) -> int:
        """Return the number of groups along the input."""
        return self.scales.shape[1]

    @functools.cached_property
    def _kept(self) -> library.WeightStructure:
        return library.WeightStructure(None, None, None, self.out_features, self.in_features, self.groups, self.bits)

    def operands(self) -> tuple[list[torch.Tensor], list[int]]:
        """Return the layer as operators of torch take it: its tensors; bits, outputs, inputs and `deterministic`."""
        sizes = [self.bits, self.out_features, self.in_features, int(self.deterministic)]
        return [self.words, self.scales, self.zeros], sizes

    def structure(self) -> library.WeightStructure:
        """Return the layer as the library takes it, while this object lives."""
        # Addresses are asked for at every call: sharing a model with another process moves its tensors.
        kept = self._kept
        kept.words, kept.scales, kept.zeros = self.words.data_ptr(), self.scales.data_ptr(), self.zeros.data_ptr()
        return kept


def weight_of(tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> CpuWeight:
    """Return a layer from what `CpuWeight.operands` gives."""
    words, scales, zeros = tensors
    bits, out_features, in_features, deterministic = sizes
    return CpuWeight(words, scales, zeros, bits, out_features, in_features, bool(deterministic))


def pack_weight(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, *, deterministic: bool = False
) -> CpuWeight:
    """Bring the canonical form of a layer into the kernels' layout.

    Args:
        codes: (out, in) uint8, each below `2**bits`.
        scales: (out, groups) float16.
        zeros: (out, groups) uint8, each below `2**bits`.
        bits: 2, 3, 4 or 8.
        deterministic: as in `CpuWeight`.

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
    native = require_library()
    blocks, units = _extent(out_features, in_features, groups)
    weight = CpuWeight(
        torch.empty(blocks, units * bits, LANES, dtype=torch.int32),
        _in_blocks(scales),
        _in_blocks(zeros),
        bits,
        out_features,
        in_features,
        deterministic,
    )
    codes = codes.contiguous()
    native.cloq_pack_weight(weight.structure(), codes.data_ptr(), weight.words.data_ptr(), torch.get_num_threads())
    return weight


def unpack_weight(weight: CpuWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the canonical form that `pack_weight` was given: codes, scales and zeros."""
    codes = torch.empty(weight.out_features, weight.in_features, dtype=torch.uint8)
    require_library().cloq_unpack_weight(weight.structure(), codes.data_ptr(), torch.get_num_threads())
    scales, zeros = (
        blocked.transpose(1, 2).reshape(-1, weight.groups)[: weight.out_features].contiguous()
        for blocked in (weight.scales, weight.zeros)
    )
    return codes, scales, zeros


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
    if dtype not in DTYPES:
        raise ValueError(f"Q is made in float32, bfloat16 or float16; got {dtype}.")
    if first_row < 0 or first_row % LANES or rows < 0 or first_row + rows > weight.out_features:
        raise ValueError(
            f"rows {first_row} to {first_row + rows} were asked for; allowed are a first row that is a multiple of "
            f"{LANES} and rows up to {weight.out_features}."
        )
    result = torch.empty(rows, weight.in_features, dtype=dtype)
    require_library().cloq_dequantize(
        weight.structure(), first_row, rows, DTYPES[dtype], result.data_ptr(), torch.get_num_threads()
    )
    return result


def require_library() -> ctypes.CDLL:
    """Return the native library.

    Raises:
        RuntimeError: there is none; the message says why.
    """
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
