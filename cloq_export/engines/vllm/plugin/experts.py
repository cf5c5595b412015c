"""Quantized experts in vLLM on the CPU: how a layer of them is loaded and computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.platforms import current_platform

from cloq_export.engines.vllm.plugin.expert_parts import (
    DOWN,
    GATE,
    GPTQ_NAMES,
    UP,
    ExpertParts,
    MixtureShare,
    named_modules,
)
from cloq_export.engines.vllm.plugin.mixture import (
    ACTIVATIONS,
    Mixture,
    MixtureLora,
    StackedLora,
    compute_mixture,
    cpu_mixture_op,
    operands,
)
from cloq_export.errors import EngineError
from cloq_export.kernels import cpu
from cloq_export.types import QuantSpec

logger = init_logger("vllm.plugins.cloq_export")
# vLLM's backend for classes of transformers reads files of both kinds, although it says otherwise.
_OTHER_NAMES = (("gate_proj", "down_proj", "up_proj"), ("w1", "w2", "w3"))
_HELD = ("qweight", "scales", "qzeros")


def experts_method(
    layer: Any,
    prefix: str,
    spec_of: Callable[[str], QuantSpec | None],
    names: Mapping[str, str | None] = GPTQ_NAMES,
    *,
    first_version: bool = False,
) -> CloqExpertsMethod | None:
    """Return how a layer of experts is loaded and computed, or None if they are not quantized.

    Args:
        layer: vLLM's `RoutedExperts`.
        prefix: its name.
        spec_of: module of the files -> its grid, or None for float.
        names: what the files call the tensors of a module.
        first_version: zeros are stored less one, as in the layout `gptq`.

    Raises:
        FormatError: some experts are quantized and others are not.
        EngineError: the layer is one that the plugin does not compute.
    """
    own = (layer.ckpt_gate_proj_name, layer.ckpt_down_proj_name, layer.ckpt_up_proj_name)
    for called in (own, *_OTHER_NAMES):
        gated = {GATE: called[0], DOWN: called[1], UP: own[2] and called[2]}
        modules = named_modules(prefix, range(layer.moe_config.num_logical_experts), gated, spec_of)
        if modules is not None:
            break
    else:
        return None
    fault = _fault(layer)
    if fault is not None:
        raise EngineError(f"{prefix}: the plugin of cloq-export does not serve quantized experts {fault}.")
    return CloqExpertsMethod(layer.moe_config, modules, names, first_version=first_version)


def _fault(layer: Any) -> str | None:
    """Return what stands against computing a layer of experts here, or None."""
    config: FusedMoEConfig = layer.moe_config
    if not current_platform.is_cpu():
        return (
            f"on {current_platform.device_name}, only on the CPU; serve a merged export (cloq export --format merged), "
            "or experts of 4 bits in a layout that vLLM reads by itself"
        )
    if config.activation.value not in ACTIVATIONS:
        return f"with the activation {config.activation.value}; it knows {', '.join(ACTIVATIONS)}"
    if config.swiglu_limit is not None:
        return "whose activation is clamped"
    if config.has_bias:
        return "with biases"
    if config.intermediate_size_per_partition * config.tp_size != config.intermediate_size:
        return f"whose {config.intermediate_size} inner features cannot be cut evenly into {config.tp_size} ranks"
    if config.dp_size > 1 or config.pcp_size > 1 or config.is_sequence_parallel:
        return "where ranks hold other tokens; start without data, context or sequence parallelism"
    if config.num_experts != config.num_logical_experts or layer.expert_map_manager.num_fused_shared_experts:
        return "that vLLM copies or adds to; start without --enable-eplb"
    return None


class CloqExpertsMethod(FusedMoEMethodBase):
    """The experts of one layer from packed codes, computed on the CPU.

    Args:
        moe: what vLLM knows of the layer.
        modules: projection -> name and grid of that module of every expert of the model.
        names: what the files call the tensors of a module.
        first_version: zeros are stored less one, as in the layout `gptq`.
    """

    def __init__(
        self,
        moe: FusedMoEConfig,
        modules: Mapping[str, list[tuple[str, QuantSpec]]],
        names: Mapping[str, str | None],
        *,
        first_version: bool,
    ) -> None:
        super().__init__(moe)
        self._modules, self._names, self._first_version = modules, names, first_version
        self._parts: ExpertParts | None = None
        self.mixture: Mixture | None = None
        self.share: MixtureShare | None = None
        # Set by the layer that holds the adapters: the index is the batch's.
        self.lora: tuple[StackedLora, StackedLora] | None = None
        self.punica_wrapper: Any = None

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make the parameters that the files are loaded into.

        Raises:
            ShapeError: the layer cannot be cut into ranks like this.
        """
        config = self.moe
        numbers = range(config.num_logical_experts)
        place_of = layer._map_global_expert_id_to_local_expert_id
        mine = sorted((place_of(number), number) for number in numbers if place_of(number) >= 0)
        self.share = MixtureShare(
            experts=tuple(number for _, number in mine),
            hidden=hidden_size,
            inner=intermediate_size_per_partition,
            total_inner=config.intermediate_size,
            first_inner=config.tp_rank * intermediate_size_per_partition,
        )
        held = {name: [named[number] for _, number in mine] for name, named in self._modules.items()}
        self._parts = ExpertParts(held, self.share, self._names, first_version=self._first_version)
        self._parts.register(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Bring all experts onto one grid and into the layout of the kernels.

        Raises:
            NonFiniteError: a scale is not a positive number, or was not in the files.
            FormatError: a symmetric module has another zero than the middle.
        """
        if self._parts is None:
            return  # done before
        up, down = self._parts.stack(layer)
        self._parts = None
        self.mixture = Mixture(up, down, self.moe.activation.value, layer.apply_router_weight_on_input)
        for group, weight in (("w13", up), ("w2", down)):
            for name, tensor in zip(_HELD, weight.tensors, strict=True):
                layer.register_parameter(f"{group}_{name}", nn.Parameter(tensor, requires_grad=False))
        if up.native and down.native:
            logger.info_once("cloq-export computes quantized experts with its CPU kernels (%s).", cpu.describe())
        else:
            logger.warning_once("cloq-export computes experts with plain torch, slowly. %s", cpu.describe())

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig | None:
        """Return nothing: vLLM's own kernels compute none of it."""
        return None

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the sum of the chosen experts' outputs, (tokens, hidden), of those that this rank holds."""
        assert self.mixture is not None
        expert_map = layer.expert_map
        chosen = topk_ids if expert_map is None else expert_map[topk_ids.to(torch.int64)]
        if torch.compiler.is_compiling():
            up, down = operands(self.mixture.up), operands(self.mixture.down)
            # The parameters, which a compiled model is given; those of the mixture would be constants of it.
            held = ([getattr(layer, f"{group}_{name}") for name in _HELD] for group in ("w13", "w2"))
            how = (self.mixture.activation, self.mixture.weighs_input)
            return cpu_mixture_op(x, chosen, topk_weights, next(held), up[1], next(held), down[1], *how)
        return compute_mixture(self.mixture, x, chosen, topk_weights, self._adapters_of(x.shape[0]))

    def _adapters_of(self, tokens: int) -> MixtureLora | None:
        """Return the adapters of a batch, or None if no token of it has one."""
        index = None if self.punica_wrapper is None else self.punica_wrapper.adapter_of_tokens
        if self.lora is None or index is None:
            return None
        if len(index) < tokens:  # rows that only fill up a batch have no adapter
            index = torch.nn.functional.pad(index, (0, tokens - len(index)), value=-1)
        return MixtureLora(*self.lora, index[:tokens])
