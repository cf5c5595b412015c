"""What the config files of a model folder say about how its weights are quantized."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cloq_export.files.safe_json import read_json

# Files besides config.json in which other writers say how the weights are quantized.
QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")

# "quantization" is MLX's word.
_KEYS = ("quantization_config", "compression_config", "quantization", "quant_config")
_METHOD_KEYS = ("quant_method", "quant_algo", "format", "quant_type")
# Methods whose weights are floats of 8 or 4 bits with scales.
_FLOAT_METHODS = ("fp8", "fbgemm_fp8", "mxfp4", "nvfp4", "modelopt", "modelopt_fp4", "modelopt_mixed")
_FLOAT_ALGORITHMS = ("FP8", "NVFP4", "MXFP4", "MXFP8", "MIXED_PRECISION")
_FLOAT_FORMATS = (
    *("float-quantized", "naive-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
    *("mixed-precision", "dense"),
)


@dataclasses.dataclass(frozen=True)
class StatedQuantization:
    """One place of a folder that says how the weights are quantized.

    Args:
        where: the place, in words.
        method: as it names it.
        content: what stands there.
    """

    where: str
    method: str
    content: Mapping[str, Any]

    @property
    def is_float(self) -> bool:
        """Return whether weights of this method are floats of fewer bits with scales beside them, and nothing more.

        Methods that rotate or prune the weights, or shift them by zeros, are none of these.
        """
        content = self.content
        method = str(content.get("quant_method") or "").lower()
        if method == "compressed-tensors" or (not method and "config_groups" in content):
            groups = content.get("config_groups")
            groups = list(groups.values()) if isinstance(groups, Mapping) else []
            weights = [group.get("weights") for group in groups if isinstance(group, Mapping)]
            sparsity = content.get("sparsity_config")
            return (
                (content.get("format") or "dense") in _FLOAT_FORMATS
                and all(isinstance(each, Mapping) and each.get("type", "float") == "float" for each in weights)
                and not content.get("transform_config")
                and not (isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense")
            )
        algorithm = content.get("quant_algo")
        if isinstance(algorithm, str):
            return algorithm.upper().startswith(_FLOAT_ALGORITHMS) and "AWQ" not in algorithm.upper()
        return method in _FLOAT_METHODS

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """Return rows and columns of one scale of fp8 weights, each that the place names."""
        groups = self.content.get("config_groups")
        groups = list(groups.values()) if isinstance(groups, Mapping) else []
        stated = [self.content.get("weight_block_size")]
        for each in (group.get("weights") for group in groups if isinstance(group, Mapping)):
            if isinstance(each, Mapping):
                stated += [each.get("block_structure"), [1, each.get("group_size")]]
        return tuple(
            (block[0], block[1])
            for block in stated
            if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
        )


def stated_quantization(folder: Path, config: Mapping[str, Any]) -> list[StatedQuantization]:
    """Return every place of a folder that says that its weights are quantized.

    Args:
        folder: the model's folder.
        config: content of its config.json.

    Raises:
        FormatError: a file that says so is damaged.
    """
    return list(_stated(folder, config))


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json without what it says about quantization, in its parts either."""
    return {
        key: without_quantization(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _KEYS
    }


def forget_quantization(config: Any) -> None:
    """Remove from a configuration of transformers, and from those of its parts, what they say about quantization."""
    import transformers

    parts = (each for each in vars(config).values() if isinstance(each, transformers.PreTrainedConfig))
    for part in (config, *parts):
        for key in _KEYS:
            vars(part).pop(key, None)


def _stated(folder: Path, config: Mapping[str, Any]) -> Iterator[StatedQuantization]:
    for path, content in _nested(config, ()):
        yield StatedQuantization(f"{'.'.join(path)} in its config.json", _method(content, path[-1]), content)
    for file in QUANTIZATION_FILES:
        if not (folder / file).is_file():
            continue
        content = read_json(folder / file)
        inner = content.get("quantization")
        if file == "hf_quant_config.json" and isinstance(inner, Mapping):
            told = [inner.get(key) for key in ("quant_algo", "kv_cache_quant_algo") if inner.get(key)]
            if told:
                yield StatedQuantization(f"its {file}", f"modelopt {told[0]}", inner)
        elif content:
            yield StatedQuantization(f"its {file}", _method(content, file), content)


def _nested(config: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    for key, value in config.items():
        if key in _KEYS and (value if key != "quantization_config" else value is not None):
            yield (*path, key), value if isinstance(value, Mapping) else {"quant_method": str(value)}
        elif isinstance(value, Mapping):
            yield from _nested(value, (*path, key))


def _method(content: Mapping[str, Any], place: str) -> str:
    for key in _METHOD_KEYS:
        if isinstance(content.get(key), str) and content[key]:
            return str(content[key])[:40]
    if content.get("load_in_8bit") or content.get("load_in_4bit"):
        return "bitsandbytes"
    if place == "quantization":
        return "mlx"
    if "desc_act" in content:
        return "gptq"
    if "w_bit" in content or "zero_point" in content:
        return "awq"
    return "unknown"
