"""Which class a config is opened as."""

from __future__ import annotations

import pytest
import transformers

from cloq_export.errors import UnsupportedModelError
from cloq_export.models.model_class import model_class


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.LlamaConfig(), "LlamaForCausalLM"),
        (transformers.Gemma3TextConfig(), "Gemma3ForCausalLM"),
        (transformers.Gemma3Config(), "Gemma3ForConditionalGeneration"),
        # AutoModelForCausalLM would open the text part alone.
        (transformers.Qwen3_5Config(), "Qwen3_5ForConditionalGeneration"),
        (transformers.Qwen3_5TextConfig(), "Qwen3_5ForCausalLM"),
        (transformers.Qwen2_5_VLConfig(), "Qwen2_5_VLForConditionalGeneration"),
        # The class is another wrapper's, whose config this one does not come from.
        (transformers.GlmgaConfig(), "Glm46VForConditionalGeneration"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_is_opened_as_its_own_class(config: transformers.PretrainedConfig, expected: str) -> None:
    assert model_class("MODEL", config).__name__ == expected


def test_the_class_that_a_config_names_is_taken_among_several() -> None:
    config = transformers.Gemma3Config(architectures=["Gemma3ForConditionalGeneration"])
    assert model_class("MODEL", config).__name__ == "Gemma3ForConditionalGeneration"


def test_a_type_without_a_language_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"MODEL is no causal language model .*its type is vit"):
        model_class("MODEL", transformers.ViTConfig())
