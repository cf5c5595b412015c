"""GPTQ as a layout of checkpoints: what is written, read and refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from cloq_export.errors import FormatError
from cloq_export.formats.gptq.codec import (
    TENSOR_NAMES,
    WORD_BITS,
    Version,
    check_packable,
    layout_name,
    pack_layer,
    unpack_layer,
)
from cloq_export.formats.gptq.config import (
    quantization_config,
    read_dynamic,
    read_label,
    read_spec,
    refuse_changes,
    refuse_left_out,
)
from cloq_export.formats.layout import Headers, Layout, Role, StoredGrids, read_binding
from cloq_export.kernels.bitpack import unpack_rows
from cloq_export.types import QuantizedLayer, QuantSpec


def parse_quantization_config(
    config: Mapping[str, Any], headers: Headers | None = None, *, source: str = "quantization_config"
) -> StoredGrids:
    """Read a `quantization_config`, ours or a plain one of the same layout.

    What it says about act-order, the head and the like is not asked: the tensors tell.

    Args:
        config: the JSON object.
        headers: of all tensors of the checkpoint, where they are known; they tell whether the config leaves out a
            module that has codes.
        source: the file, for messages.

    Returns:
        What it says.

    Raises:
        FormatError: it is of another method or format version, changes what the layers compute, disagrees with the
            tensors, or is damaged.
    """
    modules = [name.removesuffix(".qweight") for name in headers or () if name.endswith(".qweight")]
    if config.get("quant_method") != "gptq":
        raise FormatError(f"{source}: quant_method is {config.get('quant_method')!r:.80}; this reader knows 'gptq'.")
    refuse_changes(config, source)
    refuse_left_out(config, modules, source)
    layout = read_label(config, source)
    default = read_spec(config, {}, source)
    overrides, rules = read_dynamic(config, source)
    binding = read_binding(config, source=source)
    if binding is None:
        return StoredGrids(_LAYOUTS[layout], default, overrides, None, None, rules)
    if binding.layout != layout_name(layout):
        raise FormatError(
            f"{source}: cloq.layout is {binding.layout!r} but checkpoint_format is {layout_name(layout)!r}."
        )
    return StoredGrids(
        _LAYOUTS[layout],
        default,
        overrides,
        binding.modules,
        binding.base_fingerprint,
        rules,
        needs_adapter=binding.needs_adapter,
    )


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


class GptqLayout(Layout):
    """The GPTQ layout in one of its two versions.

    Args:
        version: 1 stores `zero - 1`, 2 stores `zero`.
    """

    quant_method = "gptq"
    roles: Mapping[str, Role] = {"qweight": "codes", "qzeros": "zeros", "scales": "scales", "g_idx": "index"}

    def __init__(self, version: Version) -> None:
        self.name = layout_name(version)
        self.version: Version = version
        self.least_zero = 1 if version == 1 else 0

    def parts(self, spec: QuantSpec) -> tuple[str, ...]:
        """Return the parts, the same for every grid."""
        return TENSOR_NAMES

    def check_packable(self, out_features: int, in_features: int, spec: QuantSpec, *, name: str = "layer") -> None:
        """Refuse what `check_packable` refuses."""
        check_packable(out_features, in_features, spec, name=name)

    def headers(self, out_features: int, in_features: int, spec: QuantSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return part -> (dtype code, shape); SPEC.md section 1."""
        groups = spec.group_count(in_features)
        whole: dict[str, tuple[str, tuple[int, ...]]] = {
            "qweight": ("I32", (in_features * spec.bits // WORD_BITS, out_features)),
            "qzeros": ("I32", (groups, out_features * spec.bits // WORD_BITS)),
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
        bits, rest = divmod(zeros[1] * WORD_BITS, out_features)
        if rest or words[1] != out_features or zeros[0] != groups or not 1 <= bits <= 8:
            return None
        in_features, rest = divmod(words[0] * WORD_BITS, bits)
        return None if rest or in_features % groups else (bits, groups, out_features, in_features)

    def pack_layer(self, layer: QuantizedLayer, *, name: str = "layer") -> dict[str, torch.Tensor]:
        """Return the parts of a layer; see `pack_layer`."""
        return pack_layer(layer, version=self.version, name=name)

    def unpack_layer(
        self, tensors: Mapping[str, torch.Tensor], spec: QuantSpec, *, name: str = "layer"
    ) -> QuantizedLayer:
        """Return the layer; see `unpack_layer`."""
        return unpack_layer(tensors, spec, version=self.version, name=name)

    def quantization_config(
        self,
        specs: Mapping[str, QuantSpec],
        *,
        base_fingerprint: str,
        skipped: Iterable[str] = (),
        producer: str = "",
        needs_adapter: bool = False,
        embeddings: Iterable[str] = (),
    ) -> dict[str, Any]:
        """Return the config; see `quantization_config`."""
        return quantization_config(
            specs,
            version=self.version,
            base_fingerprint=base_fingerprint,
            skipped=skipped,
            producer=producer,
            needs_adapter=needs_adapter,
        )

    def in_version(self, version: Version) -> GptqLayout:
        """Return the layout with zeros of another version, and all else as here."""
        return _LAYOUTS[version]


GPTQ_V1 = GptqLayout(1)
GPTQ_V2 = GptqLayout(2)
_LAYOUTS: Mapping[Version, GptqLayout] = {1: GPTQ_V1, 2: GPTQ_V2}


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
