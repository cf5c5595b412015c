"""The quantization config "cloq": checkpoints with GPTQ's words that vLLM itself refuses or would misread."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_safetensors_params_metadata

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.engines.vllm.plugin.experts import experts_method
from cloq_export.engines.vllm.plugin.linear import CloqLinearMethod
from cloq_export.engines.vllm.plugin.stored_grids import grids_of_files, mapped_grids, modules_of
from cloq_export.errors import CloqError, FormatError
from cloq_export.formats import auto_round
from cloq_export.formats.gptq import GptqLayout, is_head
from cloq_export.formats.layout import StoredGrids
from cloq_export.formats.registry import read_quantization_config
from cloq_export.types import QuantSpec

METHOD = "cloq"

ROUND_SCALES_VARIABLE = "CLOQ_EXPORT_VLLM_ROUND_SCALES"
"""Environment variable that allows bfloat16 on CUDA, where vLLM's kernels want scales in the activations' dtype."""

# What vLLM's own GPTQ config takes: vllm/model_executor/layers/quantization/auto_gptq.py (AutoGPTQConfig.TYPE_MAP) and
# utils/marlin_utils.py (MARLIN_SUPPORTED_GROUP_SIZES), the same in 0.32 and 0.33.
_STOCK_GRIDS = ((4, True), (8, True))
_STOCK_GROUP_SIZES = (-1, 32, 64, 128)
# vLLM's config for AutoRound's files, whose packing it must be, has the same grids (inc/schemes/inc_wna16_linear.py),
# on a CPU those of 4 bits alone.
_STOCK_PACKINGS = (None, auto_round.DEFAULT_PACKING)
_READ_METHODS = ("gptq", auto_round.METHOD)
_LABELS = (None, METHOD, "gptq")
_NUMBERS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# What this plugin does not compute. `desc_act` is not among it: whether groups have an order, g_idx tells.
_UNSERVED = {"lm_head": "a quantized head"}


def register() -> None:
    """Make the config known to vLLM."""
    register_quantization_config(METHOD)(CloqConfig)


def reads(config: Mapping[str, Any]) -> bool:
    """Return whether a `quantization_config` is one that this plugin reads."""
    if config.get("quant_method") not in _READ_METHODS or any(config.get(key) for key in _UNSERVED):
        return False
    try:
        return _coded_head(read_quantization_config(config, {})) is None
    except CloqError:
        return False  # vLLM's own config reports the error


def is_mixture(hf_config: Any) -> bool:
    """Return whether a model's config tells of experts, by what transformers' classes call their number."""
    text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    return any((getattr(text, name, None) or 0) > 1 for name in _NUMBERS_OF_EXPERTS)


def claims(config: Mapping[str, Any]) -> bool:
    """Return whether a `quantization_config` is one that this plugin reads and vLLM itself does not.

    Args:
        config: as it stands in config.json.
    """
    if not reads(config):
        return False
    grids = read_quantization_config(config, {})
    if (grids.overrides or grids.rules) and grids.modules is not None:
        # vLLM looks rules up under the names of fused layers, which no rule of ours has, and would take the default.
        return True
    specs = [grids.default, *(spec for spec in grids.overrides.values() if spec is not None)]
    specs += [spec for _, spec in grids.rules if spec is not None]
    stock: Collection[tuple[int, bool]] = _STOCK_GRIDS
    if grids.layout.quant_method == auto_round.METHOD:
        if config.get("packing_format") not in _STOCK_PACKINGS:
            return True
        stock = _STOCK_GRIDS[:1] if current_platform.is_cpu() else _STOCK_GRIDS
    return not all((spec.bits, spec.symmetric) in stock and spec.group_size in _STOCK_GROUP_SIZES for spec in specs)


def _coded_head(grids: StoredGrids) -> str | None:
    """Return the output head that is among the quantized modules, which AutoRound's config says by its name alone."""
    named = [module for module, spec in grids.overrides.items() if spec is not None]
    return next((module for module in (*(grids.modules or ()), *named) if is_head(module)), None)


class CloqConfig(QuantizationConfig):
    """What a checkpoint's config says, and which linear layers it is about.

    Args:
        grids: layout and grid of every module.
    """

    def __init__(self, grids: StoredGrids) -> None:
        super().__init__()
        self.grids = grids

    def __repr__(self) -> str:
        """Return layout and default grid."""
        return f"CloqConfig({self.grids.layout.name}, {self.grids.default}, {len(self.grids.overrides)} overrides)"

    @property
    def _first_version(self) -> bool:
        """Whether zeros are stored less one."""
        return isinstance(self.grids.layout, GptqLayout) and self.grids.layout.version == 1

    @classmethod
    def get_name(cls) -> str:
        """Return "cloq"."""
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return the dtypes of activations; on CUDA only those whose scales stay as they were trained against."""
        dtypes = [torch.float16, torch.float32]
        if current_platform.is_cpu() or os.environ.get(ROUND_SCALES_VARIABLE) == "1":
            dtypes.append(torch.bfloat16)
        return dtypes

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest GPU, Turing."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no file: the config stands in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CloqConfig:
        """Read a `quantization_config`.

        Raises:
            FormatError: it is damaged, or has what the plugin does not compute.
        """
        for key, what in _UNSERVED.items():
            if config.get(key):
                raise FormatError(
                    f"quantization_config: {key} is {config[key]!r:.80}, and this plugin does not serve {what}; write "
                    "the checkpoint again with `cloq convert`, or serve a merged export (cloq export --format merged)."
                )
        grids = read_quantization_config(config, {})
        if (head := _coded_head(grids)) is not None:
            raise FormatError(
                f"quantization_config: {head} is quantized, and this plugin does not serve {_UNSERVED['lm_head']}; "
                "serve a merged export (cloq export --format merged)."
            )
        return cls(grids)

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Return names as they are: vLLM would drop g_idx, which the layers look at."""
        return WeightsMapper()

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim a checkpoint that vLLM itself refuses, and any for which `--quantization cloq` was given."""
        if hf_quant_cfg.get("quant_method") not in _READ_METHODS or user_quant not in _LABELS:
            return None
        # On the CPU vLLM computes no experts of GPTQ checkpoints at all.
        experts = current_platform.is_cpu() and is_mixture(hf_config) and reads(hf_quant_cfg)
        return METHOD if user_quant == METHOD or experts or claims(hf_quant_cfg) else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Find the quantized modules in the files, where a foreign config does not list them.

        Ours are listed as they are called in memory; vLLM goes by their names in the files.
        """
        if self.grids.modules is None:
            names = get_safetensors_params_metadata(model_name, revision=revision)
            modules = sorted(name.removesuffix(".qweight") for name in names if name.endswith(".qweight"))
            self.grids = self.grids.with_modules(modules)
        elif Path(model_name).is_dir():
            self.grids = grids_of_files(Checkpoint.open(model_name))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename modules as the model of vLLM does."""
        self.grids = mapped_grids(self.grids, hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return how a layer is loaded and computed; None for what is neither linear nor a layer of experts.

        Raises:
            FormatError: a part of a fused layer is quantized and another is not.
            EngineError: quantized experts are of a kind, or on a device, that the plugin does not compute.
        """
        if isinstance(layer, ParallelLMHead):
            return None
        if isinstance(layer, RoutedExperts):
            return experts_method(layer, prefix, self.grids.spec_for, first_version=self._first_version)
        if not isinstance(layer, LinearBase):
            return None
        names = modules_of(prefix, self.grids, self.packed_modules_mapping)
        specs: list[QuantSpec | None] = [self.grids.spec_for(name) for name in names]
        quantized = [spec for spec in specs if spec is not None]
        if not quantized:
            return UnquantizedLinearMethod()
        if len(quantized) < len(specs):
            apart = ", ".join(name for name, spec in zip(names, specs, strict=True) if spec is None)
            raise FormatError(
                f"vLLM computes {', '.join(names)} as one layer, but {apart} is not quantized; quantize all of them or "
                "none, with an override in the recipe."
            )
        return CloqLinearMethod(names, quantized, first_version=self._first_version)
