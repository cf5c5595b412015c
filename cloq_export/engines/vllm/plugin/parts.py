"""The modules that vLLM makes into one layer: loaded as they lie in the file, cut to a rank, brought onto one grid.

vLLM is imported by the functions that ask its classes, so that loading can be tested without it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cloq_export.errors import FormatError, NonFiniteError, ShapeError
from cloq_export.formats.gptq.codec import group_index
from cloq_export.kernels.bitpack import unpack_columns, unpack_rows
from cloq_export.types import QuantSpec

# A layer of vLLM carries attributes that torch knows nothing of, so it is `Any` below.
WORD_BITS = 32


@dataclasses.dataclass(frozen=True)
class Fused:
    """The parts of one layer of vLLM on one grid.

    Args:
        codes: (out, in) uint8.
        scales: (out, groups) float16, or float32 where float16 does not hold them.
        zeros: (out, groups) uint8.
        bits: width of a code.
        symmetric: every zero is the middle, `2**(bits - 1)`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int
    symmetric: bool

    def recoded(self, bits: int) -> Fused:
        """Return the same weights in wider codes; symmetric ones are moved so that their zero is the middle again."""
        if bits == self.bits:
            return self
        shift = 2 ** (bits - 1) - 2 ** (self.bits - 1) if self.symmetric else 0
        return Fused(self.codes + shift, self.scales, self.zeros + shift, bits, self.symmetric)


@dataclasses.dataclass(frozen=True)
class Share:
    """What one rank gets of a module.

    Args:
        out_features: outputs of this rank.
        in_features: inputs of this rank.
        first_output: where this rank's outputs begin in the file.
        first_input: where this rank's inputs begin in the file.
        total_inputs: inputs in the file.
    """

    out_features: int
    in_features: int
    first_output: int
    first_input: int
    total_inputs: int


class Part:
    """One module of the checkpoint inside a layer, cut to this rank's share.

    Args:
        name: of the module.
        spec: its grid.
        share: what this rank gets.
        parameters: what the layer calls the parameters `qweight`, `qzeros` and `scales`, where it is something else.

    Raises:
        ShapeError: this rank's share does not begin and end at whole words.
    """

    def __init__(self, name: str, spec: QuantSpec, share: Share, parameters: Mapping[str, str] | None = None) -> None:
        self.name, self.spec, self._parameters = name, spec, parameters or {}
        self.out_features, self.in_features = share.out_features, share.in_features
        self.first_output, self.first_input = share.first_output, share.first_input
        self.total_inputs = total_inputs = share.total_inputs
        first_input, in_features = share.first_input, share.in_features
        if first_input * spec.bits % WORD_BITS or in_features * spec.bits % WORD_BITS:
            raise ShapeError(
                f"{name} has {total_inputs} inputs, of which one rank gets {in_features}; {spec.bits}-bit codes can be "
                f"cut every {WORD_BITS // math.gcd(WORD_BITS, spec.bits)} inputs only. Choose another "
                "--tensor-parallel-size."
            )
        self.columns_per_group = spec.columns_per_group(total_inputs)
        self.first_group = first_input // self.columns_per_group
        self.groups = -(-(first_input + in_features) // self.columns_per_group) - self.first_group
        words = in_features * spec.bits // WORD_BITS
        self.shapes = {"qweight": (words, share.out_features)} | dict.fromkeys(
            ("qzeros", "scales"), (self.groups, share.out_features)
        )
        # Where this part begins in the layer's parameters, which hold all parts one after the other.
        self.starts = dict.fromkeys(self.shapes, 0)

    def held(self, layer: Any, name: str) -> torch.Tensor:
        """Return this part of a parameter, as a view."""
        rows, columns = self.shapes[name]
        flat: torch.Tensor = layer._parameters[self._parameters.get(name, name)].data
        return flat[self.starts[name] : self.starts[name] + rows * columns].view(rows, columns)

    @property
    def common_columns(self) -> int:
        """Return the largest number of columns that groups of this rank's share can be cut into."""
        return math.gcd(self.columns_per_group, self.first_input, self.in_features)

    def check_order(self, index: torch.Tensor) -> None:
        """Compare a file's g_idx with groups of neighbouring inputs, the only order that is computed.

        Raises:
            FormatError: it is another order.
        """
        if not torch.equal(index.cpu().to(torch.int32), group_index(self.total_inputs, self.spec, torch.device("cpu"))):
            raise FormatError(
                f"{self.name}: g_idx is not sequential (an act-order checkpoint, or another group size than "
                f"{self.spec.group_size}); quantize again with desc_act=false, or with static groups."
            )

    def stored_zeros(self, words: torch.Tensor, *, first_version: bool) -> torch.Tensor:
        """Return the zeros of a file's qzeros, (groups, out) uint8.

        Raises:
            FormatError: a zero is stored in a way that readers do not agree about.
        """
        zeros = unpack_rows(words, self.spec.bits)
        if not first_version:
            return zeros
        if int(zeros.max()) == self.spec.max_code:
            raise FormatError(
                f"{self.name}: a stored zero has all bits set, which readers of gptq take for 0 or for "
                f"{self.spec.max_code + 1}; write it as gptq_v2 (cloq convert --format gptq_v2)."
            )
        return zeros + 1

    def load(self, layer: Any, name: str, tensor: torch.Tensor) -> None:
        """Take this rank's share of a tensor of the file; zeros come unpacked, (groups, out) uint8.

        Raises:
            FormatError: the tensor is too small.
        """
        held = self.held(layer, name)
        row = self.first_input * self.spec.bits // WORD_BITS if name == "qweight" else self.first_group
        share = tensor[row : row + held.shape[0], self.first_output : self.first_output + self.out_features]
        if share.shape != held.shape:
            raise FormatError(
                f"{self.name}.{name} has shape {tuple(tensor.shape)}, which does not hold {self.in_features} inputs "
                f"and {self.out_features} outputs at {self.spec.bits} bits; config.json and the weights disagree."
            )
        held.copy_(share)

    def on_grid(self, layer: Any, bits: int, columns: int, *, symmetric: bool) -> Fused:
        """Return this part on a finer or equal grid.

        Raises:
            NonFiniteError: a scale is not a positive number, or was not in the files.
            FormatError: a symmetric part has another zero than the middle.
        """
        scales, zeros = self.held(layer, "scales"), self.held(layer, "qzeros")
        if not bool((torch.isfinite(scales) & (scales > 0)).all()):
            raise NonFiniteError(
                f"{self.name}: a scale is missing, NaN, Inf, zero or negative; fetch or write the checkpoint again."
            )
        middle = 2 ** (self.spec.bits - 1)
        if self.spec.symmetric and not bool((zeros == middle).all()):
            raise FormatError(f"{self.name} is marked symmetric but has a zero other than {middle}.")
        starts = self.first_input + torch.arange(0, self.in_features, columns, device=scales.device)
        rows = starts // self.columns_per_group - self.first_group
        codes = unpack_columns(self.held(layer, "qweight"), self.spec.bits)
        own = Fused(codes, scales[rows].t(), zeros[rows].t(), self.spec.bits, symmetric)
        return own.recoded(bits)


def narrowed(scales: torch.Tensor) -> torch.Tensor:
    """Return float32 scales as float16, or as they are where float16 does not hold them."""
    half = scales.to(torch.float16)
    return half if bool((half.to(torch.float32) == scales).all()) else scales


def replicas(layer: Any, index: int) -> int:
    """Return how many ranks share the same outputs of a part."""
    from vllm.model_executor.layers.linear import QKVParallelLinear

    return layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and index > 0 else 1


def full_sizes(layer: Any, parts: Sequence[Part]) -> list[int]:
    """Return the outputs of every part in a file that holds them as one module."""
    from vllm.model_executor.layers.linear import QKVParallelLinear

    if isinstance(layer, QKVParallelLinear):
        return [
            layer.total_num_heads * layer.head_size,
            layer.total_num_kv_heads * layer.head_size,
            layer.total_num_kv_heads * layer.v_head_size,
        ]
    return list(getattr(layer, "output_sizes", None) or [part.out_features for part in parts])
