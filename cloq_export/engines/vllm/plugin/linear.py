"""Linear layers of vLLM that hold our codes: how they are loaded, cut for tensor parallelism, fused and computed.

Each module of the checkpoint that vLLM makes into a part of one layer (q, k and v; gate and up) may have a grid of its
own. The parts are loaded as they lie in the file, cut to this rank's share, and then brought onto one grid without
loss: a narrower code is a wider one, and a group is several smaller groups with the same scale and zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from vllm.model_executor.kernels.linear import MPLinearLayerConfig
from vllm.model_executor.layers.linear import LinearMethodBase

from cloq_export.engines.vllm.plugin.computations import (
    ASYMMETRIC,
    SYMMETRIC,
    Computation,
    CpuComputation,
    NativeComputation,
    choose_computation,
)
from cloq_export.engines.vllm.plugin.cpu_kernel import CloqCpuKernel
from cloq_export.engines.vllm.plugin.parts import Fused, Part, Share, full_sizes, narrowed, replicas
from cloq_export.errors import FormatError
from cloq_export.kernels.cpu import weight as cpu_weight
from cloq_export.types import QuantSpec


class CloqLinearMethod(LinearMethodBase):
    """A linear layer made of one or several modules of a GPTQ checkpoint.

    Args:
        names: the modules.
        specs: their grids.
        first_version: zeros are stored less one, as in the layout `gptq`.
    """

    def __init__(self, names: Sequence[str], specs: Sequence[QuantSpec], *, first_version: bool) -> None:
        self.names, self.specs, self.first_version = list(names), list(specs), first_version
        self._compute: Computation | None = None
        self._parts: list[Part] = []

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
                Part(
                    self.names[0 if fused_on_disk else index],
                    self.specs[0 if fused_on_disk else index],
                    Share(
                        out_features=out_features,
                        in_features=input_size_per_partition,
                        # Key and value heads that are fewer than ranks are given to several of them.
                        first_output=rank // replicas(layer, index) * out_features if shares_outputs else 0,
                        first_input=first_input,
                        total_inputs=input_size,
                    ),
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
        # Nothing of it is kept: it is a place for vLLM to bring the file's g_idx to.
        order = nn.Parameter(torch.empty(0, dtype=torch.int32), requires_grad=False)
        order.weight_loader = self._check_order  # type: ignore[attr-defined]
        layer.register_parameter("g_idx", order)
        layer.input_size_per_partition = input_size_per_partition
        layer.output_partition_sizes = output_partition_sizes
        layer.params_dtype = params_dtype
        bits = max(spec.bits for spec in self.specs)
        columns = math.gcd(*(part.common_columns for part in self._parts))
        self._grid = (bits, columns, all(spec.symmetric for spec in self.specs))
        self._compute = choose_computation(
            MPLinearLayerConfig(
                full_weight_shape=(input_size, output_size),
                partition_weight_shape=(input_size_per_partition, sum(output_partition_sizes)),
                weight_type=(SYMMETRIC if self._grid[2] else ASYMMETRIC)[bits],
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
            indices = self._indices(shard_id)
            if name == "qzeros":
                loaded = self._parts[indices[0]].stored_zeros(loaded, first_version=self.first_version)
            if len(indices) == 1:
                self._parts[indices[0]].load(layer, name, loaded)
                return
            sizes = full_sizes(layer, self._parts)
            for index, piece in zip(indices, loaded.split([sizes[index] for index in indices], dim=1), strict=True):
                self._parts[index].load(layer, name, piece)

        return load

    def _indices(self, shard_id: Any) -> list[int]:
        """Return which parts a tensor of the file belongs to."""
        if shard_id is None:
            return list(range(len(self._parts)))
        if isinstance(shard_id, str):
            return ["qkv".index(shard_id)]
        return list(shard_id) if isinstance(shard_id, tuple) else [shard_id]

    def _check_order(self, parameter: nn.Parameter, loaded: torch.Tensor, shard_id: Any = None) -> None:
        """Compare a file's g_idx with groups of neighbouring inputs, the only order that is computed.

        Raises:
            FormatError: it is another order.
        """
        self._parts[self._indices(shard_id)[0]].check_order(loaded)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Bring the parts onto one grid and into the layout of the kernel.

        Raises:
            NonFiniteError: a scale is not a positive number, or was not in the files.
            FormatError: a symmetric part has another zero than the middle.
        """
        if not self._parts:
            return  # done before
        del layer.g_idx
        bits, columns, symmetric = self._grid
        pieces = [part.on_grid(layer, bits, columns, symmetric=symmetric) for part in self._parts]
        self._parts = []
        fused = Fused(
            torch.cat([piece.codes for piece in pieces]),
            narrowed(torch.cat([piece.scales for piece in pieces])),
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


def native_weight(layer: Any) -> cpu_weight.CpuWeight | None:
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
