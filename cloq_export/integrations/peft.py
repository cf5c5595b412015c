"""PEFT over packed models: its LoRA layers use our kernels, and the folders that it saves name their base."""

from __future__ import annotations

import functools
import itertools
import warnings
from pathlib import Path
from typing import Any

import peft
from peft.tuners.lora import model as lora_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import transformers_weight_conversion as names
from torch import nn

from cloq_export.artifact.adapters import refuse_other_base
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.engines.packed_linear import PackedLinear
from cloq_export.engines.packed_lora import PackedLoraLinear
from cloq_export.formats.peft.codec import read_bound_fingerprint, write_binding
from cloq_export.integrations.stacked_experts import split_tensors, target_split_experts


def register() -> None:
    """Let PEFT put our LoRA layer around packed linears, bind what it saves, and refuse adapters of another base.

    PEFT has no registry: `LoraConfig._register_custom_module` holds for one config that somebody has in hand, and it
    has no hook for saving. So five of its functions are wrapped; for all other models they do what they did.
    """
    if hasattr(lora_model.dispatch_default, "of_cloq_export"):
        return
    lora_model.dispatch_default = _dispatching(lora_model.dispatch_default)
    peft.PeftModel.save_pretrained = _binding(peft.PeftModel.save_pretrained)
    peft.PeftModel.load_adapter = _checking(peft.PeftModel.load_adapter)
    names.convert_peft_config_for_transformers = _keeping_config(names.convert_peft_config_for_transformers)
    names.convert_peft_adapter_state_dict_for_transformers = _keeping_tensors(
        names.convert_peft_adapter_state_dict_for_transformers
    )


def _dispatching(stock: Any) -> Any:
    @functools.wraps(stock)
    def dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, PackedLinear) or kwargs.get("parameter_name") is not None:
            result: nn.Module | None = stock(target, adapter_name, config=config, **kwargs)
            return result
        return PackedLoraLinear(target, adapter_name, config=config, **kwargs)

    dispatch.of_cloq_export = True  # type: ignore[attr-defined]
    return dispatch


def _binding(stock: Any) -> Any:
    @functools.wraps(stock)
    def save_pretrained(self: peft.PeftModel, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        base = _base_of(self)
        if base is None:
            stock(self, save_directory, *args, **kwargs)
            return
        # Its state dict would hold every packed layer a second time; PEFT looks up adapters only.
        if kwargs.get("state_dict") is None:
            named = itertools.chain(self.named_parameters(remove_duplicate=False), self.named_buffers())
            kwargs["state_dict"] = {name: tensor.detach() for name, tensor in named}
        stock(self, save_directory, *args, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        for name in kwargs.get("selected_adapters") or self.peft_config:
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            model = self.peft_config[name].base_model_name_or_path or str(base.folder)
            write_binding(folder, base_model=model, base_fingerprint=base.fingerprint)

    return save_pretrained


def _checking(stock: Any) -> Any:
    @functools.wraps(stock)
    def load_adapter(self: peft.PeftModel, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        base, folder = _base_of(self), Path(model_id) / (kwargs.get("subfolder") or "")
        if base is not None and folder.is_dir():
            bound_to = read_bound_fingerprint(folder)
            if bound_to is None:
                warnings.warn(
                    f"{folder} does not say which quantized base it belongs to; it is right only if it was trained on "
                    f"{base.folder}.",
                    stacklevel=2,
                )
            else:
                refuse_other_base(folder, bound_to, base)
        return stock(self, model_id, *args, **kwargs)

    return load_adapter


def _keeping_config(stock: Any) -> Any:
    """Leave the targets of a config as they are: PEFT takes names like `gate_proj` for parts of fused experts.

    Those of a packed model are split, and it would leave out dense layers and shared experts of these names too. What
    names fused experts themselves (`target_parameters`) names the layers of each expert here.
    """

    @functools.wraps(stock)
    def convert(peft_config: Any, model: nn.Module, conversions: Any) -> None:
        if _quantized_base(model) is None:
            stock(peft_config, model, conversions)
        else:
            target_split_experts(peft_config, model)

    return convert


def _keeping_tensors(stock: Any) -> Any:
    """Leave the names of an adapter's tensors as they are, for the same reason; stacked pairs of experts are split."""

    @functools.wraps(stock)
    def convert(model: Any, peft_config: Any, adapter_state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        if _quantized_base(inner) is not None:
            return split_tensors(inner, adapter_state_dict)
        return stock(model, peft_config, adapter_state_dict, *args, **kwargs)

    return convert


def _base_of(model: peft.PeftModel) -> Checkpoint | None:
    return _quantized_base(model.get_base_model())


def _quantized_base(model: nn.Module) -> Checkpoint | None:
    base: Checkpoint | None = getattr(model, "quantized_base", None)
    return base
