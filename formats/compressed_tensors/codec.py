"""Pack and unpack the tensors of the compressed-tensors layout; the rules stand in SPEC.md.

`padded` chooses between the two ways in which files of this layout hold 3-bit codes. 2, 4 and 8 bits divide a word, so
for them both are the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cloq_export.errors import FormatError, NonFiniteError, ShapeError
from cloq_export.files.safe_tensors import require_tensor
from cloq_export.formats.scales import read_scales
from cloq_export.kernels.bitpack import pack_rows, unpack_rows
from cloq_export.types import QuantizedLayer, QuantSpec

_WORD_BITS = 32
_SHAPE_DTYPES = (torch.int64, torch.int32)


def word_count(codes: int, bits: int, *, padded: bool) -> int:
    """Return the int32 words that a row of codes takes; SPEC.md section 2."""
    if padded:
        return -(-codes // (_WORD_BITS // bits))
    return -(-codes * bits // _WORD_BITS)


def check_packable(out_features: int, in_features: int, spec: QuantSpec, *, name: str = "layer") -> None:
    """Refuse a shape that the layout cannot hold: any that is not empty and is cut into whole groups fits.

    Args:
        out_features: output channels.
        in_features: input channels.
        spec: the grid.
        name: the layer, for the message.

    Raises:
        ShapeError: a side is empty, or groups do not divide the input.
    """
    if out_features <= 0 or in_features <= 0:
        raise ShapeError(f"{name} has {out_features} outputs and {in_features} inputs; a layer needs one of each.")
    try:
        spec.group_count(in_features)
    except ShapeError as error:
        raise ShapeError(f"{name}: {error}") from None


def pack_layer(layer: QuantizedLayer, *, padded: bool = False, name: str = "layer") -> dict[str, torch.Tensor]:
    """Pack one layer.

    Args:
        layer: codes (out, in) uint8, scales (out, groups) float16, zeros (out, groups) uint8, on any device.
        padded: 3-bit codes as compressed-tensors 0.17 and older hold them, ten to a word.
        name: the layer, for messages.

    Returns:
        weight_packed (out, words of in codes) int32, weight_scale (out, groups) float16, weight_shape (2) int64, and
        for an asymmetric layer weight_zero_point (words of out zeros, groups) int32; contiguous, on the layer's device.

    Raises:
        ShapeError: the layer is empty.
        FormatError: a symmetric layer has another zero than the middle.
    """
    spec, bits = layer.spec, layer.spec.bits
    check_packable(layer.out_features, layer.in_features, spec, name=name)
    packed = {
        "weight_packed": _pack(layer.codes, bits, padded),
        "weight_scale": layer.scales.contiguous(),
        "weight_shape": torch.tensor(layer.codes.shape, dtype=torch.int64, device=layer.codes.device),
    }
    if not spec.symmetric:
        packed["weight_zero_point"] = _pack(layer.zeros.t().contiguous(), bits, padded).t().contiguous()
    elif not bool((layer.zeros == 2 ** (bits - 1)).all()):
        raise FormatError(
            f"{name} is marked symmetric but has a zero other than {2 ** (bits - 1)}, and a symmetric layer stores no "
            "zeros; mark it asymmetric."
        )
    return packed


def stored_shape(tensors: Mapping[str, torch.Tensor], rows: int, *, name: str = "layer") -> tuple[int, int]:
    """Return (out, in) as the tensor `weight_shape` says it.

    Args:
        tensors: holds weight_shape.
        rows: of weight_packed.
        name: the layer, for messages.

    Raises:
        FormatError: the tensor is missing, or no shape of a layer with that many rows.
    """
    shape = require_tensor(tensors, "weight_shape", source=name, shape=(2,))
    if shape.dtype not in _SHAPE_DTYPES:
        raise FormatError(f"{name}: weight_shape is {shape.dtype}; expected {_SHAPE_DTYPES[0]}.")
    out_features, in_features = (int(size) for size in shape)
    if out_features != rows:
        raise FormatError(
            f"{name}: weight_shape says {out_features} x {in_features}, but weight_packed has {rows} rows; the file is "
            "damaged."
        )
    return out_features, in_features


def unpack_layer(
    tensors: Mapping[str, torch.Tensor], spec: QuantSpec, *, padded: bool = False, name: str = "layer"
) -> QuantizedLayer:
    """Unpack one layer, trusting nothing about it.

    Args:
        tensors: the tensors as `pack_layer` makes them; scales may be bfloat16 or float32 and weight_shape int32, as
            other writers have them.
        spec: the grid that the checkpoint's config gives the layer.
        padded: as in `pack_layer`.
        name: the layer, for messages.

    Returns:
        The layer, on the tensors' device.

    Raises:
        FormatError: a tensor is missing, has another dtype or shape, or holds what the layout does not allow; or a
            scale is no float16 number.
    """
    packed = require_tensor(tensors, "weight_packed", source=name, dtype=torch.int32, ndim=2)
    out_features, in_features = stored_shape(tensors, packed.shape[0], name=name)
    try:
        check_packable(out_features, in_features, spec, name=name)
    except ShapeError as error:
        raise FormatError(str(error)) from None
    groups, bits = spec.group_count(in_features), spec.bits
    _check_order(tensors.get("weight_g_idx"), in_features, spec, name)
    _check_words(f"{name}: weight_packed", packed, (packed.shape[1], in_features), bits, padded)
    scales = read_scales(tensors, "weight_scale", (out_features, groups), name=name)
    if spec.symmetric:
        if "weight_zero_point" in tensors:
            raise FormatError(
                f"{name} holds weight_zero_point although its config says symmetric, and readers then ignore it; say "
                "symmetric: false, or remove the tensor."
            )
        zeros = torch.full((out_features, groups), 2 ** (bits - 1), dtype=torch.uint8, device=packed.device)
    else:
        stored = require_tensor(tensors, "weight_zero_point", source=name, dtype=torch.int32, ndim=2)
        _check_words(f"{name}: weight_zero_point", stored, (stored.shape[0], out_features), bits, padded)
        if stored.shape[1] != groups:
            raise FormatError(f"{name}: weight_zero_point has shape {tuple(stored.shape)}; it needs {groups} columns.")
        zeros = _unpack("weight_zero_point", stored.t(), out_features, bits, padded, name).t().contiguous()
    codes = _unpack("weight_packed", packed.contiguous(), in_features, bits, padded, name)
    try:
        return QuantizedLayer(codes=codes, scales=scales.contiguous(), zeros=zeros, spec=spec)
    except (ShapeError, NonFiniteError) as error:
        raise FormatError(f"{name}: {error}") from None


def _check_order(index: torch.Tensor | None, in_features: int, spec: QuantSpec, name: str) -> None:
    """Refuse an order of groups that is none of theirs in a row; all of -1 means that none was stored."""
    if index is None or (index.dtype in _SHAPE_DTYPES and bool((index == -1).all()) and index.numel() == in_features):
        return
    sequential = torch.arange(in_features, device=index.device) // spec.columns_per_group(in_features)
    if index.dtype not in _SHAPE_DTYPES or not torch.equal(index.to(torch.int64), sequential):
        raise FormatError(
            f"{name}: weight_g_idx is not sequential (act-order); only groups of neighbouring inputs are read: "
            "quantize again with actorder 'static', or without."
        )


def _check_words(source: str, stored: torch.Tensor, counts: tuple[int, int], bits: int, padded: bool) -> None:
    """Refuse a tensor whose number of words, the first of counts, is not that of its codes, the second."""
    words, codes = counts
    needed = word_count(codes, bits, padded=padded)
    if words == needed:
        return
    hint = "the config and the tensors disagree about bits or shape."
    if words == word_count(codes, bits, padded=not padded):
        other = "dense (compressed-tensors 0.18 and newer)" if padded else "padded (compressed-tensors 0.17 and older)"
        hint = f"it is the {other} form of 3-bit codes, and the file is labelled as the other."
    raise FormatError(
        f"{source} has shape {tuple(stored.shape)}; {codes} codes of {bits} bits take {needed} words: {hint}"
    )


def _pack(codes: torch.Tensor, bits: int, padded: bool) -> torch.Tensor:
    """Return the words of each row of codes, (rows, columns) uint8 -> (rows, words) int32."""
    if not padded or _WORD_BITS % bits == 0:
        return pack_rows(codes, bits)
    rows, columns = codes.shape
    per_word = _WORD_BITS // bits
    words = torch.zeros(rows, word_count(columns, bits, padded=True), dtype=torch.int32, device=codes.device)
    for index in range(per_word):
        lane = codes[:, index::per_word].to(torch.int32)
        words[:, : lane.shape[1]] |= lane << (index * bits)
    return words


def _unpack(part: str, words: torch.Tensor, columns: int, bits: int, padded: bool, name: str) -> torch.Tensor:
    """Return the codes of each row, (rows, words) int32 -> (rows, columns) uint8; no other bit may be set."""
    if _has_stray_bits(words, columns, bits, padded):
        raise FormatError(
            f"{name}: {part} has bits set that belong to no code, where only zeros may be; the file is damaged, or its "
            "3-bit codes are not in the form that it is labelled with."
        )
    if not padded or _WORD_BITS % bits == 0:
        return unpack_rows(words, bits, columns)
    per_word = _WORD_BITS // bits
    codes = torch.empty(words.shape[0], columns, dtype=torch.uint8, device=words.device)
    for index in range(per_word):
        lane = codes[:, index::per_word]
        lane.copy_((words[:, : lane.shape[1]] >> (index * bits)) & (2**bits - 1))
    return codes


def _has_stray_bits(words: torch.Tensor, columns: int, bits: int, padded: bool) -> bool:
    per_word = _WORD_BITS // bits * bits if padded else _WORD_BITS
    in_last = columns * bits - per_word * (words.shape[1] - 1)
    stray = per_word < _WORD_BITS and bool((words & -(1 << per_word)).any())
    return stray or (in_last < per_word and bool((words[:, -1] & -(1 << in_last)).any()))
