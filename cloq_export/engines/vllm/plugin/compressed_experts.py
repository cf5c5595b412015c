"""Quantized experts of compressed-tensors checkpoints on the CPU, which vLLM has no kernels for there.

vLLM 0.32 and 0.33 compute such experts on a CPU from symmetric 4-bit codes with 8-bit activations only, and without
adapters; here all widths are computed from the codes with the activations as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.platforms import current_platform

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.engines.vllm.plugin.expert_parts import COMPRESSED_NAMES
from cloq_export.engines.vllm.plugin.experts import experts_method
from cloq_export.engines.vllm.plugin.stored_grids import grids_of_files, mapped_grids, modules_of
from cloq_export.errors import CloqError


def register() -> None:
    """Let the CPU compute the experts of checkpoints whose codes this package reads."""
    config = CompressedTensorsConfig
    if not current_platform.is_cpu() or hasattr(config.get_quant_method, "of_cloq_export"):
        return
    stock_update, stock_map = config.maybe_update_config, config.apply_vllm_mapper
    stock_method = config.get_quant_method

    def update(self: Any, model_name: str, *args: Any, **kwargs: Any) -> None:
        stock_update(self, model_name, *args, **kwargs)
        self.cloq_export_grids = None
        if Path(model_name).is_dir():
            try:
                self.cloq_export_grids = grids_of_files(Checkpoint.open(model_name))
            except CloqError:
                return  # not a checkpoint of integer codes: vLLM's own code reports the error

    def apply_mapper(self: Any, hf_to_vllm_mapper: Any) -> None:
        stock_map(self, hf_to_vllm_mapper)
        grids = getattr(self, "cloq_export_grids", None)
        if grids is not None:
            self.cloq_export_grids = mapped_grids(grids, hf_to_vllm_mapper)

    def get_quant_method(self: Any, layer: Any, prefix: str) -> Any:
        grids = getattr(self, "cloq_export_grids", None)
        if grids is not None and isinstance(layer, RoutedExperts):
            return experts_method(layer, prefix, grids.spec_for, COMPRESSED_NAMES)
        if grids is not None and isinstance(layer, LinearBase):
            # A router is a linear layer for vLLM alone, so that no list of linear layers that stay float has it.
            modules = modules_of(prefix, grids, self.packed_modules_mapping)
            if all(grids.spec_for(module) is None for module in modules):
                return UnquantizedLinearMethod()
        return stock_method(self, layer, prefix)

    get_quant_method.of_cloq_export = True  # type: ignore[attr-defined]
    config.maybe_update_config, config.apply_vllm_mapper = update, apply_mapper
    config.get_quant_method = get_quant_method
