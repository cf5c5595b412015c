"""The `quantization_config` of a compressed-tensors checkpoint: written, and read without trusting it."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from cloq_export.errors import CloqError, FormatError
from cloq_export.formats.compressed_tensors.targets import LINEAR, TargetMap
from cloq_export.formats.layout import Binding, read_binding
from cloq_export.types import PER_CHANNEL, SUPPORTED_BITS, QuantSpec

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
LM_HEAD = "lm_head"

EMBEDDING = "Embedding"

_IN_BLOCKS = re.compile(r"(^|\.)\d+\.")
_MODULE_NAME = re.compile(r"[\w.\-]+")
# The presets of compressed-tensors 0.20 that quantize weights alone, to integers of widths that are read here.
_PRESETS = {f"W{bits}A16": QuantSpec(bits, 128, symmetric=True) for bits in SUPPORTED_BITS} | {
    "W4A16_ASYM": QuantSpec(4, 128)
}


@dataclasses.dataclass(frozen=True)
class ReadConfig:
    """A `quantization_config` as it stands in the file.

    Args:
        grids: the grids that its groups give to modules.
        ignored: the modules that it leaves float.
        binding: what `cloq` says, or None in other people's files.
        version: release of compressed-tensors that wrote the file, or None.
        ordered: whether it says that groups have an order of their own, which a tensor must tell.
    """

    grids: TargetMap[QuantSpec]
    ignored: TargetMap[bool]
    binding: Binding | None
    version: str | None
    ordered: bool


def quantization_config(
    specs: Mapping[str, QuantSpec],
    *,
    layout: str,
    base_fingerprint: str,
    skipped: Iterable[str] = (),
    producer: str = "",
    needs_adapter: bool = False,
    embeddings: Iterable[str] = (),
) -> dict[str, Any]:
    """Return the `quantization_config` of config.json; SPEC.md section 4.

    Args:
        specs: quantized module -> its grid, at least one.
        layout: name of the layout.
        base_fingerprint: of the quantized base.
        skipped: linear modules that stay float, so that other readers do not look for codes; `lm_head` need not be
            named.
        producer: "name:version" of the program that writes, kept in `meta`.
        needs_adapter: the codes were made for what their adapter leaves of the weights.
        embeddings: quantized modules that are embeddings, which other readers also look for by their class.

    Returns:
        A JSON object.

    Raises:
        FormatError: there is no module, or a name is none that other readers match as it stands.
    """
    if not specs:
        raise FormatError(
            "a compressed-tensors checkpoint needs at least one quantized module; the recipe skips all of them."
        )
    ignored = sorted({LM_HEAD, *skipped} - set(specs))
    for module in (*specs, *ignored):
        if _MODULE_NAME.fullmatch(module) is None or module == LINEAR:
            raise FormatError(
                f"the module name {module!r} is {LINEAR!r} or holds characters other than letters, digits, '_', '-' "
                "and '.', so readers of compressed-tensors would take it for something else."
            )
    looked_up = set(embeddings)
    counts = collections.Counter(spec for module, spec in specs.items() if module not in looked_up)
    counts.update(dict.fromkeys((specs[module] for module in looked_up), 0))
    grids = sorted(counts, key=lambda spec: (-counts[spec], spec.bits, spec.group_size, spec.symmetric))
    groups: dict[str, dict[str, Any]] = {}
    for number, grid in enumerate(grids):
        names = sorted(module for module, spec in specs.items() if spec == grid)
        # vLLM does not take a head for a linear layer unless it is named, nor embeddings that it was given no name for.
        beside = [module for module in names if _IN_BLOCKS.search(module) is None]
        classes = [] if looked_up.isdisjoint(names) else [EMBEDDING]
        groups[f"group_{number}"] = {
            "targets": [*classes, *names] if number else [LINEAR, *classes, *beside],
            "weights": _weights(grid),
            "input_activations": None,
            "output_activations": None,
        }
    config: dict[str, Any] = {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
        "cloq": Binding(layout, tuple(sorted(specs)), base_fingerprint, needs_adapter).to_json(),
    }
    if producer:
        config["meta"] = {"quantizer": [producer]}
    return config


def read_config(config: Mapping[str, Any], *, source: str) -> ReadConfig:
    """Read a `quantization_config`, and refuse by name what changes a model in ways that are not read here.

    Args:
        config: the JSON object.
        source: the file, for messages.

    Returns:
        What it says.

    Raises:
        FormatError: it is of another method, format or format version, quantizes more than weights, or is damaged.
    """
    if config.get("quant_method") != METHOD:
        raise FormatError(
            f"{source}: quant_method is {config.get('quant_method')!r:.80}; this reader knows {METHOD!r}."
        )
    if config.get("format") != FORMAT:
        raise FormatError(f"{source}: format is {config.get('format')!r:.80}; this reader knows {FORMAT!r}.")
    if config.get("kv_cache_scheme") is not None:
        raise FormatError(f"{source} has a kv_cache_scheme; only checkpoints with quantized weights alone are read.")
    for key in ("transform_config", "sparsity_config"):
        value = config.get(key)
        if value and not (isinstance(value, Mapping) and key == "sparsity_config" and value.get("format") == "dense"):
            raise FormatError(
                f"{source} has a {key}, which changes what the weights mean; only plain quantized weights are read."
            )
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise FormatError(f"{source}: config_groups is {groups!r:.80}; expected an object with groups.")
    grids: TargetMap[QuantSpec] = TargetMap(source)
    for name, group in groups.items():
        if isinstance(group, Mapping):
            grids.add(group.get("targets"), _read_group(group, f"{source}: the group {name!r:.80}"))
            continue
        # Its targets alone, under the name of a preset.
        preset = _PRESETS.get(name.upper())
        if preset is None:
            raise FormatError(
                f"{source}: the group {name!r:.80} is no object and names no preset that is read; these are "
                f"{', '.join(_PRESETS)}."
            )
        grids.add(group, preset)
    ignored: TargetMap[bool] = TargetMap(source)
    ignored.add(config.get("ignore") or [], True)
    version = config.get("version")
    weights = [group.get("weights") for group in groups.values() if isinstance(group, Mapping)]
    ordered = any(isinstance(each, Mapping) and each.get("actorder") == "group" for each in weights)
    return ReadConfig(
        grids, ignored, read_binding(config, source=source), version if isinstance(version, str) else None, ordered
    )


def resolve_grids(config: ReadConfig, modules: Collection[str], *, source: str) -> dict[str, QuantSpec]:
    """Return the grid of each quantized module.

    A name counts before the class `Linear`. Readers differ in which of several names counts, so names of one module
    that give it different grids are refused.

    Args:
        config: what the file says.
        modules: the modules whose codes the files hold.
        source: the file, for messages.

    Returns:
        Module -> grid.

    Raises:
        FormatError: a module has no grid, or several, or is ignored; or the patterns are too many to compare.
    """
    config.grids.check_cost(modules)
    config.ignored.check_cost(modules)
    grids: dict[str, QuantSpec] = {}
    for module in modules:
        rules = config.grids.by_name(module) or config.grids.of_linear
        if len(rules) != 1:
            what = "no group" if not rules else f"{len(rules)} groups with different grids"
            raise FormatError(
                f"{source}: {what} in config_groups means {module}, whose codes the files hold; config and weights "
                "disagree."
            )
        if config.ignored.of_linear or config.ignored.by_name(module):
            raise FormatError(f"{source} ignores {module}, whose codes the files hold; config and weights disagree.")
        grids[module] = next(iter(rules))
    return grids


def _weights(spec: QuantSpec) -> dict[str, Any]:
    per_channel = spec.group_size == PER_CHANNEL
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": "channel" if per_channel else "group",
        "group_size": None if per_channel else spec.group_size,
        "dynamic": False,
    }


def _read_group(group: Mapping[str, Any], source: str) -> QuantSpec:
    if group.get("format") not in (None, FORMAT):
        raise FormatError(f"{source} has the format {group['format']!r:.80}; this reader knows {FORMAT!r}.")
    for key in ("input_activations", "output_activations"):
        if group.get(key) is not None:
            raise FormatError(f"{source} has {key}; only checkpoints with quantized weights alone are read.")
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise FormatError(f"{source}: weights is {weights!r:.80}; expected an object.")
    if weights.get("type", "int") != "int":
        raise FormatError(f"{source} has weights of type {weights['type']!r:.80}; this reader knows 'int'.")
    if weights.get("dynamic", False) is not False:
        raise FormatError(f"{source}: dynamic is {weights['dynamic']!r:.80}; only weights that are stored are read.")
    # "group" gives each layer a weight_g_idx; whether that is a permutation, the tensor tells.
    if weights.get("actorder") not in (None, False, "weight", "static", "group"):
        raise FormatError(f"{source}: actorder is {weights['actorder']!r:.80}; only sequential groups are read.")
    bits, symmetric = weights.get("num_bits"), weights.get("symmetric", True)
    if type(bits) is not int or type(symmetric) is not bool:
        raise FormatError(
            f"{source}: num_bits {bits!r:.80}, symmetric {symmetric!r:.80}; expected a whole number and true or false."
        )
    try:
        return QuantSpec(bits=bits, group_size=_read_group_size(weights, source), symmetric=symmetric)
    except FormatError:
        raise
    except CloqError as error:
        raise FormatError(f"{source}: {error!s:.400}") from None


def _read_group_size(weights: Mapping[str, Any], source: str) -> int:
    strategy, group_size = weights.get("strategy"), weights.get("group_size")
    if group_size is not None and type(group_size) is not int:
        raise FormatError(f"{source}: group_size is {group_size!r:.80}; expected a whole number.")
    if strategy is None and group_size is not None:
        strategy = "channel" if group_size == PER_CHANNEL else "group"
    if strategy == "channel" and group_size in (None, PER_CHANNEL):
        return PER_CHANNEL
    if strategy == "group" and group_size is not None and group_size > 0:
        return group_size
    raise FormatError(
        f"{source}: strategy {strategy!r:.80} with group_size {group_size!r:.80}; this reader knows 'group' with a "
        "size, and 'channel' without one."
    )
