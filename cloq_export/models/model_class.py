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
    named = [mapping.get(type(config), None) or () for mapping in mappings]
    of_text, *of_wrappers = [entry if isinstance(entry, tuple) else (entry,) for entry in named]
    # Of some wrappers the first mapping names the class of the text part. A wrapper with a config of its own may have
    # the class of another.
    whole = [one for one in of_text if issubclass(type(config), one.config_class)]
    whole += [one for entry in of_wrappers for one in entry]
    asked = [one for one in whole if one.__name__ in (config.architectures or ())]
    if not whole:
        raise UnsupportedModelError(
            f"{name} is no causal language model that the installed transformers knows (its type is "
            f"{config.model_type}). Choose another model, or a newer transformers."
        )
    return (asked or whole)[0]
