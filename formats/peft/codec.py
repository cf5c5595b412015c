"""Write and read LoRA adapters in PEFT's layout; the rules stand in SPEC.md."""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cloq_export.errors import FormatError, NonFiniteError, ShapeError
from cloq_export.run.atomic import write_folder, write_json, write_safetensors
from cloq_export.run.safe_json import read_json
from cloq_export.run.safe_paths import require_inside
from cloq_export.run.safe_tensors import read_safetensors
from cloq_export.types import LoraPair

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
BINDING_NAME = "cloq_adapter.json"
BINDING_FORMAT = "cloq-adapter"
FORMAT_VERSION = 1

_KEY_PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_FINGERPRINT_KEY = "cloq_base_fingerprint"
_OUR_FILES = {CONFIG_NAME, WEIGHTS_NAME, BINDING_NAME, "README.md", "cloq_certificate.json"}

# PEFT's other initialisations change the base weights when an adapter is loaded; these only set A and B.
_HARMLESS_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
_LARGEST = 1e9
_LONGEST_FINGERPRINT = 128
_PLAIN_PATTERN = re.compile(r"\^?(?:[\w.\-]|\\[.\-])+\$?")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as read from a folder.

    Args:
        pairs: full module name -> LoRA pair, whose alpha gives the scaling that PEFT would use.
        config: the content of adapter_config.json.
        base_fingerprint: of the quantized base that it is bound to; None if it names none.
        extra: how the adapter was made, as its writer recorded it; empty if it recorded nothing.
    """

    pairs: Mapping[str, LoraPair]
    config: Mapping[str, Any]
    base_fingerprint: str | None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def write_adapter(
    folder: str | os.PathLike[str],
    pairs: Mapping[str, LoraPair],
    *,
    base_model: str,
    base_fingerprint: str,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter folder, whole or not at all; upstream PEFT loads it unchanged.

    Args:
        folder: the folder to make; an earlier adapter there is replaced.
        pairs: full module name -> LoRA pair, at least one.
        base_model: name or path of the model that the base was made from.
        base_fingerprint: of the quantized base that the adapter belongs to.
        extra: what else a reader may want to know, e.g. {"split": "balanced", "padded_from": 60}; JSON values.

    Raises:
        FormatError: there is no pair.
        RunDirectoryError: the folder holds other files, or cannot be written.
    """
    if not pairs:
        raise FormatError("an adapter needs at least one LoRA pair; rank 0 makes none: choose --rank 1 or more.")
    tensors: dict[str, torch.Tensor] = {}
    for module, pair in pairs.items():
        tensors[f"{_KEY_PREFIX}{module}.lora_A.weight"] = pair.lora_A
        tensors[f"{_KEY_PREFIX}{module}.lora_B.weight"] = pair.lora_B
    binding = {
        "format": BINDING_FORMAT,
        "format_version": FORMAT_VERSION,
        "base_fingerprint": base_fingerprint,
        "base_model": base_model,
    } | ({"extra": dict(extra)} if extra else {})
    metadata = {"format": "pt", "cloq_format_version": str(FORMAT_VERSION), _FINGERPRINT_KEY: base_fingerprint}
    with write_folder(folder, owned=_holds_only_an_adapter) as filling:
        # The order of the patterns matters (the first match wins), so the keys are not sorted.
        write_json(filling / CONFIG_NAME, _adapter_config(pairs, base_model), sort_keys=False)
        write_json(filling / BINDING_NAME, binding)
        write_safetensors(filling / WEIGHTS_NAME, tensors, metadata)


def read_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Read a LoRA adapter, ours or any plain one of PEFT, trusting nothing about it.

    Args:
        folder: the adapter folder.

    Returns:
        The adapter, tensors on the CPU.

    Raises:
        FormatError: a file is missing or damaged, or the adapter uses what plain LoRA has not.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FormatError(f"{folder} is not a folder; give the folder that holds {CONFIG_NAME}.")
    config = read_json(require_inside(folder, folder / CONFIG_NAME))
    source = str(folder / CONFIG_NAME)
    _check_config(config, source)
    tensors, metadata = read_safetensors(require_inside(folder, folder / WEIGHTS_NAME))
    weights = str(folder / WEIGHTS_NAME)
    sides: dict[str, dict[str, torch.Tensor]] = collections.defaultdict(dict)
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise FormatError(
                f"{weights} holds {key!r}, which is no LoRA matrix of the form {_KEY_PREFIX}<module>.lora_A.weight; "
                "only plain LoRA is read."
            )
        if not tensor.is_floating_point():
            raise FormatError(f"{weights}: {key} is {tensor.dtype}; expected a float dtype.")
        sides[match["module"]][match["side"]] = tensor
    if not sides:
        raise FormatError(f"{weights} holds no tensor; the adapter is empty.")
    pairs: dict[str, LoraPair] = {}
    for module in sorted(sides):
        pair = sides[module]
        for side in ("A", "B"):
            if side not in pair:
                raise FormatError(f"{weights} lacks lora_{side} of {module}; the adapter is damaged.")
        rank, alpha = _rank_and_alpha(config, module)
        if rank < 1 or rank != int(rank):
            raise FormatError(f"{source} gives {module} rank {rank}; a rank is 1 or more, and whole.")
        if pair["A"].ndim != 2 or pair["A"].shape[0] != rank:
            raise FormatError(
                f"{weights}: lora_A of {module} has shape {tuple(pair['A'].shape)}, but {CONFIG_NAME} gives rank "
                f"{rank}."
            )
        try:
            pairs[module] = LoraPair(lora_A=pair["A"], lora_B=pair["B"], alpha=alpha)
        except (ShapeError, NonFiniteError) as error:
            raise FormatError(f"{weights}: {module}: {error}") from None
    return Adapter(pairs, config, *_read_binding(folder, metadata))


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder looks like an adapter (which may still be damaged)."""
    return (Path(folder) / CONFIG_NAME).is_file()


def _adapter_config(pairs: Mapping[str, LoraPair], base_model: str) -> dict[str, Any]:
    ranks = collections.Counter(pair.rank for pair in pairs.values())
    alphas = collections.Counter(pair.alpha for pair in pairs.values())
    rank = min(ranks, key=lambda value: (-ranks[value], value))
    alpha = min(alphas, key=lambda value: (-alphas[value], value))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        "target_modules": sorted(pairs),
        "rank_pattern": _patterns({name: pair.rank for name, pair in pairs.items()}, rank),
        "alpha_pattern": _patterns({name: _number(pair.alpha) for name, pair in pairs.items()}, _number(alpha)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _patterns(values: Mapping[str, float], default: float) -> dict[str, float]:
    # Readers match a key as a suffix at a dot and take the first that matches. So a module whose name ends with a
    # listed one is listed too, and longer names come first: then each module meets its own entry before any other.
    listed = {name for name, value in values.items() if value != default}
    listed |= {name for name in values if any(name.endswith(f".{other}") for other in listed)}
    return {name: values[name] for name in sorted(listed, key=lambda name: (-len(name), name))}


def _number(value: float) -> float:
    # vLLM and PEFT declare lora_alpha as an integer; neither refuses another number.
    return int(value) if float(value).is_integer() else float(value)


def _holds_only_an_adapter(folder: Path) -> bool:
    names = {entry.name for entry in folder.iterdir()}
    return CONFIG_NAME in names and names <= _OUR_FILES


def _check_config(config: Mapping[str, Any], source: str) -> None:
    if config.get("peft_type") != "LORA":
        raise FormatError(f"{source}: peft_type is {config.get('peft_type')!r:.80}; only 'LORA' is read.")
    for option, allowed in (("bias", ("none", None)), ("modules_to_save", (None, []))):
        if config.get(option) not in allowed:
            raise FormatError(f"{source}: {option} is {config[option]!r:.80}; only plain LoRA matrices are read.")
    for option in ("use_dora", "lora_bias", "fan_in_fan_out", "use_qalora", "alora_invocation_tokens", "use_bdlora"):
        if config.get(option):
            raise FormatError(f"{source}: {option} is {config[option]!r:.80}; only plain LoRA is read.")
    if config.get("init_lora_weights", True) not in _HARMLESS_INITIALISATIONS:
        raise FormatError(
            f"{source}: init_lora_weights is {config['init_lora_weights']!r:.80}, which changes the base weights; "
            "convert the adapter to plain LoRA first (PEFT: path_initial_model_for_weight_conversion)."
        )
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(option) or {}
        if not isinstance(patterns, Mapping):
            raise FormatError(f"{source}: {option} is a {type(patterns).__name__}; expected an object.")
        for pattern, value in patterns.items():
            # A general regular expression in a file that nobody vouches for can run for ever.
            if _PLAIN_PATTERN.fullmatch(pattern) is None or not _is_number(value):
                raise FormatError(
                    f"{source}: {option} maps {pattern[:80]!r} to {value!r:.80}; only module names and numbers are "
                    "read."
                )
    if not _is_number(config.get("r")) or not _is_number(config.get("lora_alpha")):
        raise FormatError(
            f"{source}: r is {config.get('r')!r:.80} and lora_alpha {config.get('lora_alpha')!r:.80}; expected numbers."
        )


def _is_number(value: Any) -> bool:
    # Compared first: a whole number beyond every float is none that math takes.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _rank_and_alpha(config: Mapping[str, Any], module: str) -> tuple[float, float]:
    rank = _matched(config.get("rank_pattern"), module, config["r"])
    alpha = float(_matched(config.get("alpha_pattern"), module, config["lora_alpha"]))
    if config.get("use_rslora"):
        # rsLoRA scales by alpha / sqrt(rank) where LoRA scales by alpha / rank.
        alpha *= math.sqrt(rank)
    return rank, alpha


def _matched(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _is_fingerprint(text: str) -> bool:
    # Messages carry it, and a text that runs over lines or screens would hide what they say.
    return 0 < len(text) <= _LONGEST_FINGERPRINT and text.isprintable()


def _read_binding(folder: Path, metadata: Mapping[str, str]) -> tuple[str | None, Mapping[str, Any]]:
    """Return the base fingerprint and what else the writer recorded."""
    inside = metadata.get(_FINGERPRINT_KEY)
    if inside is not None and not _is_fingerprint(inside):
        raise FormatError(f"{folder / WEIGHTS_NAME}: {_FINGERPRINT_KEY} is {inside!r:.80}; the file is damaged.")
    path = folder / BINDING_NAME
    if not path.exists():
        return inside, {}
    binding = read_json(require_inside(folder, path))
    if binding.get("format") != BINDING_FORMAT or binding.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{path} says format {binding.get('format')!r:.80}, version "
            f"{binding.get('format_version')!r:.80}; this program reads {BINDING_FORMAT!r}, version "
            f"{FORMAT_VERSION}. Update cloq_export."
        )
    beside = binding.get("base_fingerprint")
    if not isinstance(beside, str) or not _is_fingerprint(beside):
        raise FormatError(f"{path}: base_fingerprint is {beside!r:.80}; the file is damaged.")
    extra = binding.get("extra", {})
    if not isinstance(extra, dict):
        raise FormatError(f"{path}: extra is a {type(extra).__name__}; expected an object: the file is damaged.")
    if inside is not None and inside != beside:
        raise FormatError(
            f"{path} names the base {beside[:19]}… but {WEIGHTS_NAME} names {inside[:19]}…; the files come from two "
            "adapters: copy both again from one."
        )
    return beside, extra
