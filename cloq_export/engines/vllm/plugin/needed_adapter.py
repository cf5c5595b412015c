"""A base that says nothing without its adapter is never asked alone, whatever program runs vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from cloq_export.artifact.needed_adapter import WHY
from cloq_export.errors import CloqError, EngineError
from cloq_export.formats.layout import read_binding


def register() -> None:
    """Refuse requests without an adapter to such a base, where every request of every program comes by."""
    if hasattr(InputProcessor._validate_lora, "of_cloq_export"):
        return
    stock_init, stock_check = InputProcessor.__init__, InputProcessor._validate_lora

    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        model = vllm_config.model_config
        self.alone_refused_by_cloq_export = refusal_alone(model)
        if self.alone_refused_by_cloq_export is not None and vllm_config.lora_config is None:
            raise EngineError(
                f"{model.model} needs its adapter: {WHY}; start with --enable-lora and --lora-modules NAME=FOLDER, or "
                "with cloq serve."
            )
        stock_init(self, vllm_config, *args, **kwargs)

    def check(self: Any, lora_request: Any) -> None:
        if lora_request is None and self.alone_refused_by_cloq_export is not None:
            raise VLLMValidationError(self.alone_refused_by_cloq_export, parameter="model")
        stock_check(self, lora_request)

    check.of_cloq_export = True  # type: ignore[attr-defined]
    InputProcessor.__init__, InputProcessor._validate_lora = init, check


def refusal_alone(model: Any) -> str | None:
    """Return what requests without an adapter are told, from vLLM's `ModelConfig`; None if the base answers them."""
    if not needs_adapter(model.hf_config):
        return None
    return f"{model.served_model_name or model.model} needs its adapter: {WHY}. Ask for an adapter by its name."


def needs_adapter(hf_config: Any) -> bool:
    """Return whether a model's config says that its codes were made for what their adapter leaves of the weights.

    The config is asked and not the files, because vLLM also serves what lies on a hub.
    """
    config: Any = getattr(hf_config, "quantization_config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        return False
    try:
        binding = read_binding(config, source="quantization_config")
    except CloqError:
        return False  # vLLM does not read such a config, and says so
    return binding is not None and binding.needs_adapter
