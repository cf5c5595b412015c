"""Where a folder says how its weights are quantized: in config.json, or where older and other tools keep it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cloq_export.errors import FormatError
from cloq_export.files.safe_json import read_json
from cloq_export.files.safe_paths import require_inside

CONFIG_NAME = "config.json"
# Where a quantization is described: keys of config.json, keys of a language model's config in it, and files of older
# tools and of ModelOpt. AutoGPTQ and GPTQModel write the same thing into a file and into config.json.
_KEYS = ("quantization_config", "compression_config")
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
QUANTIZE_CONFIG_NAME = "quantize_config.json"
_CONFIG_FILES = (QUANTIZE_CONFIG_NAME, "quant_config.json", "hf_quant_config.json")
# What decides how the tensors are read: where two places differ in one of these, they describe two files.
_DECISIVE = (
    "quant_method",
    "bits",
    "group_size",
    "sym",
    "checkpoint_format",
    "format",
    "packing_format",
    "dynamic",
    "extra_config",
    "config_groups",
    "ignore",
)


@dataclasses.dataclass(frozen=True)
class DescribedQuantization:
    """What a folder says about its quantization, wherever it stands.

    Args:
        config: as a `quantization_config` of config.json holds it.
        source: the place, for messages.
        elsewhere: whether config.json has none at its usual place.
    """

    config: Mapping[str, Any]
    source: str
    elsewhere: bool


def find_quantization(folder: Path, config: Mapping[str, Any]) -> DescribedQuantization | None:
    """Find the description of a quantization in config.json, or where older and other tools keep it.

    Args:
        folder: the checkpoint folder.
        config: content of its config.json.

    Returns:
        What is described, with keys that only another place has added; None where there is nothing.

    Raises:
        FormatError: a place is damaged, or two of them disagree.
    """
    places = [*_places_in_config(folder, config), *_places_beside(folder)]
    if not places:
        return None
    source, main = places[0]
    for other, content in places[1:]:
        for key in _DECISIVE:
            if key in main and key in content and main[key] != content[key]:
                raise FormatError(
                    f"{source} says {key} {main[key]!r:.80}, but {other} says {content[key]!r:.80}; one of them "
                    "describes another checkpoint: remove the wrong one."
                )
        # A file of its own keeps the order of the rules; what transformers writes into config.json is sorted.
        added = {key: content[key] for key in _DECISIVE if key in content and (key not in main or key == "dynamic")}
        main = {**main, **added}
    return DescribedQuantization(main, source, source != str(folder / CONFIG_NAME))


def _places_in_config(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    source = str(folder / CONFIG_NAME)
    for owner in (None, *_TEXT_CONFIGS):
        held = config if owner is None else config.get(owner)
        for key in _KEYS if isinstance(held, Mapping) else ():
            value = held.get(key)  # type: ignore[union-attr]
            if value is None:
                continue
            place = key if owner is None else f"{owner}.{key}"
            if not isinstance(value, Mapping):
                raise FormatError(f"{source}: {place} is a {type(value).__name__}; expected an object.")
            if not value:
                continue
            if key == "compression_config" and "quant_method" not in value:
                value = {"quant_method": "compressed-tensors", **value}
            yield (source if place == _KEYS[0] else f"{source} ({place})"), value


def _places_beside(folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name in _CONFIG_FILES:
        path = folder / name
        if not path.is_file():
            continue
        content: Mapping[str, Any] = read_json(require_inside(folder, path))
        if name == "hf_quant_config.json":
            inner = content.get("quantization")
            content = {"quant_method": "modelopt", **(inner if isinstance(inner, Mapping) else content)}
        elif content and "quant_method" not in content:
            # AutoGPTQ's first versions named no method, and AWQ's first versions other keys.
            content = {"quant_method": "awq" if "w_bit" in content else "gptq", **content}
        if content:
            yield str(path), content
