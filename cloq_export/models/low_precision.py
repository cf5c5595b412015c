"""Weights that are stored as floats of 8 or 4 bits with scales of their own: decoded while they are read.

What a file holds decides, not what its config says: eight-bit floats and packed four-bit floats are told by dtype and
by the names of the scales beside them. Everything behind sees a file of float weights.

- fp8: `W = q * s`, s for the tensor, for each output row, or for each block of rows and columns.
- MXFP4: two E2M1 numbers to a byte, the even column in the low bits; `W = e2m1(q) * 2^(s - 127)` for each 32 columns
  (OCP Microscaling Formats 1.0, sections 5.3 and 6.3). MXFP8 has the same scales.
- NVFP4: E2M1 numbers with an E4M3 scale for each 16 columns and one float32 scale for the tensor, by which
  compressed-tensors divides (`weight_global_scale`) and ModelOpt multiplies (`weight_scale_2`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from cloq_export.errors import SourceError
from cloq_export.files.safe_tensors import TensorFile

# The codes of safetensors that are told apart here.
_EIGHT_BITS = ("F8_E4M3", "F8_E5M2")
_BYTES = ("U8", "I8")
_FLOATS = ("F64", "F32", "F16", "BF16")
_EXPONENTS = ("U8", "F8_E8M0")
# E2M1 in the order of its codes, without the sign.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Scales of activations and of the cache: the weights do not depend on them.
_OF_ACTIVATIONS = re.compile(r"(^|[._])(input_scale|input_global_scale|activation_scale|[kvq]_scale|kv_scale)$")
_NVFP4_COLUMNS, _MXFP4_COLUMNS = 16, 32
_DEFAULT_BLOCK = (128, 128)

Headers = Mapping[str, tuple[str, tuple[int, ...]]]
Blocks = Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class LowPrecision:
    """A weight in a file: its numbers, and the scales that belong to them.

    Args:
        kind: of the numbers.
        numbers: name of the tensor that holds them.
        scale: name of the scales; of rows, blocks or groups of columns.
        global_scale: name of one scale for all; empty if there is none.
        shape: of the weight that comes out.
        block: rows and columns of one scale.
        transposed: whether the weight that comes out is the transpose of what is stored (GPT-OSS).
    """

    kind: Literal["fp8", "mxfp8", "nvfp4", "mxfp4"]
    numbers: str
    scale: str
    global_scale: str
    shape: tuple[int, ...]
    block: tuple[int, int]
    transposed: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the names of all tensors that the weight is made of."""
        return tuple(name for name in (self.numbers, self.scale, self.global_scale) if name)


def find_low_precision(headers: Headers, blocks: Blocks) -> tuple[dict[str, LowPrecision], list[str]]:
    """Find the weights of a file that are stored as floats of 8 or 4 bits.

    Args:
        headers: tensor name -> (dtype code of safetensors, shape).
        blocks: rows and columns of one scale, as the config says; none where it does not.

    Returns:
        (name of the decoded weight -> where it comes from; scales that belong to activations and the cache).
        Numbers without scales that fit them are not among these.
    """
    found: dict[str, LowPrecision] = {}
    for name, (code, shape) in headers.items():
        each: LowPrecision | None = None
        if code in _EIGHT_BITS and not name.endswith(("_scale", "_scale_inv", "_scale_2")):
            each = _eight_bits(name, shape, headers, blocks)
        elif code in _BYTES and name.endswith("_blocks"):
            each = _blocks(name, shape, headers)
        elif code in _BYTES:
            each = _four_bits(name, shape, headers)
        if each is not None:
            found[name.removesuffix("_packed").removesuffix("_blocks")] = each
    idle = [name for name, (code, _) in headers.items() if _OF_ACTIVATIONS.search(name) and code in _FLOATS]
    return found, idle if found else []


class DecodedTensors:
    """Reads weights of low precision as floats, as `TensorFile` reads what is stored as floats.

    Args:
        files: tensor name -> the file that holds it.
        weights: name of the decoded weight -> where it comes from.
    """

    def __init__(self, files: Mapping[str, TensorFile], weights: Mapping[str, LowPrecision]) -> None:
        self._files = files
        self._weights = weights
        # float32 holds the product of a number and its scale as exactly as any float dtype of weights.
        self.headers: dict[str, tuple[str, tuple[int, ...]]] = {
            name: ("F32", each.shape) for name, each in weights.items()
        }

    def paths(self, name: str) -> tuple[Path, ...]:
        """Return the files that one weight is read from."""
        return tuple(dict.fromkeys(self._files[part].path for part in self._weights[name].parts))

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Return one weight, computed in float32.

        Args:
            name: the weight.
            rows: of a stack of experts, the first that is read, and the one behind the last; None reads all.

        Raises:
            FormatError: a file changed since it was opened.
            SourceError: a scale is below zero, or not finite.
        """
        weight = self._weights[name]
        numbers = self._part(weight, weight.numbers, rows)
        scale = self._scale(weight, rows)
        decoded = numbers.to(torch.float32) if weight.kind in ("fp8", "mxfp8") else decode_e2m1(numbers)
        if weight.transposed:
            # (experts, rows, groups, 32) beside (experts, rows, groups).
            return (decoded * scale.unsqueeze(-1)).flatten(-2).transpose(-1, -2).contiguous()
        if not scale.ndim:
            return decoded.mul_(scale)
        return decoded.mul_(_spread(scale, weight.block, weight.shape))

    def read_as_mapped(
        self, name: str, dtype: torch.dtype | None = None, rows: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Return one weight, rounded once to a dtype (float32 if None)."""
        return self.read(name, rows).to(dtype or torch.float32)

    def _part(self, weight: LowPrecision, part: str, rows: tuple[int, int] | None) -> torch.Tensor:
        file = self._files[part]
        # One scale for all experts is no stack.
        stacked = len(weight.shape) > 2 and len(file.headers[part][1]) > 2
        return file.read(part) if rows is None or not stacked else file.read_rows(part, *rows)

    def _scale(self, weight: LowPrecision, rows: tuple[int, int] | None) -> torch.Tensor:
        scale = self._part(weight, weight.scale, rows)
        if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
            exponents = scale.view(torch.uint8).to(torch.int32) - 127
            if bool((exponents == 128).any()):
                raise SourceError(f"{weight.scale} holds a scale that is no number; fetch the model again.")
            scale = torch.ldexp(torch.ones(exponents.shape), exponents)
        scale = scale.to(torch.float32)
        if scale.ndim == 1 and len(weight.shape) == 3 and scale.numel() > 1:
            scale = scale[slice(*rows) if rows else slice(None), None, None]
        if weight.global_scale:
            whole = self._files[weight.global_scale].read(weight.global_scale).to(torch.float32).reshape(())
            scale = scale / whole if weight.global_scale.endswith("_global_scale") else scale * whole
        if not bool(torch.isfinite(scale).all()):
            raise SourceError(
                f"{weight.scale} of {weight.numbers} holds a scale that is not finite; the model is damaged. Fetch it "
                "again."
            )
        if bool((scale < 0).any()):
            raise SourceError(
                f"{weight.scale} of {weight.numbers} holds a scale below zero, which no writer makes; the model is "
                "damaged. Fetch it again."
            )
        return scale.reshape(()) if scale.numel() == 1 else scale


def decode_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Return the numbers of bytes that hold two E2M1 floats each, float32, (..., bytes) -> (..., 2 * bytes).

    The even column lies in the low four bits; of four bits the highest is the sign (OCP Microscaling Formats 1.0,
    section 5.3.3).
    """
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.float32)
    codes = packed.view(torch.uint8)
    pairs = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    return table[pairs.to(torch.int32)]


def _spread(scale: torch.Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> torch.Tensor:
    """Return a scale for every number, of which the last rows and columns of blocks may hang over."""
    if scale.ndim == 1:
        scale = scale.unsqueeze(-1)
    rows, columns = block
    rows_of = torch.arange(shape[-2]) // rows
    columns_of = torch.arange(shape[-1]) // columns
    return scale.index_select(-2, rows_of).index_select(-1, columns_of)


def _eight_bits(name: str, shape: tuple[int, ...], headers: Headers, blocks: Blocks) -> LowPrecision | None:
    for suffix in ("_scale_inv", "_scale"):
        code, of_scale = headers.get(f"{name}{suffix}", ("", ()))
        if code not in (*_FLOATS, *_EXPONENTS) or len(shape) < 2:
            continue
        fitting = _fitting_block(shape, of_scale, [(1, _MXFP4_COLUMNS)] if code == "U8" else blocks)
        if fitting is not None:
            kind: Literal["fp8", "mxfp8"] = "mxfp8" if code == "U8" else "fp8"
            return LowPrecision(kind, name, f"{name}{suffix}", "", shape, fitting)
    return None


def _fitting_block(shape: tuple[int, ...], of_scale: tuple[int, ...], blocks: Blocks) -> tuple[int, int] | None:
    """Return rows and columns of one scale; None if scales of this shape cannot be those of the weight."""
    rows, columns = shape[-2:]
    if torch.Size(of_scale).numel() == 1:
        return rows, columns
    if len(of_scale) == 1:
        # One for each row of a matrix, or for each expert of a stack.
        return None if of_scale != shape[:1] else (1, columns) if len(shape) == 2 else (rows, columns)
    if len(of_scale) != len(shape) or of_scale[:-2] != shape[:-2]:
        return None
    down, across = of_scale[-2:]
    if (down, across) == (rows, 1):
        return 1, columns
    if (down, across) == (1, 1):
        return rows, columns
    for one in blocks or (_DEFAULT_BLOCK,):
        if (down, across) == (-(-rows // one[0]), -(-columns // one[1])):
            return one
    if blocks or rows % down or columns % across:
        return None
    # Where nothing says it: squares, and groups of columns.
    guess = rows // down, columns // across
    return guess if guess[0] in (1, guess[1]) else None


def _four_bits(name: str, shape: tuple[int, ...], headers: Headers) -> LowPrecision | None:
    base = name.removesuffix("_packed")
    if len(shape) < 2:
        return None
    decoded = (*shape[:-1], 2 * shape[-1])
    for scale in (f"{base}_scale", f"{base}_scale_inv"):
        code, of_scale = headers.get(scale, ("", ()))
        for kind, columns, codes in (
            ("nvfp4", _NVFP4_COLUMNS, ("F8_E4M3",)),
            ("mxfp4", _MXFP4_COLUMNS, _EXPONENTS),
        ):
            if code not in codes or of_scale != (*shape[:-1], decoded[-1] // columns) or decoded[-1] % columns:
                continue
            wholes = [each for each in (f"{base}_global_scale", f"{base}_scale_2") if each in headers]
            if len(wholes) != (kind == "nvfp4") or any(torch.Size(headers[each][1]).numel() != 1 for each in wholes):
                continue
            return LowPrecision(kind, name, scale, (*wholes, "")[0], decoded, (1, columns))  # type: ignore[arg-type]
    return None


def _blocks(name: str, shape: tuple[int, ...], headers: Headers) -> LowPrecision | None:
    scale = f"{name.removesuffix('_blocks')}_scales"
    code, of_scale = headers.get(scale, ("", ()))
    if code not in _EXPONENTS or len(shape) != 4 or of_scale != shape[:-1] or shape[-1] != _MXFP4_COLUMNS // 2:
        return None
    experts, rows, groups, _ = shape
    return LowPrecision(
        "mxfp4", name, scale, "", (experts, groups * _MXFP4_COLUMNS, rows), (1, _MXFP4_COLUMNS), transposed=True
    )
