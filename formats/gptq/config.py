"""The `quantization_config` of GPTQ checkpoints, of ours and of other tools."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cloq_export.errors import CloqError, FormatError
from cloq_export.formats.gptq.codec import Version, layout_name
from cloq_export.formats.layout import Binding
from cloq_export.formats.patterns import NamePattern, PatternBudget, literal_name
from cloq_export.types import QuantSpec

MODULE_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")
# The last part of the name of an output head, as transformers and GPTQModel call it.
_HEADS = ("lm_head", "embed_out")
# Keys of other tools that change what the layers compute -> the values that do not.
_CHANGES: Mapping[str, tuple[Any, ...]] = {
    "rotation": (None, "", False),
    "rotation_config": (None, {}, False),
    "hadamard_config": (None, {}, False),
    "activation": (None, {}, False),
    "act_bits": (None, 16, 32),
    "super_bits": (None,),
    "super_group_size": (None,),
    "adapter": (None, {}),
    "is_marlin_format": (None, False),
}
_EXACT_PATTERN = re.compile(r"[+-]:\^(?P<name>(?:[\w-]|\\[.\-])+)\$")


def quantization_config(
    specs: Mapping[str, QuantSpec],
    *,
    version: Version = 2,
    base_fingerprint: str,
    skipped: Iterable[str] = (),
    producer: str = "",
    needs_adapter: bool = False,
) -> dict[str, Any]:
    """Return the `quantization_config` of config.json; SPEC.md section 4.

    Args:
        specs: quantized module -> its grid, at least one.
        version: layout version of the tensors.
        base_fingerprint: of the quantized base.
        skipped: linear modules of the same kind that stay float, so that other readers do not look for codes.
        producer: "name:version" of the program that writes, kept in `meta`.
        needs_adapter: the codes were made for what their adapter leaves of the weights.

    Returns:
        A JSON object.

    Raises:
        FormatError: there is no module, or a name cannot be written as a pattern.
    """
    layout = layout_name(version)
    if not specs:
        raise FormatError("a GPTQ checkpoint needs at least one quantized module; the recipe skips all of them.")
    counts = collections.Counter(specs.values())
    default = min(counts, key=lambda spec: (-counts[spec], spec.bits, spec.group_size, spec.symmetric))
    dynamic: dict[str, dict[str, Any]] = {}
    for module in sorted(specs):
        spec = specs[module]
        if spec != default:
            dynamic[_exact_pattern("+", module)] = {
                "bits": spec.bits,
                "group_size": spec.group_size,
                "sym": spec.symmetric,
            }
    for module in sorted(set(skipped) - set(specs)):
        dynamic[_exact_pattern("-", module)] = {}
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": layout,
        "bits": default.bits,
        "group_size": default.group_size,
        "sym": default.symmetric,
        "desc_act": False,
        "lm_head": any(is_head(module) for module in specs),
        "pack_dtype": "int32",
        "cloq": Binding(layout, tuple(sorted(specs)), base_fingerprint, needs_adapter).to_json(),
    }
    if dynamic:
        config["dynamic"] = dynamic
    if producer:
        config["meta"] = {"quantizer": [producer]}
    return config


def is_head(module: str) -> bool:
    """Return whether a module is an output head by its name, the one that `lm_head` of a config speaks of."""
    return module.rpartition(".")[2] in _HEADS


def read_label(config: Mapping[str, Any], source: str) -> Version:
    """Return the version that a config names; without a name it is 1."""
    # GPTQModel writes the same thing under two names; some files have only the second.
    labels = [config[key] for key in ("checkpoint_format", "format") if config.get(key) is not None]
    if len(labels) == 2 and labels[0] != labels[1]:
        raise FormatError(
            f"{source}: checkpoint_format is {labels[0]!r:.80} but format is {labels[1]!r:.80}; one of them is wrong: "
            "look at the file with `cloq inspect`, and mend the label."
        )
    label = labels[0] if labels else "gptq"
    versions: dict[Any, Version] = {"gptq": 1, "gptq_v2": 2}
    if not isinstance(label, str) or label not in versions:
        raise FormatError(f"{source}: checkpoint_format is {label!r:.80}; this reader knows 'gptq' and 'gptq_v2'.")
    return versions[label]


def read_dynamic(
    config: Mapping[str, Any], source: str
) -> tuple[dict[str, QuantSpec | None], tuple[tuple[NamePattern, QuantSpec | None], ...]]:
    """Return the rules of GPTQModel: those for exact names, and those for patterns, of which the first match counts."""
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise FormatError(f"{source}: dynamic is a {type(dynamic).__name__}; expected an object.")
    budget = PatternBudget(source)
    overrides: dict[str, QuantSpec | None] = {}
    rules: list[tuple[NamePattern, QuantSpec | None]] = []
    for signed, values in dynamic.items():
        if not isinstance(values, Mapping):
            raise FormatError(
                f"{source}: the dynamic rule {signed[:80]!r} is a {type(values).__name__}; expected an object."
            )
        pattern = signed[2:] if signed.startswith(("+:", "-:")) else signed
        spec = None if signed.startswith("-:") else read_spec(config, values, source)
        module = literal_name(pattern)
        if module is None:
            rules.append((NamePattern(pattern, source=source, budget=budget), spec))
            continue
        earlier = [own for rule, own in rules if rule.matches(module)]
        overrides.setdefault(module, earlier[0] if earlier else spec)
    return overrides, tuple(rules)


def refuse_changes(config: Mapping[str, Any], source: str) -> None:
    """Refuse a config of two methods, and one whose layers compute more than plain quantized weights.

    Raises:
        FormatError: it is such a config, or damaged.
    """
    # GPTQModel writes the same thing under two names.
    if config.get("method") not in (None, config["quant_method"]):
        raise FormatError(
            f"{source}: quant_method is {config['quant_method']!r} but method is {config['method']!r:.80}; one of them "
            "is wrong: look at the file with `cloq inspect`, and take the wrong one out."
        )
    for key, harmless in _CHANGES.items():
        if config.get(key) not in harmless:
            raise FormatError(
                f"{source}: {key} is {config[key]!r:.80}, which changes what the layers compute; only plain quantized "
                "weights are read."
            )
    if not isinstance(config.get("desc_act"), (bool, type(None))):
        raise FormatError(f"{source}: desc_act is {config['desc_act']!r:.80}; expected true or false.")


def refuse_left_out(config: Mapping[str, Any], modules: Sequence[str], source: str) -> None:
    """Refuse a module that has codes although the config says that it was not quantized, or a head the other way."""
    if config.get("lm_head") is True and modules and not any(map(is_head, modules)):
        raise FormatError(
            f"{source}: lm_head is true, and the files hold no codes of a head; config and weights disagree."
        )
    for key, quantized in (("modules_to_not_convert", False), ("modules_in_block_to_quantize", True)):
        named = _flat(config.get(key), f"{source}: {key}")
        for module in modules if named else ():
            if quantized and is_head(module):
                continue  # the key is about blocks
            if any(name in module for name in named) is not quantized:
                raise FormatError(
                    f"{source}: {key} leaves {module} out, whose codes the files hold; config and weights disagree."
                )


def _flat(value: Any, what: str) -> list[str]:
    """Return the names in a list that may hold lists."""
    names = [value] if isinstance(value, str) else value or []
    flat = [name for part in names for name in (part if isinstance(part, list) else [part])] if names else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in flat):
        raise FormatError(f"{what} is {value!r:.80}; expected a list of names.")
    return flat


def read_spec(config: Mapping[str, Any], values: Mapping[str, Any], source: str) -> QuantSpec:
    """Return the grid that some values of a config mean, with the config's own where they say nothing.

    Raises:
        FormatError: they are no grid.
    """
    bits = values.get("bits", config.get("bits"))
    group_size = values.get("group_size", config.get("group_size"))
    # Where nothing is said the stored zeros count, which is right for both.
    symmetric = values.get("sym", config.get("sym", False))
    if type(bits) is not int or type(group_size) is not int or type(symmetric) is not bool:
        raise FormatError(
            f"{source}: bits {bits!r:.80}, group_size {group_size!r:.80}, sym {symmetric!r:.80}; expected two whole "
            "numbers and true or false."
        )
    try:
        return QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric)
    except CloqError as error:
        raise FormatError(f"{source}: {error!s:.400}") from None


def _exact_pattern(sign: str, module: str) -> str:
    pattern = f"{sign}:^{re.escape(module)}$"
    if _EXACT_PATTERN.fullmatch(pattern) is None:
        raise FormatError(f"the module name {module!r} holds characters other than letters, digits, '_', '-' and '.'.")
    return pattern
