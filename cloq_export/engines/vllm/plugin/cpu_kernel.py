"""The CPU kernel for the compressed-tensors grids that vLLM has none for."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.kernels.linear import (
    _POSSIBLE_KERNELS,
    CPUWNA16LinearKernel,
    MPLinearKernel,
    MPLinearLayerConfig,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16 import (
    CompressedTensorsWNA16,
)
from vllm.platforms import PlatformEnum, current_platform
from vllm.scalar_type import ScalarType

from cloq_export.engines.vllm.plugin.computations import ASYMMETRIC, SYMMETRIC, CpuComputation
from cloq_export.engines.vllm.plugin.parts import Fused, narrowed
from cloq_export.kernels.bitpack import unpack_rows


def register() -> None:
    """Let the CPU compute the compressed-tensors grids that vLLM has no kernel for there."""
    if not current_platform.is_cpu():
        return
    # vLLM's 4-bit kernel crashes with an illegal instruction unless AMX was requested from Linux, which torch does
    # only when it first needs AMX; with float activations that may be never.
    torch.cpu._init_amx()
    possible = _POSSIBLE_KERNELS.setdefault(PlatformEnum.CPU, [])
    # By name, because a module that is imported twice makes two classes.
    if any(kernel.__name__ == CloqCpuKernel.__name__ for kernel in possible):
        return
    # Before vLLM's own kernel, which accepts 4-bit codes with float32 activations and then fails; ours declines the
    # grids that vLLM's kernel computes.
    place = possible.index(CPUWNA16LinearKernel) if CPUWNA16LinearKernel in possible else len(possible)
    possible.insert(place, CloqCpuKernel)
    stock = CompressedTensorsWNA16.create_weights

    def create_weights(self: CompressedTensorsWNA16, layer: Any, *args: Any, **kwargs: Any) -> None:
        """Make the weights as vLLM does, with scales that hold any float dtype of the file exactly."""
        stock(self, layer, *args, **kwargs)
        if isinstance(self.kernel, CloqCpuKernel):
            layer.weight_scale.data = layer.weight_scale.data.to(torch.float32)

    CompressedTensorsWNA16.create_weights = create_weights


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
            narrowed(scales),
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


def _type_bits(kind: ScalarType) -> int | None:
    """Return the width of an integer type that our kernels compute, or None."""
    known = (*ASYMMETRIC.values(), *SYMMETRIC.values())
    return kind.size_bits if kind in known else None
