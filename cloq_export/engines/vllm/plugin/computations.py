"""What computes a layer of vLLM once its parts are on one grid."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

from cloq_export import kernels
from cloq_export.engines.vllm.plugin.deterministic import is_deterministic
from cloq_export.engines.vllm.plugin.parts import WORD_BITS, Fused
from cloq_export.errors import FormatError
from cloq_export.kernels import cpu
from cloq_export.kernels.bitpack import pack_columns, pack_rows
from cloq_export.kernels.cpu import linear as cpu_linear
from cloq_export.kernels.cpu import weight as cpu_weight
from cloq_export.kernels.dispatch import describe_gpu, native_takes_layer

logger = init_logger("vllm.plugins.cloq_export")
# bits -> the type of codes with stored zeros, and of codes whose zero is the middle.
ASYMMETRIC = {2: scalar_types.uint2, 3: scalar_types.uint3, 4: scalar_types.uint4, 8: scalar_types.uint8}
SYMMETRIC = {2: scalar_types.uint2b2, 3: scalar_types.uint3b4, 4: scalar_types.uint4b8, 8: scalar_types.uint8b128}


class Computation:
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


class NativeComputation(Computation):
    """The native CPU library, which has a layout of its own."""

    def prepare(self, layer: Any, fused: Fused) -> None:
        """Bring codes, scales and zeros into the library's layout."""
        self.weight = cpu_weight.pack_weight(
            *(fused.codes, fused.scales, fused.zeros, fused.bits), deterministic=is_deterministic()
        )
        _keep(layer, qweight=self.weight.words, scales=self.weight.scales, qzeros=self.weight.zeros)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return `x Q^T + bias`, with float32 sums."""
        if not torch.compiler.is_compiling():
            return cpu_linear.linear(x, self.weight, bias)
        sizes = self.weight.operands()[1]
        return cpu_linear.cpu_linear_op(x, [layer.qweight, layer.scales, layer.qzeros], sizes, bias, [], False)


class ReferenceComputation(Computation):
    """The package's own operator on any device: Triton on GPUs, plain torch on machines without a faster way."""

    def prepare(self, layer: Any, fused: Fused) -> None:
        """Pack in the GPTQ order; outputs are padded to whole words."""
        self.bits, self.out_features = fused.bits, fused.codes.shape[0]
        short = -self.out_features % WORD_BITS
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


class CpuComputation(Computation):
    """The native library where it can be used, plain torch elsewhere."""

    def prepare(self, layer: Any, fused: Fused) -> None:
        """Choose by what is installed and by the scales."""
        native = native_takes_layer(fused.scales, fused.codes, fused.zeros)
        if not native:
            logger.warning_once("cloq-export computes with plain torch, slowly. %s", cpu.describe())
        self.chosen: Computation = NativeComputation() if native else ReferenceComputation()
        self.chosen.prepare(layer, fused)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return `x Q^T + bias`."""
        return self.chosen.apply(layer, x, bias)


class StockComputation(Computation):
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
                packed_factor=Fraction(WORD_BITS, fused.bits),
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
                packed_factor=Fraction(WORD_BITS, fused.bits),
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


def choose_computation(config: MPLinearLayerConfig, bits: int, *, symmetric: bool) -> Computation:
    """Return how a layer is computed on this platform."""
    if current_platform.is_cpu():
        return CpuComputation()
    if config.act_type == torch.float32:
        # Some of vLLM's kernels do not ask for the activations' dtype and then fail on float32.
        logger.warning_once("vLLM has no float32 kernel here: cloq-export computes. %s", describe_gpu())
        return ReferenceComputation()
    for width in sorted({bits, 4, 8}):
        if width < bits:
            continue
        wanted = dataclasses.replace(config, weight_type=(SYMMETRIC if symmetric else ASYMMETRIC)[width])
        try:
            kernel = choose_mp_linear_kernel(wanted)
        except ValueError:
            continue  # no kernel reads codes of this width: the next wider ones hold them too
        return StockComputation(kernel, wanted, width)
    logger.warning_once(
        "vLLM has no kernel for %s-bit codes in groups of %s here: cloq-export computes. %s",
        bits,
        config.group_size,
        describe_gpu(),
    )
    return ReferenceComputation()
