"""Linear layers of vLLM that hold our codes: how they are loaded, cut for tensor parallelism, fused and computed.

Each module of the checkpoint that vLLM makes into a part of one layer (q, k and v; gate and up) may have a grid of its
own. The parts are loaded as they lie in the file, cut to this rank's share, and then brought onto one grid without
loss: a narrower code is a wider one, and a group is several smaller groups with the same scale and zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import (
    _POSSIBLE_KERNELS,
    CPUWNA16LinearKernel,
    MPLinearKernel,
    MPLinearLayerConfig,
    choose_mp_linear_kernel,
)
from vllm.model_executor.layers.linear import LinearMethodBase, QKVParallelLinear
from vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16 import (
    CompressedTensorsWNA16,
)
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
from vllm.platforms import PlatformEnum, current_platform
from vllm.scalar_type import ScalarType, scalar_types

from cloq_export import kernels
from cloq_export.errors import FormatError, NonFiniteError, ShapeError
from cloq_export.kernels import cpu
from cloq_export.kernels import triton as triton_kernels
from cloq_export.kernels.bitpack import pack_columns, pack_rows, unpack_columns, unpack_rows
from cloq_export.kernels.cpu import linear as cpu_linear
from cloq_export.types import QuantSpec

logger = init_logger("vllm.plugins.cloq_export")

# A layer of vLLM carries attributes that torch knows nothing of, so it is `Any` below.
_WORD_BITS = 32
# bits -> the type of codes with stored zeros, and of codes whose zero is the middle.
_ASYMMETRIC = {2: scalar_types.uint2, 3: scalar_types.uint3, 4: scalar_types.uint4, 8: scalar_types.uint8}
_SYMMETRIC = {2: scalar_types.uint2b2, 3: scalar_types.uint3b4, 4: scalar_types.uint4b8, 8: scalar_types.uint8b128}


def register() -> None:
    """Let the CPU compute the compressed-tensors grids that vLLM has no kernel for there."""
    if not current_platform.is_cpu():
        return
    # vLLM's 4-bit kernel dies of an illegal instruction unless Linux was asked for the use of AMX, which torch does
    # when it first needs it, and with float activations that may be never.
    torch.cpu._init_amx()
    possible = _POSSIBLE_KERNELS.setdefault(PlatformEnum.CPU, [])
    # By name, because a module that is imported twice makes two classes.
    if any(kernel.__name__ == CloqCpuKernel.__name__ for kernel in possible):
        return
    # Ahead of vLLM's own, which takes 4-bit codes with float32 activations and then fails; ours refuses what it can do.
    place = possible.index(CPUWNA16LinearKernel) if CPUWNA16LinearKernel in possible else len(possible)
    possible.insert(place, CloqCpuKernel)
    stock = CompressedTensorsWNA16.create_weights

    def create_weights(self: CompressedTensorsWNA16, layer: Any, *args: Any, **kwargs: Any) -> None:
        """Make the weights as vLLM does, with scales that hold any float dtype of the file exactly."""
        stock(self, layer, *args, **kwargs)
        if isinstance(self.kernel, CloqCpuKernel):
            layer.weight_scale.data = layer.weight_scale.data.to(torch.float32)

    CompressedTensorsWNA16.create_weights = create_weights


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


class _Part:
    """One module of the checkpoint inside a layer, cut to this rank's share.

    Args:
        name: of the module.
        spec: its grid.
        out_features: outputs of this rank.
        in_features: inputs of this rank.
        first_output: where this rank's outputs begin in the file.
        first_input: where this rank's inputs begin in the file.
        total_inputs: inputs in the file.

    Raises:
        ShapeError: this rank's share does not begin and end at whole words.
    """

    def __init__(
        self,
        name: str,
        spec: QuantSpec,
        *,
        out_features: int,
        in_features: int,
        first_output: int,
        first_input: int,
        total_inputs: int,
    ) -> None:
        self.name, self.spec = name, spec
        self.out_features, self.in_features = out_features, in_features
        self.first_output, self.first_input = first_output, first_input
        if first_input * spec.bits % _WORD_BITS or in_features * spec.bits % _WORD_BITS:
            raise ShapeError(
                f"{name} has {total_inputs} inputs, of which one rank gets {in_features}; {spec.bits}-bit codes can be "
                f"cut every {_WORD_BITS // math.gcd(_WORD_BITS, spec.bits)} inputs only. Choose another "
                "--tensor-parallel-size."
            )
        self.columns_per_group = spec.columns_per_group(total_inputs)
        self.first_group = first_input // self.columns_per_group
        self.groups = -(-(first_input + in_features) // self.columns_per_group) - self.first_group
        words = in_features * spec.bits // _WORD_BITS
        self.shapes = {"qweight": (words, out_features)} | dict.fromkeys(
            ("qzeros", "scales"), (self.groups, out_features)
        )
        # Where this part begins in the layer's parameters, which hold all parts one after the other.
        self.starts = dict.fromkeys(self.shapes, 0)

    def held(self, layer: Any, name: str) -> torch.Tensor:
        """Return this part of a parameter, as a view."""
        rows, columns = self.shapes[name]
        flat: torch.Tensor = layer._parameters[name].data
        return flat[self.starts[name] : self.starts[name] + rows * columns].view(rows, columns)

    @property
    def common_columns(self) -> int:
        """Return the largest number of columns that groups of this rank's share can be cut into."""
        return math.gcd(self.columns_per_group, self.first_input, self.in_features)

    def load(self, layer: Any, name: str, tensor: torch.Tensor) -> None:
        """Take this rank's share of a tensor of the file; zeros come unpacked, (groups, out) uint8.

        Raises:
            FormatError: the tensor is too small.
        """
        held = self.held(layer, name)
        row = self.first_input * self.spec.bits // _WORD_BITS if name == "qweight" else self.first_group
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


class CloqLinearMethod(LinearMethodBase):
    """A linear layer made of one or several modules of a GPTQ checkpoint.

    Args:
        names: the modules.
        specs: their grids.
        first_version: zeros are stored less one, as in the layout `gptq`.
    """

    def __init__(self, names: Sequence[str], specs: Sequence[QuantSpec], *, first_version: bool) -> None:
        self.names, self.specs, self.first_version = list(names), list(specs), first_version
        self._compute: _Computation | None = None
        self._parts: list[_Part] = []

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make the parameters that the files are loaded into.

        Raises:
            ShapeError: the layer cannot be cut into ranks like this.
            FormatError: the layer has other parts than the checkpoint.
        """
        count = len(output_partition_sizes)
        fused_on_disk = len(self.names) == 1 and count > 1
        if not fused_on_disk and len(self.names) != count:
            raise FormatError(
                f"vLLM makes {count} parts of {', '.join(self.names)}; this plugin does not know such a layer."
            )
        rank = layer.tp_rank
        # A replicated layer has a rank too, and all of its inputs and outputs.
        first_input = 0 if input_size_per_partition == input_size else rank * input_size_per_partition
        shares_outputs = sum(output_partition_sizes) != output_size
        for index, out_features in enumerate(output_partition_sizes):
            self._parts.append(
                _Part(
                    self.names[0 if fused_on_disk else index],
                    self.specs[0 if fused_on_disk else index],
                    out_features=out_features,
                    in_features=input_size_per_partition,
                    # Key and value heads that are fewer than ranks are given to several of them.
                    first_output=rank // _replicas(layer, index) * out_features if shares_outputs else 0,
                    first_input=first_input,
                    total_inputs=input_size,
                )
            )
        # float32 holds the scales of any file.
        for name, dtype in (("qweight", torch.int32), ("qzeros", torch.uint8), ("scales", torch.float32)):
            size = 0
            for part in self._parts:
                part.starts[name] = size
                size += math.prod(part.shapes[name])
            # NaN until it is loaded, so that a missing tensor is noticed.
            flat = torch.full((size,), math.nan if dtype.is_floating_point else 0, dtype=dtype)
            parameter = nn.Parameter(flat, requires_grad=False)
            parameter.weight_loader = self._loader(layer, name)  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)
        # What vLLM's kernels ask of a layer.
        layer.input_size_per_partition = input_size_per_partition
        layer.output_partition_sizes = output_partition_sizes
        layer.params_dtype = params_dtype
        bits = max(spec.bits for spec in self.specs)
        columns = math.gcd(*(part.common_columns for part in self._parts))
        self._grid = (bits, columns, all(spec.symmetric for spec in self.specs))
        self._compute = _choose(
            MPLinearLayerConfig(
                full_weight_shape=(input_size, output_size),
                partition_weight_shape=(input_size_per_partition, sum(output_partition_sizes)),
                weight_type=(_SYMMETRIC if self._grid[2] else _ASYMMETRIC)[bits],
                act_type=params_dtype,
                group_size=-1 if columns == input_size_per_partition else columns,
                zero_points=not self._grid[2],
            ),
            bits,
            symmetric=self._grid[2],
        )

    def _loader(self, layer: Any, name: str) -> Callable[..., None]:
        def load(parameter: nn.Parameter, loaded: torch.Tensor, shard_id: Any = None) -> None:
            """Give a tensor of the file to the parts that it belongs to."""
            if shard_id is None:
                indices = list(range(len(self._parts)))
            elif isinstance(shard_id, str):
                indices = ["qkv".index(shard_id)]
            else:
                indices = list(shard_id) if isinstance(shard_id, tuple) else [shard_id]
            if name == "qzeros":
                loaded = self._stored_zeros(loaded, self._parts[indices[0]])
            if len(indices) == 1:
                self._parts[indices[0]].load(layer, name, loaded)
                return
            sizes = _full_sizes(layer, self._parts)
            for index, piece in zip(indices, loaded.split([sizes[index] for index in indices], dim=1), strict=True):
                self._parts[index].load(layer, name, piece)

        return load

    def _stored_zeros(self, words: torch.Tensor, part: _Part) -> torch.Tensor:
        """Return the zeros of a file's qzeros, (groups, out) uint8.

        Raises:
            FormatError: a zero is stored in a way that readers do not agree about.
        """
        zeros = unpack_rows(words, part.spec.bits)
        if not self.first_version:
            return zeros
        if int(zeros.max()) == part.spec.max_code:
            raise FormatError(
                f"{part.name}: a stored zero has all bits set, which readers of gptq take for 0 or for "
                f"{part.spec.max_code + 1}; write it as gptq_v2 (cloq convert --format gptq_v2)."
            )
        return zeros + 1

    def process_weights_after_loading(self, layer: Any) -> None:
        """Bring the parts onto one grid and into the layout of the kernel.

        Raises:
            NonFiniteError: a scale is not a positive number, or was not in the files.
            FormatError: a symmetric part has another zero than the middle.
        """
        if not self._parts:
            return  # done before
        bits, columns, symmetric = self._grid
        pieces = [part.on_grid(layer, bits, columns, symmetric=symmetric) for part in self._parts]
        self._parts = []
        fused = Fused(
            torch.cat([piece.codes for piece in pieces]),
            _narrowed(torch.cat([piece.scales for piece in pieces])),
            torch.cat([piece.zeros for piece in pieces]),
            bits,
            symmetric,
        )
        assert self._compute is not None
        self._compute.prepare(layer, fused)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return `x Q^T + bias`."""
        assert self._compute is not None
        return self._compute.apply(layer, x, bias)


def _narrowed(scales: torch.Tensor) -> torch.Tensor:
    """Return float32 scales as float16, or as they are where float16 does not hold them."""
    half = scales.to(torch.float16)
    return half if bool((half.to(torch.float32) == scales).all()) else scales


def _replicas(layer: Any, index: int) -> int:
    """Return how many ranks share the same outputs of a part."""
    return layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and index > 0 else 1


def _full_sizes(layer: Any, parts: Sequence[_Part]) -> list[int]:
    """Return the outputs of every part in a file that holds them as one module."""
    if isinstance(layer, QKVParallelLinear):
        return [
            layer.total_num_heads * layer.head_size,
            layer.total_num_kv_heads * layer.head_size,
            layer.total_num_kv_heads * layer.v_head_size,
        ]
    return list(getattr(layer, "output_sizes", None) or [part.out_features for part in parts])


class _Computation:
    """How a layer is computed once its parts are on one grid."""

    def prepare(self, layer: Any, fused: Fused) -> None:
        """Replace the parameters of the layer by what `apply` needs."""
        raise NotImplementedError

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return `x Q^T + bias`."""
        raise NotImplementedError


def _keep(layer: Any, **tensors: torch.Tensor) -> None:
    """Make these the only quantized parameters of a layer; vLLM's LoRA layers look for one called `qweight`."""
    for name in ("qweight", "qzeros", "scales"):
        if name in layer._parameters:
            delattr(layer, name)
    for name, tensor in tensors.items():
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


class NativeComputation(_Computation):
    """The native CPU library, which has a layout of its own."""

    def prepare(self, layer: Any, fused: Fused) -> None:
        """Bring codes, scales and zeros into the library's layout."""
        self.weight = cpu_linear.pack_weight(fused.codes, fused.scales, fused.zeros, fused.bits)
        _keep(layer, qweight=self.weight.words, scales=self.weight.scales, qzeros=self.weight.zeros)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return `x Q^T + bias`, with float32 sums."""
        if not torch.compiler.is_compiling():
            return cpu_linear.linear(x, self.weight, bias)
        size = self.weight.bits, self.weight.out_features, self.weight.in_features
        return cpu_linear.cpu_linear_op(x, layer.qweight, layer.scales, layer.qzeros, *size, bias, *[None] * 6, False)


class ReferenceComputation(_Computation):
    """The package's own operator on any device: Triton on GPUs, plain torch on machines without a faster way."""

    def prepare(self, layer: Any, fused: Fused) -> None:
        """Pack in the GPTQ order; outputs are padded to whole words."""
        self.bits, self.out_features = fused.bits, fused.codes.shape[0]
        short = -self.out_features % _WORD_BITS
        codes, zeros = (nn.functional.pad(tensor, (0, 0, 0, short)) for tensor in (fused.codes, fused.zeros))
        scales = nn.functional.pad(fused.scales, (0, 0, 0, short), value=1.0)
        _keep(
            layer,
            qweight=pack_columns(codes, fused.bits),
            scales=scales.t().contiguous(),
            qzeros=pack_rows(zeros.t().contiguous(), fused.bits),
        )

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return `x Q^T + bias`, computed in float32."""
        if bias is not None:
            bias = nn.functional.pad(bias, (0, layer.scales.shape[1] - self.out_features))
        y = kernels.packed_linear(x, layer.qweight, layer.qzeros, layer.scales, self.bits, bias)
        return y[..., : self.out_features]


class CpuComputation(_Computation):
    """The native library where it can be used, plain torch elsewhere."""

    def prepare(self, layer: Any, fused: Fused) -> None:
        """Choose by what is installed and by the scales."""
        native = cpu.available() and fused.scales.dtype == torch.float16
        if not native:
            logger.warning_once("cloq-export computes with plain torch, slowly. %s", cpu.describe())
        self.chosen: _Computation = NativeComputation() if native else ReferenceComputation()
        self.chosen.prepare(layer, fused)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return `x Q^T + bias`."""
        return self.chosen.apply(layer, x, bias)


class StockComputation(_Computation):
    """One of vLLM's own kernels, as its chooser picked it.

    Args:
        kernel: the class.
        config: what it was chosen for.
        bits: of the codes that it reads.
    """

    def __init__(self, kernel: type[MPLinearKernel], config: MPLinearLayerConfig, bits: int) -> None:
        self.bits = bits
        self.kernel = kernel(config, w_q_param_name="qweight", w_s_param_name="scales", w_zp_param_name="qzeros")

    def prepare(self, layer: Any, fused: Fused) -> None:
        """Hand codes, scales and zeros over as vLLM's compressed-tensors scheme does, packed along the input."""
        fused = fused.recoded(self.bits)
        packed = {
            "qweight": PackedvLLMParameter(
                data=pack_rows(fused.codes, fused.bits),
                input_dim=1,
                output_dim=0,
                packed_dim=1,
                packed_factor=Fraction(_WORD_BITS, fused.bits),
                weight_loader=_refuse_loading,
            ),
            "scales": GroupQuantScaleParameter(
                data=fused.scales.to(layer.params_dtype), input_dim=1, output_dim=0, weight_loader=_refuse_loading
            ),
        }
        if self.kernel.config.zero_points:
            packed["qzeros"] = PackedvLLMParameter(
                data=pack_rows(fused.zeros.t().contiguous(), fused.bits).t().contiguous(),
                input_dim=1,
                output_dim=0,
                packed_dim=0,
                packed_factor=Fraction(_WORD_BITS, fused.bits),
                weight_loader=_refuse_loading,
            )
        _keep(layer)
        for name, parameter in packed.items():
            layer.register_parameter(name, parameter)
        self.kernel.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return `x Q^T + bias` as the kernel computes it."""
        return self.kernel.apply_weights(layer, x, bias)


def _refuse_loading(*_: Any) -> None:
    raise FormatError("this layer is loaded and packed already; start the engine again to load other weights.")


def _choose(config: MPLinearLayerConfig, bits: int, *, symmetric: bool) -> _Computation:
    """Return how a layer is computed on this platform."""
    if current_platform.is_cpu():
        return CpuComputation()
    if config.act_type == torch.float32:
        # Some of vLLM's kernels do not ask for the activations' dtype and then fail on float32.
        logger.warning_once("vLLM has no float32 kernel here: cloq-export computes. %s", triton_kernels.describe())
        return ReferenceComputation()
    for width in sorted({bits, 4, 8}):
        if width < bits:
            continue
        wanted = dataclasses.replace(config, weight_type=(_SYMMETRIC if symmetric else _ASYMMETRIC)[width])
        try:
            kernel = choose_mp_linear_kernel(wanted)
        except ValueError:
            continue  # no kernel reads codes of this width: the next wider ones hold them too
        return StockComputation(kernel, wanted, width)
    logger.warning_once(
        "vLLM has no kernel for %s-bit codes in groups of %s here: cloq-export computes. %s",
        bits,
        config.group_size,
        triton_kernels.describe(),
    )
    return ReferenceComputation()


class CloqCpuKernel(MPLinearKernel):
    """The CPU kernel for compressed-tensors grids that vLLM has none for: 2, 3 and 8 bits, and 4 bits in float32."""

    @classmethod
    def get_min_capability(cls) -> int:
        """Return that a CPU has no capability."""
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Return whether this is a grid that vLLM has no kernel for, and the reason if it is not."""
        if not current_platform.is_cpu():
            return False, "it is for the CPU"
        if _type_bits(c.weight_type) is None:
            return False, f"the weight type {c.weight_type} is no integer of 2, 3, 4 or 8 bits"
        if c.weight_type.size_bits == 4 and c.act_type != torch.float32:
            return False, "vLLM has kernels of its own for 4 bits"
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Unpack the layout of compressed-tensors and bring it into that of our kernels."""
        words, scales, packed_zeros = self._get_weight_params(layer)
        bits = self.config.weight_type.size_bits
        in_features, out_features = self.config.partition_weight_shape
        scales = scales.data.to(torch.float32)
        if self.config.zero_points:
            assert packed_zeros is not None
            # Along the outputs, padded to whole words.
            zeros = unpack_rows(packed_zeros.data.t().contiguous(), bits)[:, :out_features].t().contiguous()
        else:
            zeros = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.uint8)
        fused = Fused(
            unpack_rows(words.data, bits, in_features),
            _narrowed(scales),
            zeros,
            bits,
            symmetric=not self.config.zero_points,
        )
        for name in (self.w_q_name, self.w_s_name, self.w_zp_name):
            if name is not None and name in layer._parameters:
                delattr(layer, name)
        self.computation = CpuComputation()
        self.computation.prepare(layer, fused)

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return `x Q^T + bias`."""
        return self.computation.apply(layer, x, bias)


def native_weight(layer: Any) -> cpu_linear.CpuWeight | None:
    """Return what the native CPU library computes a layer of vLLM from, or None where something else computes it.

    Args:
        layer: a linear layer with its weights loaded.
    """
    method = layer.quant_method
    computation = getattr(method, "_compute", None) if isinstance(method, CloqLinearMethod) else None
    kernel = getattr(getattr(layer, "scheme", None), "kernel", None)
    if isinstance(kernel, CloqCpuKernel):
        computation = kernel.computation
    chosen = computation.chosen if isinstance(computation, CpuComputation) else None
    return chosen.weight if isinstance(chosen, NativeComputation) else None


def _type_bits(kind: ScalarType) -> int | None:
    """Return the width of an integer type that our kernels compute, or None."""
    known = (*_ASYMMETRIC.values(), *_SYMMETRIC.values())
    return kind.size_bits if kind in known else None
