"""What an inspection finds: one frozen dataclass for each kind of artefact, printed as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from cloq_export.artifact.certificate import RepeatedCertificate
from cloq_export.artifact.detective import Examination
from cloq_export.artifact.stored_sizes import StoredSizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """What is known of every kind of artefact.

    Args:
        path: the folder.
        ours: whether this package wrote it.
        checked_adapter: an adapter that was checked against it, or None.
    """

    kind: ClassVar[str]

    path: str
    ours: bool = True
    checked_adapter: AdapterInspection | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the inspection as a JSON object."""
        facts = {"kind": self.kind, "path": self.path, "ours": self.ours, **self._facts()}
        return facts | _given(checked_adapter=self.checked_adapter and self.checked_adapter.to_json())

    def _facts(self) -> dict[str, Any]:
        """Return what only this kind has, in the order of its fields; one that has its default is left out."""
        facts = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in _OF_EVERY_KIND and (field.default is dataclasses.MISSING or value != field.default):
                facts[field.name] = _plain(value)
        return facts


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterInspection(Inspection):
    """A LoRA adapter in PEFT's layout.

    Args:
        name: on its shelf; None for a folder by itself.
        base_model: as the adapter names it.
        base_fingerprint: of the base that it is bound to, or None.
        modules: their number.
        ranks: as text, most common first.
        dtype: of A and B.
        parameters: their number.
        adapter_bytes: what they take.
        bits_per_weight_with_adapter: of the base that it lies on, or None.
        bound_to_this_base: None where there is no base to ask.
        forced: whether it was taken although it is not; None if that was not asked for.
        certificate: as repeated, or None.
    """

    kind = "adapter"

    name: str | None = None
    base_model: str | None
    base_fingerprint: str | None
    modules: int
    ranks: str
    dtype: str
    parameters: int
    adapter_bytes: int
    bits_per_weight_with_adapter: float | None = None
    bound_to_this_base: bool | None = None
    forced: bool | None = None
    certificate: RepeatedCertificate | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the inspection as a JSON object."""
        return _given(name=self.name) | super().to_json()


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridCount:
    """How many modules have one grid."""

    bits: int
    group_size: int
    symmetric: bool
    modules: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointInspection(Inspection):
    """A quantized checkpoint that is read.

    Args:
        architecture: as the config names it.
        layout: name of the layout.
        main: the grid that the config gives for all modules, and their number.
        grids: of the modules, the most common first.
        base_fingerprint: that the config carries, or the computed one.
        files: that hold tensors.
        companions: other files of the model.
        sizes: without adapters.
        notes: where the content decided against the label, and folders of adapters that were left out.
        verified: whether every tensor was read.
        certificate: as repeated, or why there is none; None where nothing was verified.
        adapters: that lie in the folder; None where it has no place for them.
        examination: of a checkpoint of another tool.
    """

    kind = "checkpoint"

    architecture: str | None
    layout: str
    main: GridCount
    grids: tuple[GridCount, ...]
    base_fingerprint: str | None
    files: tuple[str, ...]
    companions: tuple[str, ...]
    sizes: StoredSizes
    notes: tuple[str, ...] = ()
    verified: bool = False
    certificate: RepeatedCertificate | str | None = None
    adapters: tuple[AdapterInspection, ...] | None = None
    examination: Examination | None = None

    def _facts(self) -> dict[str, Any]:
        sizes = dataclasses.asdict(self.sizes)
        repeated = self.certificate
        return {
            "architecture": self.architecture,
            "layout": self.layout,
            "bits": self.main.bits,
            "group_size": self.main.group_size,
            "symmetric": self.main.symmetric,
            "quantized_modules": self.main.modules,
            "base_fingerprint": self.base_fingerprint,
            "files": list(self.files),
            "companions": list(self.companions),
            **{key: value for key, value in sizes.items() if key not in _SIZES_WITH_ADAPTER},
            **_given(
                grids=[dataclasses.asdict(grid) for grid in self.grids] if len(self.grids) > 1 else None,
                notes=list(self.notes) or None,
                verified=self.verified or None,
                certificate=repeated.to_json() if isinstance(repeated, RepeatedCertificate) else repeated,
                adapters=None if self.adapters is None else [adapter.to_json() for adapter in self.adapters],
                examination=self.examination and self.examination.to_json(),
            ),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnreadInspection(Inspection):
    """A quantized checkpoint that is not read: what was found out about it."""

    kind = "checkpoint"

    examination: Examination


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunInspection(Inspection):
    """A run directory.

    Args:
        state: how far it is.
        model: that it quantizes.
        source_fingerprint: of the model's files.
        finished_layers: their number.
        damaged_layers: what is wrong with each.
        reports: names of its reports.
        adapters: that lie in it.
        checkpoint: its own, or None.
        recipe: every option.
        versions: of the software that started it.
        notes: folders of adapters that were left out.
    """

    kind = "run"

    state: str
    model: str | None
    source_fingerprint: str
    finished_layers: int
    damaged_layers: tuple[str, ...]
    reports: tuple[str, ...]
    adapters: tuple[AdapterInspection, ...]
    checkpoint: CheckpointInspection | None
    recipe: Mapping[str, Any]
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergedInspection(Inspection):
    """An export with its adapter merged in.

    Args:
        record: content of its record.
        certificate: as repeated; None where nothing was verified.
    """

    kind = "merged export"

    record: Mapping[str, Any]
    certificate: RepeatedCertificate | None = None

    def _facts(self) -> dict[str, Any]:
        modules = len(self.record.get("modules") or [])
        return {**self.record, "modules": modules, **_verified(self.certificate)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnnxGridCount:
    """How many modules of a graph have one grid and lie in one way."""

    bits: int
    group_size: int
    symmetric: bool
    container_bits: int
    block_size: int
    accuracy_level: int
    modules: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnnxInspection(Inspection):
    """An export for ONNX Runtime.

    Args:
        style: how the linears compute.
        two_bit: how 2-bit codes are stored.
        opset: of the standard operators.
        exporter: what made the float graph.
        base_fingerprint: of the quantized base.
        quantized_modules: their number.
        notes: what was done to the grids, and folders of adapters that were left out.
        graph_bytes: of the graph and its data.
        grids: of its modules.
        adapters: their names; None where it has no place for them.
        certificate: as repeated; None where nothing was verified.
    """

    kind = "onnx export"

    style: str
    two_bit: str
    opset: int
    exporter: str
    base_fingerprint: str
    quantized_modules: int
    notes: tuple[str, ...]
    graph_bytes: int
    grids: tuple[OnnxGridCount, ...]
    adapters: tuple[str, ...] | None = None
    certificate: RepeatedCertificate | None = None

    def _facts(self) -> dict[str, Any]:
        return super()._facts() | _verified(self.certificate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnnxAdapterInspection(Inspection):
    """An adapter for ONNX Runtime; the facts are those of `AdapterInspection`."""

    kind = "onnx adapter"

    base_model: str | None
    base_fingerprint: str | None
    modules: int
    ranks: str
    parameters: int
    adapter_bytes: int
    certificate: RepeatedCertificate | None = None


_OF_EVERY_KIND = ("path", "ours", "checked_adapter", "name")
_SIZES_WITH_ADAPTER = ("adapter_bytes", "bits_per_weight_with_adapter")


def _plain(value: Any) -> Any:
    """Return a fact as JSON holds it."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _given(**values: Any) -> dict[str, Any]:
    """Return the values that there are."""
    return {name: value for name, value in values.items() if value is not None}


def _verified(certificate: RepeatedCertificate | None) -> dict[str, Any]:
    return {} if certificate is None else {"certificate": certificate.to_json(), "verified": True}
