"""Adapters on their way into an export: bound to its base, split and padded as asked, written and read back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cloq_export.artifact.adapters import AdapterShelf, forced_note, read_bound_adapter
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.checkpoint_writer import LayerSource
from cloq_export.artifact.empty_model import tied_head
from cloq_export.artifact.provenance import ADAPTER_KEY, LARGEST_PRODUCT_ERROR, AdapterRecord
from cloq_export.compress.session import Session
from cloq_export.errors import FormatError
from cloq_export.formats.peft import read_adapter, write_adapter
from cloq_export.formats.peft.pairs import balanced, padded, product_difference, uniform
from cloq_export.formats.peft.stacked import ExpertStack
from cloq_export.formats.targets.preflight import Decision
from cloq_export.formats.targets.table import read_table
from cloq_export.types import LoraPair
from cloq_export.verbs.options import ExportOptions
from cloq_export.verbs.recording import read_adapter_record

# How far B of a stacked pair may be from what was given, by its dtype: it is rounded once where scalings differ.
_ROUNDED = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-20, torch.float64: 2**-20}
# What an earlier export noted about an adapter and a later one repeats: that it was taken by force stays on record.
_KEPT = ("forced", "bound_to", "split", "padded_to", "uniform", LARGEST_PRODUCT_ERROR)


@dataclasses.dataclass(frozen=True)
class PreparedAdapter:
    """An adapter as it goes into an export.

    Args:
        name: of the folder that it gets.
        pairs: module -> pair, split and padded as asked.
        record: what was done to it, for the side file and the certificate.
        provenance: what it was when it was made; None if nothing recorded that.
    """

    name: str
    pairs: Mapping[str, LoraPair]
    record: Mapping[str, Any]
    provenance: AdapterRecord | None

    @property
    def extra(self) -> dict[str, Any]:
        """Return what its side file says besides the base."""
        return {**self.record, **({ADAPTER_KEY: self.provenance.to_json()} if self.provenance else {})}

    def to_json(self) -> dict[str, Any]:
        """Return its name and what was done to it."""
        return {"name": self.name, **self.record}


def prepare_adapter(session: Session, folder: Path, checkpoint: Checkpoint, options: ExportOptions) -> PreparedAdapter:
    """Return the adapter of a folder, bound to this base or taken by force, split and padded as asked.

    Args:
        session: of the call; what was forced is noted in it.
        folder: of the adapter.
        checkpoint: the base.
        options: split, pad_rank and force.

    Raises:
        BindingError: the adapter belongs to another base, and it is not forced.
    """
    read = read_bound_adapter(folder, checkpoint, force=options.force)
    record: dict[str, Any] = {key: value for key, value in read.extra.items() if key in _KEPT}
    forced = forced_note(folder.name, read.base_fingerprint, checkpoint)
    if forced is not None:
        record |= {"forced": True, "bound_to": read.base_fingerprint}
        session.notes.append(forced)
    pairs = dict(read.pairs)
    if options.split == "balanced":
        even = {module: balanced(pair) for module, pair in pairs.items()}
        lost = max(product_difference(even[module], pairs[module]) for module in pairs)
        record |= {"split": "balanced", LARGEST_PRODUCT_ERROR: lost + read.extra.get(LARGEST_PRODUCT_ERROR, 0.0)}
        pairs = even
    if options.pad_rank is not None:
        record["padded_to"] = options.pad_rank
        pairs = {module: padded(pair, options.pad_rank) for module, pair in pairs.items()}
    ranks = sorted({pair.rank for pair in pairs.values()})
    record |= {"rank": ranks[0] if len(ranks) == 1 else ranks, "modules": len(pairs)}
    provenance = read_adapter_record(session, folder.name, read.extra, folder)
    return PreparedAdapter(folder.name, pairs, record, provenance)


def prepare_adapters(
    session: Session, source: Path, names: Sequence[str], checkpoint: Checkpoint, options: ExportOptions
) -> tuple[PreparedAdapter, ...]:
    """Return the adapters of an export, see `prepare_adapter`.

    Args:
        session: of the call.
        source: where names are looked up.
        names: of adapters, or their folders.
        checkpoint: the base.
        options: split, pad_rank and force.

    Raises:
        BindingError: an adapter belongs to another base, and it is not forced.
    """
    shelf = AdapterShelf.of(source)
    return tuple(prepare_adapter(session, shelf.find(name), checkpoint, options) for name in names)


def refuse_strange_modules(adapters: Sequence[PreparedAdapter], layers: LayerSource, checkpoint: Checkpoint) -> None:
    """Refuse pairs for modules that the checkpoint lacks: forced or not, no reader could place them.

    Raises:
        FormatError: an adapter adapts a module that is not there, or has another shape.
    """
    for adapter in adapters:
        for module, pair in adapter.pairs.items():
            weight = f"{module}.weight"
            shape: tuple[int, ...] | None = layers.shapes.get(module)
            if shape is None and weight in checkpoint.headers:
                shape = checkpoint.headers[weight][1]
            if shape is None and (source := tied_head(checkpoint).get(weight)) is not None:
                shape = checkpoint.headers[source][1]
            fits = (pair.lora_B.shape[0], pair.lora_A.shape[1])
            if shape is None or tuple(shape) != fits:
                seen = "does not hold" if shape is None else f"holds as {tuple(shape)}, not as {fits}"
                raise FormatError(
                    f"the adapter {adapter.name} adapts {module}, which {checkpoint.folder} {seen}; it belongs to "
                    "another model, or its keys were renamed."
                )


def fit_target(
    session: Session, adapter: PreparedAdapter, decision: Decision, options: ExportOptions
) -> PreparedAdapter:
    """Return an adapter in a form that the target serves correctly: some engines read a single rank and alpha."""
    mixed = len({(pair.rank, pair.alpha) for pair in adapter.pairs.values()}) > 1
    if not mixed or read_table().engines[decision.target.name].adapters.patterns:
        return adapter
    made = uniform(adapter.pairs)
    session.notes.append(
        f"{options.target} reads one rank and one alpha for an adapter, so {adapter.name} was brought to rank "
        f"{made.rank} by zeros" + (f"; B of {len(made.inexact)} modules was rounded" if made.inexact else "")
    )
    record = {**adapter.record, "rank": made.rank, "uniform": True}
    if made.inexact:
        lost = max(made.inexact.values())
        record[LARGEST_PRODUCT_ERROR] = lost + record.get(LARGEST_PRODUCT_ERROR, 0.0)
    return dataclasses.replace(adapter, pairs=made.pairs, record=record)


def place_adapter(
    folder: Path,
    adapter: PreparedAdapter,
    base_model: str,
    base_fingerprint: str,
    stacks: Sequence[ExpertStack] = (),
) -> None:
    """Write one adapter as PEFT reads it, and compare what is read back.

    Args:
        folder: to write.
        adapter: what to write.
        base_model: name or path of the float model.
        base_fingerprint: of the base that it belongs to.
        stacks: tensors of experts whose pairs are written as one each.

    Raises:
        FormatError: what is read back differs, or pairs of experts cannot be one.
    """
    write_adapter(
        folder,
        adapter.pairs,
        base_model=base_model,
        base_fingerprint=base_fingerprint,
        extra=adapter.extra,
        stacks=stacks,
    )
    read = read_adapter(folder).pairs
    stacked = {name for stack in stacks for expert in range(stack.experts) for name in stack.linears(expert)}
    for module, pair in adapter.pairs.items():
        # Stacked, a pair may have got zeros, or a B that is scaled as the others of its tensor are.
        same = module in read and (
            product_difference(read[module], pair) <= _ROUNDED[pair.lora_B.dtype]
            if module in stacked
            else _same(read[module], pair)
        )
        if not same:
            raise FormatError(f"{folder}: {module} was read back with other numbers than were written; check the disk.")


def _same(pair: LoraPair, other: LoraPair) -> bool:
    return (
        pair.alpha == other.alpha and torch.equal(pair.lora_A, other.lora_A) and torch.equal(pair.lora_B, other.lora_B)
    )


def place_onnx_adapter(folder: Path, adapter: PreparedAdapter, base_model: str, base_fingerprint: str) -> None:
    """Write one adapter as ONNX Runtime loads it, and compare what is read back.

    Raises:
        FormatError: what is read back differs.
    """
    from cloq_export.formats.onnx.adapter import read_onnx_adapter, same_pairs, write_onnx_adapter

    write_onnx_adapter(
        folder, adapter.pairs, base_model=base_model, base_fingerprint=base_fingerprint, extra=adapter.extra
    )
    if not same_pairs(read_onnx_adapter(folder).pairs, adapter.pairs):
        raise FormatError(f"{folder} was read back with other numbers than were written; check the disk.")


def asked_adapters(session: Session, shelf: AdapterShelf, options: ExportOptions) -> Sequence[str]:
    """Return the adapters that are asked for, or all that lie there, noting what was left out."""
    if options.adapters:
        return options.adapters
    session.notes.extend(shelf.notes)
    return shelf.names
