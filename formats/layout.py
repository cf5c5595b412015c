"""What every integer layout offers, so that writing, reading and inspecting a checkpoint know no layout by name."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch

from cloq_export.errors import FormatError
from cloq_export.formats.patterns import NamePattern
from cloq_export.types import QuantizedLayer, QuantSpec

BINDING_VERSION = 1

# Tensor name -> (dtype code of safetensors, shape), as a file's header gives them.
Headers = Mapping[str, tuple[str, tuple[int, ...]]]
Role = Literal["codes", "scales", "zeros", "index"]


class Layout(abc.ABC):
    """One way to put the canonical integer form of a layer into tensors.

    A layer's tensors are its parts: `<module>.<part>` in a file, `<part>` here.
    """

    name: str
    """As `cloq export --format` and the metadata name it."""

    quant_method: str
    """`quantization_config.quant_method` of a checkpoint in this layout."""

    roles: Mapping[str, Role]
    """Part -> what it holds, of every part that a layer may have."""

    least_zero: int = 0
    """The smallest zero that it holds."""

    symmetric_only: bool = False
    """Whether it is written for symmetric layers alone."""

    holds_embeddings: bool = False
    """Whether its readers know what codes of embeddings are."""

    @abc.abstractmethod
    def parts(self, spec: QuantSpec) -> tuple[str, ...]:
        """Return the parts that a layer with this grid must have."""

    @abc.abstractmethod
    def check_packable(self, out_features: int, in_features: int, spec: QuantSpec, *, name: str = "layer") -> None:
        """Refuse a shape or a grid that the layout cannot hold.

        Raises:
            ShapeError: it cannot; the message says what would fit.
        """

    @abc.abstractmethod
    def headers(self, out_features: int, in_features: int, spec: QuantSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return part -> (dtype code of safetensors, shape) of a layer that fits the layout."""

    @abc.abstractmethod
    def features(
        self,
        headers: Headers,
        spec: QuantSpec,
        *,
        name: str = "layer",
        read: Callable[[str], torch.Tensor] | None = None,
    ) -> tuple[int, int]:
        """Return (out, in) of a layer from the headers of its parts.

        Args:
            headers: part -> header.
            spec: the grid.
            name: the layer, for messages.
            read: gives a part, where headers alone leave the width open because words are padded; without it the
                largest possible width is returned.

        Raises:
            FormatError: no layer with this grid has such headers.
        """

    def stored_grid(self, headers: Headers) -> tuple[int, int, int, int] | None:
        """Return (bits, groups, out, in) that the shapes of a layer's parts show by themselves, where they do.

        Args:
            headers: part -> header.
        """
        return None

    @abc.abstractmethod
    def pack_layer(self, layer: QuantizedLayer, *, name: str = "layer") -> dict[str, torch.Tensor]:
        """Return the parts of a layer, contiguous, on its device.

        Raises:
            ShapeError: the layout cannot hold the shape.
            FormatError: the layout cannot hold the values.
        """

    @abc.abstractmethod
    def unpack_layer(
        self, tensors: Mapping[str, torch.Tensor], spec: QuantSpec, *, name: str = "layer"
    ) -> QuantizedLayer:
        """Return the layer that parts hold, trusting nothing about them.

        Raises:
            FormatError: a part is missing, has another dtype or shape, or holds what the layout does not allow.
        """

    @abc.abstractmethod
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
        """Return the `quantization_config` of config.json.

        Args:
            specs: quantized module -> its grid, at least one.
            base_fingerprint: of the quantized base.
            skipped: linear modules of the same kind that stay float.
            producer: "name:version" of the program that writes.
            needs_adapter: the codes were made for what their adapter leaves of the weights.
            embeddings: quantized modules that are embeddings; none unless `holds_embeddings`.

        Raises:
            FormatError: there is no module, or the layout cannot say this.
        """


@dataclasses.dataclass(frozen=True)
class Binding:
    """The `cloq` object of a `quantization_config` of ours: what ties a checkpoint to its run and its adapters.

    Args:
        layout: name of the layout.
        modules: the quantized modules, sorted.
        base_fingerprint: of the quantized base.
        needs_adapter: the codes were made for what their adapter leaves of the weights; alone they say nothing.
    """

    layout: str
    modules: tuple[str, ...]
    base_fingerprint: str
    needs_adapter: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the object as a config holds it; that codes need their adapter stands there only where they do."""
        return {
            "format_version": BINDING_VERSION,
            "layout": self.layout,
            "base_fingerprint": self.base_fingerprint,
            "modules": list(self.modules),
            **({"needs_adapter": True} if self.needs_adapter else {}),
        }


def read_binding(config: Mapping[str, Any], *, source: str) -> Binding | None:
    """Read the `cloq` object of a `quantization_config`.

    Args:
        config: the `quantization_config`.
        source: the file, for messages.

    Returns:
        The binding, or None in other people's files.

    Raises:
        FormatError: it is of another format version, or damaged.
    """
    ours = config.get("cloq")
    if ours is None:
        return None
    if not isinstance(ours, Mapping) or ours.get("format_version") != BINDING_VERSION:
        seen = ours.get("format_version") if isinstance(ours, Mapping) else ours
        raise FormatError(
            f"{source}: format version {seen!r:.80} of cloq is unknown; this program reads {BINDING_VERSION}. Update "
            "cloq_export."
        )
    layout, modules, fingerprint = ours.get("layout"), ours.get("modules"), ours.get("base_fingerprint")
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise FormatError(f"{source}: cloq.modules is not a list of names; the config is damaged.")
    if not isinstance(fingerprint, str):
        raise FormatError(f"{source}: cloq.base_fingerprint is {fingerprint!r:.80}; the config is damaged.")
    if not isinstance(layout, str):
        raise FormatError(f"{source}: cloq.layout is {layout!r:.80}; the config is damaged.")
    needs_adapter = ours.get("needs_adapter", False)
    if not isinstance(needs_adapter, bool):
        raise FormatError(f"{source}: cloq.needs_adapter is {needs_adapter!r:.80}; the config is damaged.")
    return Binding(layout, tuple(sorted(modules)), fingerprint, needs_adapter)


@dataclasses.dataclass(frozen=True)
class StoredGrids:
    """What a checkpoint's `quantization_config` says, in any layout.

    Args:
        layout: how its layers are stored.
        default: the grid of every module that is not named.
        overrides: exact module name -> its own grid, or None for a module that stays float.
        modules: the quantized modules, sorted; None if the config does not list them, as in other people's files.
        base_fingerprint: of the quantized base; None if the config does not carry one.
        rules: (pattern, grid or None for float) in their order; the first that matches a module without an override
            counts.
        needs_adapter: as in Binding.
    """

    layout: Layout
    default: QuantSpec
    overrides: Mapping[str, QuantSpec | None]
    modules: tuple[str, ...] | None
    base_fingerprint: str | None
    rules: tuple[tuple[NamePattern, QuantSpec | None], ...] = ()
    needs_adapter: bool = False

    def spec_for(self, module: str) -> QuantSpec | None:
        """Return the grid of a module, or None if it stays float."""
        if module in self.overrides:
            return self.overrides[module]
        for pattern, spec in self.rules:
            if pattern.matches(module):
                return spec
        return self.default if self._listed is None or module in self._listed else None

    @functools.cached_property
    def _listed(self) -> frozenset[str] | None:
        # A mixture has tens of thousands of modules, and each is asked for.
        return None if self.modules is None else frozenset(self.modules)

    def with_modules(self, modules: Iterable[str]) -> StoredGrids:
        """Return the same for modules that are known now, each with its grid under its exact name."""
        known = tuple(sorted(modules))
        own = {module: self.spec_for(module) for module in known}
        overrides = {module: spec for module, spec in own.items() if spec != self.default}
        return dataclasses.replace(self, overrides={**self.overrides, **overrides}, modules=known, rules=())
