"""Pack and unpack the GPTQ layout; the rules stand in SPEC.md.

The bit stream of SPEC.md section 2 is that of `cloq_export.kernels.bitpack`. No tensor larger than the codes is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch

from cloq_export.errors import FormatError, NonFiniteError, ShapeError
from cloq_export.files.safe_tensors import require_tensor
from cloq_export.formats.scales import read_scales
from cloq_export.kernels.bitpack import pack_columns, pack_rows, unpack_columns, unpack_rows
from cloq_export.types import QuantizedLayer, QuantSpec

Version = Literal[1, 2]

TENSOR_NAMES = ("qweight", "qzeros", "scales", "g_idx")

WORD_BITS = 32
_LAYOUT_NAMES: dict[int, str] = {1: "gptq", 2: "gptq_v2"}


def layout_name(version: int) -> str:
    """Return the `checkpoint_format` of a version: 1 is "gptq", 2 is "gptq_v2".

    Raises:
        FormatError: there is no such version.
    """
    name = _LAYOUT_NAMES.get(version)
    if name is None:
        raise FormatError(f"GPTQ layout version {version!r} is unknown; allowed are 1 (gptq) and 2 (gptq_v2).")
    return name


def check_packable(out_features: int, in_features: int, spec: QuantSpec, *, name: str = "layer") -> None:
    """Refuse a shape that the layout cannot hold.

    Args:
        out_features: output channels.
        in_features: input channels.
        spec: the grid.
        name: the layer, for the message.

    Raises:
        ShapeError: a side does not fill whole 32-bit words, or groups do not divide the input.
    """
    codes_per_step = WORD_BITS // math.gcd(WORD_BITS, spec.bits)
    for side, size in (("inputs", in_features), ("outputs", out_features)):
        if size <= 0 or size % codes_per_step:
            raise ShapeError(
                f"{name} has {size} {side}; the GPTQ layout stores {spec.bits}-bit codes in whole 32-bit words, so "
                f"{side} must be a multiple of {codes_per_step}. Give this layer other bits, or leave it out, with an "
                "override in the recipe."
            )
    spec.group_count(in_features)


def pack_layer(layer: QuantizedLayer, *, version: Version = 2, name: str = "layer") -> dict[str, torch.Tensor]:
    """Pack one layer.

    Args:
        layer: codes (out, in) uint8, scales (out, groups) float16, zeros (out, groups) uint8, on any device.
        version: 1 stores `zero - 1`, 2 stores `zero`.
        name: the layer, for messages.

    Returns:
        qweight (in * bits / 32, out) int32, qzeros (groups, out * bits / 32) int32, scales (groups, out) float16,
        g_idx (in) int32; contiguous, on the layer's device.

    Raises:
        ShapeError: the shape does not fill whole words.
        FormatError: version 1 is asked for a layer with a zero of 0, or a symmetric layer has another zero than the
            middle.
    """
    layout_name(version)
    spec = layer.spec
    check_packable(layer.out_features, layer.in_features, spec, name=name)
    check_symmetric(layer.zeros, spec, name)
    zeros = layer.zeros
    if version == 1:
        if int(zeros.min()) == 0:
            raise FormatError(
                f"{name} has a zero of 0, which the layout gptq (version 1) cannot hold because it stores zero - 1; "
                "write it as gptq_v2 (`format=gptq_v2`)."
            )
        zeros = zeros - 1
    return {
        "qweight": pack_columns(layer.codes, spec.bits),
        "qzeros": pack_rows(zeros.t(), spec.bits),
        "scales": layer.scales.t().contiguous(),
        "g_idx": group_index(layer.in_features, spec, layer.codes.device),
    }


def unpack_layer(
    tensors: Mapping[str, torch.Tensor], spec: QuantSpec, *, version: Version = 2, name: str = "layer"
) -> QuantizedLayer:
    """Unpack one layer, trusting nothing about it.

    Args:
        tensors: qweight, qzeros, scales and g_idx as `pack_layer` makes them; scales may be bfloat16 or float32, as
            other writers have them.
        spec: the grid that the checkpoint's config gives the layer.
        version: 1 stores `zero - 1`, 2 stores `zero`.
        name: the layer, for messages.

    Returns:
        The layer, on the tensors' device.

    Raises:
        FormatError: a tensor is missing, has another dtype or shape, or holds what the layout does not allow; or a
            scale is no float16 number.
    """
    layout = layout_name(version)
    qweight = require_tensor(tensors, "qweight", source=name, dtype=torch.int32, ndim=2)
    bits = spec.bits
    if qweight.numel() == 0 or (qweight.shape[0] * WORD_BITS) % bits:
        raise FormatError(
            f"{name}: qweight has shape {tuple(qweight.shape)}, which does not hold whole {bits}-bit codes; the "
            "config and the tensors disagree about bits."
        )
    in_features, out_features = qweight.shape[0] * WORD_BITS // bits, qweight.shape[1]
    try:
        check_packable(out_features, in_features, spec, name=name)
    except ShapeError as error:
        raise FormatError(str(error)) from None
    groups = spec.group_count(in_features)
    words = out_features * bits // WORD_BITS
    qzeros = require_tensor(tensors, "qzeros", source=name, dtype=torch.int32, shape=(groups, words))
    scales = read_scales(tensors, "scales", (groups, out_features), name=name)
    g_idx = require_tensor(tensors, "g_idx", source=name, dtype=torch.int32, shape=(in_features,))
    if not torch.equal(g_idx, group_index(in_features, spec, g_idx.device)):
        raise FormatError(
            f"{name}: g_idx is not sequential (an act-order checkpoint, or another group size than "
            f"{spec.group_size}); quantize again with desc_act=false, or with static groups."
        )
    zeros = unpack_rows(qzeros, bits)
    if version == 1:
        if int(zeros.max()) == spec.max_code:
            raise FormatError(
                f"{name}: a stored zero has all bits set, which readers of {layout} take for 0 or for "
                f"{spec.max_code + 1}; quantize again and write gptq_v2, or read it as gptq_v2 if its label is wrong."
            )
        zeros = zeros + 1
    zeros = zeros.t().contiguous()
    check_symmetric(zeros, spec, name)
    codes = unpack_columns(qweight, bits)
    try:
        return QuantizedLayer(codes=codes, scales=scales.t().contiguous(), zeros=zeros, spec=spec)
    except (ShapeError, NonFiniteError) as error:
        raise FormatError(f"{name}: {error}") from None


def check_symmetric(zeros: torch.Tensor, spec: QuantSpec, name: str) -> None:
    """Refuse zeros of a symmetric layer that are not the middle of the codes.

    Args:
        zeros: of any shape, as they are meant.
        spec: the grid.
        name: the layer, for the message.

    Raises:
        FormatError: there is another zero.
    """
    # Readers of a symmetric checkpoint ignore the stored zeros, so another zero would be served wrongly.
    middle = 2 ** (spec.bits - 1)
    if spec.symmetric and not bool((zeros == middle).all()):
        raise FormatError(
            f"{name} is marked symmetric but has a zero other than {middle}; mark it asymmetric (sym: false), if the "
            "label of the version is right."
        )


def group_index(in_features: int, spec: QuantSpec, device: torch.device) -> torch.Tensor:
    """Return the g_idx of groups of neighbouring inputs, (in) int32."""
    columns = torch.arange(in_features, dtype=torch.int32, device=device)
    return columns // spec.columns_per_group(in_features)
