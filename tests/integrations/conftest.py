"""The entries in other libraries, made for one test and taken back after it."""

from __future__ import annotations

import peft
import pytest
from peft.tuners.lora import model as lora_model
from peft.utils import transformers_weight_conversion as names
from transformers.quantizers import auto

import cloq_export
from cloq_export.integrations import transformers as quantizer


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        monkeypatch.setattr(auto, name, dict(getattr(auto, name)))
    for owner, name in (
        (lora_model, "dispatch_default"),
        (peft.PeftModel, "save_pretrained"),
        (peft.PeftModel, "load_adapter"),
        (names, "convert_peft_config_for_transformers"),
        (names, "convert_peft_adapter_state_dict_for_transformers"),
        (quantizer, "_claims_foreign"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    cloq_export.register()
