"""Which class of transformers a config describes: a causal language model, or a wrapper around one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cloq_export.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_class(name: str, config: Any) -> type[PreTrainedModel]:
    """Return the class whose checkpoints a config describes, the one that it names where there are several.

    A wrapper (a language model with towers for images or sounds) is opened as the wrapper: were its text part opened
    alone, what is written would carry the wrapper's config and processors over the text part's weights.

    Args:
        name: of the model, for the message.
        config: its configuration, as `AutoConfig` reads it.

    Raises:
        UnsupportedModelError: transformers has no causal language model and no wrapper of this type.
    """
    import transformers

    mappings = (
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    )
    named = [mapping.get(type(config), None) for mapping in mappings]
    classes = [one for entry in named if entry for one in (entry if isinstance(entry, tuple) else (entry,))]
    # Of some wrappers the first mapping names the class of the text part.
    whole = [one for one in classes if issubclass(type(config), one.config_class)]
    asked = [one for one in whole if one.__name__ in (config.architectures or ())]
    if not whole:
        raise UnsupportedModelError(
            f"{name} is no causal language model that the installed transformers knows (its type is "
            f"{config.model_type}). Choose another model, or a newer transformers."
        )
    return (asked or whole)[0]
