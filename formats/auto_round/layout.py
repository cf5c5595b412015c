"""AutoRound's files as layouts of checkpoints: what is written, read and refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from cloq_export.errors import FormatError, ShapeError
from cloq_export.formats.auto_round.config import DEFAULT_PACKING, METHOD, PACKINGS, quantization_config, read_extra
from cloq_export.formats.gptq.codec import WORD_BITS, Version, group_index
from cloq_export.formats.gptq.config import read_spec, refuse_changes, refuse_left_out
from cloq_export.formats.gptq.layout import GptqLayout
from cloq_export.formats.layout import Binding, Headers, StoredGrids, read_binding
from cloq_export.types import QuantizedLayer, QuantSpec

_INDEX = "g_idx"


class AutoRoundLayout(GptqLayout):
    """The words of GPTQ without an index, groups being sequential, under AutoRound's config.

    Args:
        name: of the layout.
        version: 1 stores `zero - 1`, which is written for symmetric layers alone; 2 stores `zero`.
    """

    quant_method = METHOD

    def __init__(self, name: str, version: Version) -> None:
        super().__init__(version)
        self.name = name
        self.symmetric_only = version == 1

    def parts(self, spec: QuantSpec) -> tuple[str, ...]:
        """Return the parts, the same for every grid."""
        return tuple(part for part in super().parts(spec) if part != _INDEX)

    def check_packable(self, out_features: int, in_features: int, spec: QuantSpec, *, name: str = "layer") -> None:
        """Refuse what GPTQ refuses, and sides for which AutoRound's own reader has no whole rows of words."""
        super().check_packable(out_features, in_features, spec, name=name)
        for side, size in (("inputs", in_features), ("outputs", out_features)):
            if size % WORD_BITS:
                raise ShapeError(
                    f"{name} has {size} {side}; AutoRound's layout has {side} in multiples of {WORD_BITS}. Leave this "
                    "layer out with an override in the recipe, or choose another layout, e.g. `format=gptq_v2`."
                )

    def pack_layer(self, layer: QuantizedLayer, *, name: str = "layer") -> dict[str, torch.Tensor]:
        """Return the parts of a layer.

        Raises:
            ShapeError: the layout cannot hold the shape.
            FormatError: the layer is asymmetric, and the layout stores zeros less one.
        """
        self.check_packable(layer.out_features, layer.in_features, layer.spec, name=name)
        self._refuse_asymmetric(layer.spec, name)
        packed = super().pack_layer(layer, name=name)
        del packed[_INDEX]
        return packed

    def unpack_layer(
        self, tensors: Mapping[str, torch.Tensor], spec: QuantSpec, *, name: str = "layer"
    ) -> QuantizedLayer:
        """Return the layer; an index that a file has all the same is looked at."""
        words = tensors.get("qweight")
        if words is not None and _INDEX not in tensors:
            in_features = words.shape[0] * WORD_BITS // spec.bits if words.ndim else 0
            tensors = {**tensors, _INDEX: group_index(in_features, spec, words.device)}
        return super().unpack_layer(tensors, spec, name=name)

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
        """Return the config; see `quantization_config`. Its readers know no place for the name of the producer."""
        for module, spec in specs.items():
            self._refuse_asymmetric(spec, module)
        binding = Binding(self.name, tuple(sorted(specs)), base_fingerprint, needs_adapter)
        return quantization_config(specs, binding=binding, skipped=tuple(skipped))

    def in_version(self, version: Version) -> GptqLayout:
        """Return the layout with zeros of another version, and all else as here."""
        return AUTO_ROUND_GPTQ if version == 1 else AUTO_ROUND

    def _refuse_asymmetric(self, spec: QuantSpec, name: str) -> None:
        if self.symmetric_only and not spec.symmetric:
            raise FormatError(
                f"{name} is asymmetric, and the layout {self.name} is for symmetric layers alone, because readers of "
                f"{DEFAULT_PACKING} refuse others or take their zeros one step off; write it as {AUTO_ROUND.name} "
                f"(`format={AUTO_ROUND.name}`), or quantize with `symmetric=true`."
            )


AUTO_ROUND = AutoRoundLayout("auto_round", 2)
AUTO_ROUND_GPTQ = AutoRoundLayout("auto_round_gptq", 1)
_LAYOUTS = {layout.name: layout for layout in (AUTO_ROUND, AUTO_ROUND_GPTQ)}


def parse_quantization_config(
    config: Mapping[str, Any], headers: Headers | None = None, *, source: str = "quantization_config"
) -> StoredGrids:
    """Read a `quantization_config` of AutoRound 0.5 to 0.16, or ours.

    Args:
        config: the JSON object.
        headers: of all tensors of the checkpoint, where they are known; they tell which keys are names of modules, and
            whether the config leaves out a module that has codes.
        source: the file, for messages.

    Returns:
        What it says.

    Raises:
        FormatError: it is of another method or format version, changes what the layers compute, disagrees with the
            tensors, or is damaged.
    """
    if config.get("quant_method") != METHOD:
        raise FormatError(
            f"{source}: quant_method is {config.get('quant_method')!r:.80}; this reader knows {METHOD!r}."
        )
    modules = [name.removesuffix(".qweight") for name in headers or () if name.endswith(".qweight")]
    refuse_changes(config, source)
    refuse_left_out(config, modules, source)
    layout = _read_packing(config, source)
    if config.get("desc_act"):
        raise FormatError(f"{source}: desc_act is true in a file of AutoRound's, which holds no order of groups.")
    if config.get("data_type", "int") != "int":
        raise FormatError(f"{source}: data_type is {config['data_type']!r:.80}; only 'int' is read.")
    default = read_spec(config, {}, source)
    overrides, rules = read_extra(config, modules, headers or {}, source)
    binding = read_binding(config, source=source)
    if binding is None:
        return StoredGrids(layout, default, overrides, None, None, rules)
    if binding.layout != layout.name:
        raise FormatError(
            f"{source}: cloq.layout is {binding.layout!r:.80} but packing_format is that of {layout.name!r}."
        )
    return StoredGrids(
        layout,
        default,
        overrides,
        binding.modules,
        binding.base_fingerprint,
        rules,
        needs_adapter=binding.needs_adapter,
    )


def _read_packing(config: Mapping[str, Any], source: str) -> AutoRoundLayout:
    """Return the layout that `packing_format` names."""
    packing = config.get("packing_format", DEFAULT_PACKING)
    if not isinstance(packing, str) or packing not in PACKINGS:
        raise FormatError(
            f"{source}: packing_format is {packing!r:.80}; of AutoRound's, this reader knows {', '.join(PACKINGS)}. "
            "Export it again with one of those."
        )
    layout = _LAYOUTS[PACKINGS[packing]]
    # A label of GPTQ beside it must mean the same zeros.
    meant = GptqLayout(layout.version).name
    if config.get("checkpoint_format", meant) != meant:
        raise FormatError(
            f"{source}: packing_format is {packing!r} but checkpoint_format is {config['checkpoint_format']!r:.80}; "
            "one of them is wrong: look at the file with `cloq inspect`, and mend the label."
        )
    return layout
