"""Pack and unpack the GPTQ layout; the rules stand in SPEC.md.

The bit stream of SPEC.md section 2 is that of `cloq_export.kernels.bitpack`. No tensor larger than the codes is made.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from cloq_export.errors import CloqError, FormatError, NonFiniteError, ShapeError
from cloq_export.files.safe_tensors import require_tensor
from cloq_export.formats.layout import Binding, Headers, Layout, Role, StoredGrids, read_binding
from cloq_export.formats.patterns import NamePattern, PatternBudget, literal_name
from cloq_export.kernels.bitpack import pack_columns, pack_rows, unpack_columns, unpack_rows
from cloq_export.types import QuantizedLayer, QuantSpec

Version = Literal[1, 2]

TENSOR_NAMES = ("qweight", "qzeros", "scales", "g_idx")

AUTO_ROUND = "auto-round"
# packing_format of AutoRound -> the layout of its words; a file that says nothing is of a version that stored zero - 1.
AUTO_ROUND_PACKINGS: Mapping[str, str] = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round": "gptq_v2",
}
AUTO_ROUND_DEFAULT = "auto_round:auto_gptq"

_WORD_BITS = 32
_LAYOUT_NAMES: dict[int, str] = {1: "gptq", 2: "gptq_v2"}
_MODULE_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")
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


def layout_name(version: int) -> str:
    """Return the `checkpoint_format` of a version: 1 is "gptq", 2 is "gptq_v2".

    Raises:
        FormatError: there is no such version.
    """
    name = _LAYOUT_NAMES.get(version)
    if name is None:
        raise FormatError(f"GPTQ layout version {version!r} is unknown; allowed are 1 (gptq) and 2 (gptq_v2).")
    return name


def check_packable(out_features: int, in_features: int, spec: QuantSpec, *, name: str = "layer") -> None:
    """Refuse a shape that the layout cannot hold.

    Args:
        out_features: output channels.
        in_features: input channels.
        spec: the grid.
        name: the layer, for the message.

    Raises:
        ShapeError: a side does not fill whole 32-bit words, or groups do not divide the input.
    """
    codes_per_step = _WORD_BITS // math.gcd(_WORD_BITS, spec.bits)
    for side, size in (("inputs", in_features), ("outputs", out_features)):
        if size <= 0 or size % codes_per_step:
            raise ShapeError(
                f"{name} has {size} {side}; the GPTQ layout stores {spec.bits}-bit codes in whole 32-bit words, so "
                f"{side} must be a multiple of {codes_per_step}. Give this layer other bits, or leave it out, with an "
                "override in the recipe."
            )
    spec.group_count(in_features)


def pack_layer(layer: QuantizedLayer, *, version: Version = 2, name: str = "layer") -> dict[str, torch.Tensor]:
    """Pack one layer.

    Args:
        layer: codes (out, in) uint8, scales (out, groups) float16, zeros (out, groups) uint8, on any device.
        version: 1 stores `zero - 1`, 2 stores `zero`.
        name: the layer, for messages.

    Returns:
        qweight (in * bits / 32, out) int32, qzeros (groups, out * bits / 32) int32, scales (groups, out) float16,
        g_idx (in) int32; contiguous, on the layer's device.

    Raises:
        ShapeError: the shape does not fill whole words.
        FormatError: version 1 is asked for a layer with a zero of 0, or a symmetric layer has another zero than the
            middle.
    """
    layout_name(version)
    spec = layer.spec
    check_packable(layer.out_features, layer.in_features, spec, name=name)
    check_symmetric(layer.zeros, spec, name)
    zeros = layer.zeros
    if version == 1:
        if int(zeros.min()) == 0:
            raise FormatError(
                f"{name} has a zero of 0, which the layout gptq (version 1) cannot hold because it stores zero - 1; "
                "write it as gptq_v2 (--format gptq_v2)."
            )
        zeros = zeros - 1
    return {
        "qweight": pack_columns(layer.codes, spec.bits),
        "qzeros": pack_rows(zeros.t(), spec.bits),
        "scales": layer.scales.t().contiguous(),
        "g_idx": _group_index(layer.in_features, spec, layer.codes.device),
    }


def unpack_layer(
    tensors: Mapping[str, torch.Tensor], spec: QuantSpec, *, version: Version = 2, name: str = "layer"
) -> QuantizedLayer:
    """Unpack one layer, trusting nothing about it.

    Args:
        tensors: qweight, qzeros, scales and g_idx as `pack_layer` makes them.
        spec: the grid that the checkpoint's config gives the layer.
        version: 1 stores `zero - 1`, 2 stores `zero`.
        name: the layer, for messages.

    Returns:
        The layer, on the tensors' device.

    Raises:
        FormatError: a tensor is missing, has another dtype or shape, or holds what the layout does not allow.
    """
    layout = layout_name(version)
    qweight = require_tensor(tensors, "qweight", source=name, dtype=torch.int32, ndim=2)
    bits = spec.bits
    if qweight.numel() == 0 or (qweight.shape[0] * _WORD_BITS) % bits:
        raise FormatError(
            f"{name}: qweight has shape {tuple(qweight.shape)}, which does not hold whole {bits}-bit codes; the "
            "config and the tensors disagree about bits."
        )
    in_features, out_features = qweight.shape[0] * _WORD_BITS // bits, qweight.shape[1]
    try:
        check_packable(out_features, in_features, spec, name=name)
    except ShapeError as error:
        raise FormatError(str(error)) from None
    groups = spec.group_count(in_features)
    words = out_features * bits // _WORD_BITS
    qzeros = require_tensor(tensors, "qzeros", source=name, dtype=torch.int32, shape=(groups, words))
    scales = require_tensor(tensors, "scales", source=name, dtype=torch.float16, shape=(groups, out_features))
    g_idx = require_tensor(tensors, "g_idx", source=name, dtype=torch.int32, shape=(in_features,))
    if not torch.equal(g_idx, _group_index(in_features, spec, g_idx.device)):
        raise FormatError(
            f"{name}: g_idx is not sequential (an act-order checkpoint, or another group size than "
            f"{spec.group_size}); quantize again with desc_act=false, or with static groups."
        )
    zeros = unpack_rows(qzeros, bits)
    if version == 1:
        if int(zeros.max()) == spec.max_code:
            raise FormatError(
                f"{name}: a stored zero has all bits set, which readers of {layout} take for 0 or for "
                f"{spec.max_code + 1}; quantize again and write gptq_v2."
            )
        zeros = zeros + 1
    zeros = zeros.t().contiguous()
    check_symmetric(zeros, spec, name)
    codes = unpack_columns(qweight, bits)
    try:
        return QuantizedLayer(codes=codes, scales=scales.t().contiguous(), zeros=zeros, spec=spec)
    except (ShapeError, NonFiniteError) as error:
        raise FormatError(f"{name}: {error}") from None


def quantization_config(
    specs: Mapping[str, QuantSpec],
    *,
    version: Version = 2,
    base_fingerprint: str,
    skipped: Iterable[str] = (),
    producer: str = "",
) -> dict[str, Any]:
    """Return the `quantization_config` of config.json; SPEC.md section 4.

    Args:
        specs: quantized module -> its grid, at least one.
        version: layout version of the tensors.
        base_fingerprint: of the quantized base.
        skipped: linear modules of the same kind that stay float, so that other readers do not look for codes.
        producer: "name:version" of the program that writes, kept in `meta`.

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
        "cloq": Binding(layout, tuple(sorted(specs)), base_fingerprint).to_json(),
    }
    if dynamic:
        config["dynamic"] = dynamic
    if producer:
        config["meta"] = {"quantizer": [producer]}
    return config


def is_head(module: str) -> bool:
    """Return whether a module is an output head by its name, the one that `lm_head` of a config speaks of."""
    return module.rpartition(".")[2] in _HEADS


def parse_quantization_config(
    config: Mapping[str, Any], headers: Headers | None = None, *, source: str = "quantization_config"
) -> StoredGrids:
    """Read a `quantization_config`, ours, a plain one of the same layout, or one of AutoRound's.

    What it says about act-order, the head and the like is not asked: the tensors tell.

    Args:
        config: the JSON object.
        headers: of all tensors of the checkpoint, where they are known; they tell which keys of AutoRound are names of
            modules, and whether the config leaves out a module that has codes.
        source: the file, for messages.

    Returns:
        What it says.

    Raises:
        FormatError: it is of another method or format version, changes what the layers compute, disagrees with the
            tensors, or is damaged.
    """
    modules = [name.removesuffix(".qweight") for name in headers or () if name.endswith(".qweight")]
    auto_round = config.get("quant_method") == AUTO_ROUND
    if not auto_round and config.get("quant_method") != "gptq":
        raise FormatError(f"{source}: quant_method is {config.get('quant_method')!r:.80}; this reader knows 'gptq'.")
    for key, harmless in _CHANGES.items():
        if config.get(key) not in harmless:
            raise FormatError(
                f"{source}: {key} is {config[key]!r:.80}, which changes what the layers compute; only plain quantized "
                "weights are read."
            )
    if not isinstance(config.get("desc_act"), (bool, type(None))):
        raise FormatError(f"{source}: desc_act is {config['desc_act']!r:.80}; expected true or false.")
    _refuse_left_out(config, modules, source)
    if auto_round:
        return _parse_auto_round(config, modules, headers or {}, source)
    layout = _label(config, source)
    default = _read_spec(config, {}, source)
    overrides, rules = _read_dynamic(config, source)
    binding = read_binding(config, source=source)
    if binding is None:
        return StoredGrids(_LAYOUTS[layout], default, overrides, None, None, rules)
    if binding.layout != layout_name(layout):
        raise FormatError(
            f"{source}: cloq.layout is {binding.layout!r} but checkpoint_format is {layout_name(layout)!r}."
        )
    return StoredGrids(_LAYOUTS[layout], default, overrides, binding.modules, binding.base_fingerprint, rules)


def _label(config: Mapping[str, Any], source: str) -> Version:
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


def _read_dynamic(
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
        spec = None if signed.startswith("-:") else _read_spec(config, values, source)
        module = literal_name(pattern)
        if module is None:
            rules.append((NamePattern(pattern, source=source, budget=budget), spec))
            continue
        earlier = [own for rule, own in rules if rule.matches(module)]
        overrides.setdefault(module, earlier[0] if earlier else spec)
    return overrides, tuple(rules)


def version_of_symmetric(qzeros: torch.Tensor, spec: QuantSpec) -> Version | None:
    """Return the version that the stored zeros of a symmetric layer prove, or None.

    Every zero of a symmetric layer is the middle of the codes, so what is stored is the middle or the middle less one.

    Args:
        qzeros: (groups, words) int32, or some rows of it.
        spec: the grid of the layer.
    """
    zeros = unpack_rows(qzeros, spec.bits)
    middle = 2 ** (spec.bits - 1)
    for version, stored in ((1, middle - 1), (2, middle)):
        if bool((zeros == stored).all()):
            return 1 if version == 1 else 2
    return None


def _refuse_left_out(config: Mapping[str, Any], modules: Sequence[str], source: str) -> None:
    """Refuse a module that has codes although the config says that it was not quantized."""
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


class GptqLayout(Layout):
    """The GPTQ layout in one of its two versions.

    Args:
        version: 1 stores `zero - 1`, 2 stores `zero`.
        indexed: whether a file has a g_idx; AutoRound leaves it out. Written it always is.
    """

    quant_method = "gptq"
    roles: Mapping[str, Role] = {"qweight": "codes", "qzeros": "zeros", "scales": "scales", "g_idx": "index"}

    def __init__(self, version: Version, *, indexed: bool = True) -> None:
        self.name = layout_name(version)
        self.version: Version = version
        self.least_zero = 1 if version == 1 else 0
        self._indexed = indexed

    def parts(self, spec: QuantSpec) -> tuple[str, ...]:
        """Return the parts, the same for every grid."""
        return TENSOR_NAMES if self._indexed else tuple(part for part in TENSOR_NAMES if part != "g_idx")

    def check_packable(self, out_features: int, in_features: int, spec: QuantSpec, *, name: str = "layer") -> None:
        """Refuse what `check_packable` refuses."""
        check_packable(out_features, in_features, spec, name=name)

    def headers(self, out_features: int, in_features: int, spec: QuantSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return part -> (dtype code, shape); SPEC.md section 1."""
        groups = spec.group_count(in_features)
        whole: dict[str, tuple[str, tuple[int, ...]]] = {
            "qweight": ("I32", (in_features * spec.bits // _WORD_BITS, out_features)),
            "qzeros": ("I32", (groups, out_features * spec.bits // _WORD_BITS)),
            "scales": ("F16", (groups, out_features)),
            "g_idx": ("I32", (in_features,)),
        }
        return {part: whole[part] for part in self.parts(spec)}

    def features(
        self,
        headers: Headers,
        spec: QuantSpec,
        *,
        name: str = "layer",
        read: Callable[[str], torch.Tensor] | None = None,
    ) -> tuple[int, int]:
        """Return (out, in): the words of a channel hold exactly its codes."""
        held = self.stored_grid(headers)
        if held is None:
            raise FormatError(
                f"{name}: {_listed(headers)} do not belong to one layer of GPTQ; the file is damaged, or its words run "
                "along the outputs as those of AWQ, which are not read."
            )
        _refuse_other_grid(held, headers, spec, name)
        return held[2], held[3]

    def stored_grid(self, headers: Headers) -> tuple[int, int, int, int] | None:
        """Return (bits, groups, out, in) that the shapes of a layer show: zeros and codes have the same width."""
        shapes = [headers[part][1] if part in headers else () for part in ("qweight", "qzeros", "scales")]
        if any(len(shape) != 2 or 0 in shape for shape in shapes):
            return None
        words, zeros, (groups, out_features) = shapes
        bits, rest = divmod(zeros[1] * _WORD_BITS, out_features)
        if rest or words[1] != out_features or zeros[0] != groups or not 1 <= bits <= 8:
            return None
        in_features, rest = divmod(words[0] * _WORD_BITS, bits)
        return None if rest or in_features % groups else (bits, groups, out_features, in_features)

    def pack_layer(self, layer: QuantizedLayer, *, name: str = "layer") -> dict[str, torch.Tensor]:
        """Return the parts of a layer; see `pack_layer`."""
        return pack_layer(layer, version=self.version, name=name)

    def unpack_layer(
        self, tensors: Mapping[str, torch.Tensor], spec: QuantSpec, *, name: str = "layer"
    ) -> QuantizedLayer:
        """Return the layer; see `unpack_layer`."""
        if not self._indexed and "qweight" in tensors and "g_idx" not in tensors:
            words = tensors["qweight"]
            in_features = words.shape[0] * _WORD_BITS // spec.bits if words.ndim else 0
            tensors = {**tensors, "g_idx": _group_index(in_features, spec, words.device)}
        return unpack_layer(tensors, spec, version=self.version, name=name)

    def quantization_config(
        self,
        specs: Mapping[str, QuantSpec],
        *,
        base_fingerprint: str,
        skipped: Iterable[str] = (),
        producer: str = "",
    ) -> dict[str, Any]:
        """Return the config; see `quantization_config`."""
        return quantization_config(
            specs, version=self.version, base_fingerprint=base_fingerprint, skipped=skipped, producer=producer
        )

    def in_version(self, version: Version) -> GptqLayout:
        """Return the layout with zeros of another version, and all else as here."""
        return _LAYOUTS[version] if self._indexed else _WITHOUT_INDEX[layout_name(version)]


GPTQ_V1 = GptqLayout(1)
GPTQ_V2 = GptqLayout(2)
_LAYOUTS: Mapping[Version, GptqLayout] = {1: GPTQ_V1, 2: GPTQ_V2}
_WITHOUT_INDEX: dict[str, GptqLayout] = {
    layout_name(version): GptqLayout(version, indexed=False) for version in _LAYOUTS
}


def _parse_auto_round(config: Mapping[str, Any], modules: Sequence[str], headers: Headers, source: str) -> StoredGrids:
    """Read what AutoRound 0.16 writes of its own: the words of GPTQ, without g_idx."""
    packing = config.get("packing_format", AUTO_ROUND_DEFAULT)
    if not isinstance(packing, str) or packing not in AUTO_ROUND_PACKINGS:
        raise FormatError(
            f"{source}: packing_format is {packing!r:.80}; of AutoRound's, this reader knows "
            f"{', '.join(AUTO_ROUND_PACKINGS)}. Export it again with one of those."
        )
    meant = AUTO_ROUND_PACKINGS[packing]
    if config.get("checkpoint_format", meant) != meant:
        raise FormatError(
            f"{source}: packing_format is {packing!r} but checkpoint_format is {config['checkpoint_format']!r:.80}; "
            "one of them is wrong: look at the file with `cloq inspect`, and mend the label."
        )
    if config.get("desc_act"):
        raise FormatError(f"{source}: desc_act is true in a file of AutoRound's, which holds no order of groups.")
    if config.get("data_type", "int") != "int":
        raise FormatError(f"{source}: data_type is {config['data_type']!r:.80}; only 'int' is read.")
    extra = config.get("extra_config") or {}
    if not isinstance(extra, Mapping):
        raise FormatError(f"{source}: extra_config is a {type(extra).__name__}; expected an object.")
    budget = PatternBudget(source)
    overrides: dict[str, QuantSpec | None] = {}
    rules: list[tuple[NamePattern, QuantSpec | None]] = []
    for key, values in extra.items():
        if not isinstance(values, Mapping):
            raise FormatError(
                f"{source}: extra_config maps {key[:80]!r} to a {type(values).__name__}; expected an object of options."
            )
        # A layer that stays float is written as one of 16 bits.
        spec = None if values.get("bits") in (16, 32) else _read_spec(config, values, source)
        if spec is not None and values.get("data_type", "int") != "int":
            raise FormatError(
                f"{source}: extra_config gives {key[:80]!r} the data_type {values['data_type']!r:.80}; only 'int' is "
                "read."
            )
        if key in modules or f"{key}.weight" in headers or (not headers and _MODULE_NAME.fullmatch(key)):
            overrides[key] = spec
        elif values:
            # A key that names no layer is searched for in their names; the first one counts, after exact names.
            NamePattern(key, source=source)
            rules.append((NamePattern(f".*(?:{key})", source=source, budget=budget), spec))
    layout = _WITHOUT_INDEX[AUTO_ROUND_PACKINGS[packing]]
    return StoredGrids(layout, _read_spec(config, {}, source), overrides, None, None, tuple(rules))


def _read_spec(config: Mapping[str, Any], values: Mapping[str, Any], source: str) -> QuantSpec:
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


def _refuse_other_grid(held: tuple[int, int, int, int], headers: Headers, spec: QuantSpec, name: str) -> None:
    """Refuse a grid of the config that is not the one that shapes show.

    Args:
        held: as `stored_grid` gives it.
        headers: of the layer's parts, for the message.
        spec: what the config says.
        name: the layer, for the message.

    Raises:
        FormatError: they differ.
    """
    bits, groups, _, in_features = held
    if bits != spec.bits or groups * spec.columns_per_group(in_features) != in_features:
        groups_of = "one group per channel" if groups == 1 else f"groups of {in_features // groups}"
        raise FormatError(
            f"{name}: the config says {spec.bits} bits and group size {spec.group_size}, but {_listed(headers)} hold "
            f"{bits}-bit codes in {groups_of}; config and tensors disagree: correct bits and group_size in the config."
        )


def _listed(headers: Headers) -> str:
    return ", ".join(f"{part} {headers[part][1]}" for part in ("qweight", "qzeros", "scales"))


def _exact_pattern(sign: str, module: str) -> str:
    pattern = f"{sign}:^{re.escape(module)}$"
    if _EXACT_PATTERN.fullmatch(pattern) is None:
        raise FormatError(f"the module name {module!r} holds characters other than letters, digits, '_', '-' and '.'.")
    return pattern


def check_symmetric(zeros: torch.Tensor, spec: QuantSpec, name: str) -> None:
    """Refuse zeros of a symmetric layer that are not the middle of the codes.

    Args:
        zeros: of any shape, as they are meant.
        spec: the grid.
        name: the layer, for the message.

    Raises:
        FormatError: there is another zero.
    """
    # Readers of a symmetric checkpoint ignore the stored zeros, so another zero would be served wrongly.
    middle = 2 ** (spec.bits - 1)
    if spec.symmetric and not bool((zeros == middle).all()):
        raise FormatError(
            f"{name} is marked symmetric but has a zero other than {middle}; mark it asymmetric (sym: false), if the "
            "label of the version is right."
        )


def _group_index(in_features: int, spec: QuantSpec, device: torch.device) -> torch.Tensor:
    columns = torch.arange(in_features, dtype=torch.int32, device=device)
    return columns // spec.columns_per_group(in_features)
