"""The `quantization_config` of AutoRound's checkpoints, of ours and of its own."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cloq_export.errors import FormatError
from cloq_export.formats.gptq.config import MODULE_NAME, read_spec
from cloq_export.formats.layout import Binding, Headers
from cloq_export.formats.patterns import NamePattern, PatternBudget
from cloq_export.types import QuantSpec

METHOD = "auto-round"
# packing_format -> the layout; both of those with GPTQ in their names were once written without "auto_".
PACKINGS: Mapping[str, str] = {
    "auto_round": "auto_round",
    "auto_round:gptqmodel": "auto_round",
    "auto_round:auto_gptq": "auto_round_gptq",
    "auto_round:gptq": "auto_round_gptq",
}
# Readers take it where nothing is said.
DEFAULT_PACKING = "auto_round:auto_gptq"
# What is written for each layout.
WRITTEN_PACKINGS: Mapping[str, str] = {"auto_round": "auto_round", "auto_round_gptq": DEFAULT_PACKING}
_FLOAT_BITS = 16


def quantization_config(specs: Mapping[str, QuantSpec], *, binding: Binding, skipped: Iterable[str]) -> dict[str, Any]:
    """Return the `quantization_config` of config.json; SPEC.md section 3.

    Args:
        specs: quantized module -> its grid, at least one.
        binding: the layout, the modules and the base.
        skipped: linear modules of the same kind that stay float.

    Returns:
        A JSON object.

    Raises:
        FormatError: there is no module, or a name cannot be told from a pattern.
    """
    if not specs:
        raise FormatError("an AutoRound checkpoint needs at least one quantized module; the recipe skips all of them.")
    for module in (*specs, *skipped):
        if MODULE_NAME.fullmatch(module) is None:
            raise FormatError(
                f"the module name {module!r} holds characters other than letters, digits, '_', '-' and '.'."
            )
    counts = collections.Counter(specs.values())
    default = min(counts, key=lambda spec: (-counts[spec], spec.bits, spec.group_size, spec.symmetric))
    blocks = sorted({block for module in specs if (block := _list_of_blocks(module)) is not None})
    extra: dict[str, dict[str, Any]] = {}
    for module in sorted(specs):
        # A module outside of the blocks is quantized for readers only if it is named here.
        if specs[module] != default or _list_of_blocks(module) is None:
            extra[module] = _grid(specs[module])
    for module in sorted(set(skipped) - set(specs)):
        extra[module] = {"bits": _FLOAT_BITS}
    return {
        "quant_method": METHOD,
        "packing_format": WRITTEN_PACKINGS[binding.layout],
        **_grid(default),
        # Without it readers look for the blocks themselves, in wrappers also in parts that are not text.
        **({"block_name_to_quantize": ",".join(blocks)} if blocks else {}),
        **({"extra_config": extra} if extra else {}),
        "cloq": binding.to_json(),
    }


def read_extra(
    config: Mapping[str, Any], modules: Sequence[str], headers: Headers, source: str
) -> tuple[dict[str, QuantSpec | None], tuple[tuple[NamePattern, QuantSpec | None], ...]]:
    """Return what `extra_config` says: grids of exact names, and rules for patterns, of which the first match counts.

    Args:
        config: the `quantization_config`.
        modules: that have codes in the files.
        headers: of all tensors, where they are known.
        source: the file, for messages.

    Raises:
        FormatError: it is damaged, or asks for more than plain integers.
    """
    extra = config.get("extra_config") or {}
    if not isinstance(extra, Mapping):
        raise FormatError(f"{source}: extra_config is a {type(extra).__name__}; expected an object.")
    coded, budget = frozenset(modules), PatternBudget(source)
    overrides: dict[str, QuantSpec | None] = {}
    rules: list[tuple[NamePattern, QuantSpec | None]] = []
    for key, values in extra.items():
        if not isinstance(values, Mapping):
            raise FormatError(
                f"{source}: extra_config maps {key[:80]!r} to a {type(values).__name__}; expected an object of options."
            )
        # A layer that stays float is written as one of 16 bits.
        spec = None if values.get("bits") in (_FLOAT_BITS, 32) else read_spec(config, values, source)
        if spec is not None and values.get("data_type", "int") != "int":
            raise FormatError(
                f"{source}: extra_config gives {key[:80]!r} the data_type {values['data_type']!r:.80}; only 'int' is "
                "read."
            )
        if key in coded or f"{key}.weight" in headers or (not headers and MODULE_NAME.fullmatch(key)):
            overrides[key] = spec
        elif values:
            # A key that names no layer is searched for in their names; the first one counts, after exact names.
            NamePattern(key, source=source)
            rules.append((NamePattern(f".*(?:{key})", source=source, budget=budget), spec))
    return overrides, tuple(rules)


def _grid(spec: QuantSpec) -> dict[str, Any]:
    return {"bits": spec.bits, "group_size": spec.group_size, "sym": spec.symmetric, "data_type": "int"}


def _list_of_blocks(module: str) -> str | None:
    """Return what a module's name has before the number of its block, or None outside of numbered blocks."""
    parts = module.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0]]) if numbers and numbers[0] else None
