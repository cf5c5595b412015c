"""The two layouts of compressed-tensors, and which of them a checkpoint has."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from cloq_export.errors import FormatError, ShapeError
from cloq_export.formats.compressed_tensors.codec import (
    check_packable,
    pack_layer,
    stored_shape,
    unpack_layer,
    word_count,
)
from cloq_export.formats.compressed_tensors.config import METHOD, quantization_config, read_config, resolve_grids
from cloq_export.formats.layout import Headers, Layout, Role, StoredGrids
from cloq_export.types import PER_CHANNEL, QuantizedLayer, QuantSpec

_WORD_BITS = 32
# The release that made 3-bit codes dense. A pre-release may have either form.
_DENSE_SINCE = (0, 18)
_RELEASE = re.compile(r"(\d{1,4})\.(\d{1,4})(?:\.\d{1,4})*(?:\.post\d{1,4})?", re.ASCII)


class CompressedTensorsLayout(Layout):
    """The layout `pack-quantized` of compressed-tensors in one of its two forms, which differ at 3 bits only.

    Args:
        padded: 3-bit codes ten to a word, as compressed-tensors 0.17 and older hold them.
    """

    quant_method = METHOD
    holds_embeddings = True
    roles: Mapping[str, Role] = {
        "weight_packed": "codes",
        "weight_scale": "scales",
        "weight_zero_point": "zeros",
        "weight_shape": "index",
        "weight_g_idx": "index",
    }

    def __init__(self, *, padded: bool) -> None:
        self.name = "compressed_tensors_padded" if padded else "compressed_tensors"
        self.padded = padded

    def parts(self, spec: QuantSpec) -> tuple[str, ...]:
        """Return the parts; a symmetric layer stores no zeros, and an order of groups is never needed."""
        left_out = {"weight_g_idx", *(("weight_zero_point",) if spec.symmetric else ())}
        return tuple(part for part in self.roles if part not in left_out)

    def check_packable(self, out_features: int, in_features: int, spec: QuantSpec, *, name: str = "layer") -> None:
        """Refuse what `check_packable` refuses."""
        check_packable(out_features, in_features, spec, name=name)

    def headers(self, out_features: int, in_features: int, spec: QuantSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return part -> (dtype code, shape); SPEC.md section 1."""
        groups = spec.group_count(in_features)
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight_packed": ("I32", (out_features, word_count(in_features, spec.bits, padded=self.padded))),
            "weight_scale": ("F16", (out_features, groups)),
            "weight_zero_point": ("I32", (word_count(out_features, spec.bits, padded=self.padded), groups)),
            "weight_shape": ("I64", (2,)),
        }
        return {part: shapes[part] for part in self.parts(spec)}

    def features(
        self,
        headers: Headers,
        spec: QuantSpec,
        *,
        name: str = "layer",
        read: Callable[[str], torch.Tensor] | None = None,
    ) -> tuple[int, int]:
        """Return (out, in) of a layer from the headers of its parts.

        The headers give it exactly where there are groups. With one group per channel they only give the words, and
        the exact number of inputs stands in the tensor `weight_shape`.

        Args:
            headers: part -> (dtype code, shape).
            spec: the grid.
            name: the layer, for messages.
            read: reads one part; without it, the most inputs that the words can hold are returned.

        Returns:
            (out, in).

        Raises:
            FormatError: no layer with this grid has such headers.
        """
        rows, words = _two_sides(headers, "weight_packed", name)
        scale_rows, groups = _two_sides(headers, "weight_scale", name)
        if spec.group_size != PER_CHANNEL:
            columns = groups * spec.group_size
        elif read is not None:
            columns = stored_shape({"weight_shape": read("weight_shape")}, rows, name=name)[1]
        else:
            columns = words * (_WORD_BITS // spec.bits) if self.padded else words * _WORD_BITS // spec.bits
        fits = rows > 0 and columns > 0 and scale_rows == rows and groups == columns // spec.columns_per_group(columns)
        if not fits or word_count(columns, spec.bits, padded=self.padded) != words:
            raise FormatError(
                f"{name}: weight_packed {rows} x {words} and weight_scale {scale_rows} x {groups} do not belong to one "
                f"layer of {spec.bits} bits and group size {spec.group_size}; the config and the tensors disagree."
            )
        return rows, columns

    def pack_layer(self, layer: QuantizedLayer, *, name: str = "layer") -> dict[str, torch.Tensor]:
        """Return the parts of a layer; see `pack_layer`."""
        return pack_layer(layer, padded=self.padded, name=name)

    def unpack_layer(
        self, tensors: Mapping[str, torch.Tensor], spec: QuantSpec, *, name: str = "layer"
    ) -> QuantizedLayer:
        """Return the layer; see `unpack_layer`."""
        return unpack_layer(tensors, spec, padded=self.padded, name=name)

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
            layout=self.name,
            base_fingerprint=base_fingerprint,
            skipped=skipped,
            producer=producer,
            needs_adapter=needs_adapter,
            embeddings=embeddings,
        )


COMPRESSED_TENSORS = CompressedTensorsLayout(padded=False)
COMPRESSED_TENSORS_PADDED = CompressedTensorsLayout(padded=True)
_LAYOUTS = (COMPRESSED_TENSORS, COMPRESSED_TENSORS_PADDED)


def parse_quantization_config(
    config: Mapping[str, Any], headers: Headers, *, source: str = "quantization_config"
) -> StoredGrids:
    """Read a `quantization_config`, ours or a plain one of the same layout.

    Args:
        config: the JSON object.
        headers: of all tensors of the checkpoint; they tell which modules are quantized in other people's files, and
            in which form 3-bit codes are held.
        source: the file, for messages.

    Returns:
        Layout and grids.

    Raises:
        FormatError: it is of another method, format or format version, quantizes more than weights, disagrees with the
            tensors, is damaged, or leaves open in which form 3-bit codes are held.
    """
    read = read_config(config, source=source)
    binding = read.binding
    held = {name.removesuffix(".weight_packed") for name in headers if name.endswith(".weight_packed")}
    modules = sorted(held) if binding is None else binding.modules
    if not modules:
        raise FormatError(f"{source}: there is no quantized module (no tensor is named weight_packed).")
    ordered = [module for module in modules if f"{module}.weight_g_idx" in headers]
    if read.ordered and len(ordered) < len(modules):
        without = next(module for module in modules if module not in ordered)
        raise FormatError(
            f"{source}: actorder is 'group', but {without} has no weight_g_idx that tells the order of its groups."
        )
    grids = resolve_grids(read, modules, source=source)
    three_bit = {module: spec for module, spec in grids.items() if module in held and _WORD_BITS % spec.bits}
    forms = _possible_forms(three_bit, headers, source)
    if binding is not None:
        layout = _labelled_form(forms, binding.layout, source)
    else:
        layout = _told_form(forms, read.version, source) if three_bit else COMPRESSED_TENSORS
    default = collections.Counter(grids.values()).most_common(1)[0][0]
    if len(read.grids.of_linear) == 1:
        default = next(iter(read.grids.of_linear))
    overrides: dict[str, QuantSpec | None] = dict.fromkeys(read.ignored.names)
    overrides |= {module: spec for module, spec in grids.items() if spec != default}
    if binding is None:
        return StoredGrids(layout, default, overrides, None, None)
    return StoredGrids(
        layout,
        default,
        overrides,
        binding.modules,
        binding.base_fingerprint,
        needs_adapter=binding.needs_adapter,
    )


def _possible_forms(
    three_bit: Mapping[str, QuantSpec], headers: Headers, source: str
) -> tuple[CompressedTensorsLayout, ...]:
    """Return the layouts whose shapes all 3-bit modules have."""
    decided: dict[CompressedTensorsLayout, str] = {}
    for module, spec in three_bit.items():
        fitting = [form for form in _LAYOUTS if _fits(form, module, spec, headers)]
        if not fitting:
            raise FormatError(
                f"{source}: the tensors of {module} have the shapes of neither dense nor padded {spec.bits}-bit codes; "
                "the config and the tensors disagree."
            )
        if len(fitting) == 1:
            decided.setdefault(fitting[0], module)
    if len(decided) > 1:
        names = ", ".join(f"{module} is {form.name}" for form, module in decided.items())
        raise FormatError(f"{source}: {names}; a checkpoint is of one layout: the folder mixes two checkpoints.")
    return tuple(decided) or _LAYOUTS


def _labelled_form(forms: tuple[CompressedTensorsLayout, ...], label: str, source: str) -> CompressedTensorsLayout:
    """Return the layout that our metadata names."""
    for form in forms:
        if form.name == label:
            return form
    if label in {form.name for form in _LAYOUTS}:
        raise FormatError(
            f"{source}: cloq.layout is {label!r}, but the 3-bit tensors have the shapes of {forms[0].name!r}; label "
            "and content disagree: fetch or write the checkpoint again."
        )
    raise FormatError(f"{source}: cloq.layout is {label!r:.80} but quant_method is {METHOD!r}; the config is damaged.")


def _told_form(forms: tuple[CompressedTensorsLayout, ...], version: str | None, source: str) -> CompressedTensorsLayout:
    """Return the form of other people's 3-bit codes: by shape, and by the writer's version where shapes fit both."""
    if len(forms) == 1:
        return forms[0]
    release = _RELEASE.fullmatch(version) if version is not None else None
    if release is None:
        raise FormatError(
            f"{source}: the shapes fit both dense and padded 3-bit codes, and the version {version!r:.80} does not "
            "tell which release of compressed-tensors wrote them; add the release to the config as version."
        )
    dense = (int(release[1]), int(release[2])) >= _DENSE_SINCE
    return COMPRESSED_TENSORS if dense else COMPRESSED_TENSORS_PADDED


def _fits(form: CompressedTensorsLayout, module: str, spec: QuantSpec, headers: Headers) -> bool:
    parts = {part: headers[name] for part in form.parts(spec) if (name := f"{module}.{part}") in headers}
    try:
        rows, _ = form.features(parts, spec)
        if "weight_zero_point" not in parts:
            return True
        return _two_sides(parts, "weight_zero_point", module)[0] == word_count(rows, spec.bits, padded=form.padded)
    except (FormatError, ShapeError):
        return False


def _two_sides(headers: Headers, part: str, name: str) -> tuple[int, int]:
    shape = headers[part][1] if part in headers else None
    if shape is None or len(shape) != 2:
        raise FormatError(f"{name}: {part} has shape {shape}; expected 2 dimensions.")
    return shape[0], shape[1]
