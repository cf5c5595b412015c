"""A model on disk, measured from its files: perplexity next to that of the float model, and answers to tasks."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cloq_export.artifact.adapters import AdapterShelf, forced_note, read_bound_adapter
from cloq_export.artifact.artifact import Artifact
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.needed_adapter import WHY
from cloq_export.artifact.probe_record import ProbeRecord
from cloq_export.compress.session import Session
from cloq_export.engines.transformers.loading import load
from cloq_export.engines.transformers.served import float_model
from cloq_export.errors import UsageError
from cloq_export.formats.peft import WEIGHTS_NAME, read_adapter
from cloq_export.kernels.gpu import cuda
from cloq_export.models.lending import lent, model_bytes
from cloq_export.models.source import LoadedModel, open_model
from cloq_export.models.tokenizer_files import read_tokenizer
from cloq_export.models.weights_on_disk import weights_on_disk
from cloq_export.parity.perplexity import PerplexityTable, TextWindows
from cloq_export.parity.perplexity import compare_perplexities as measure
from cloq_export.texts.tokens import TextTokens
from cloq_export.verbs.answering import Subject
from cloq_export.verbs.recording import CODES_ALONE, probe_model

_HOST = torch.device("cpu")
# Logits, their float32 copies and activations while perplexity is measured, in bytes.
_BESIDE_WEIGHTS = 2 * 10**9


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """What lies in a folder, and the adapter that it is measured with.

    Args:
        path: a run directory, an export or a checkpoint folder.
        adapter: name or folder; None measures the codes alone.
        force: take an adapter of another base.
        device: where perplexity is measured, as far as the models fit there.
    """

    path: Path
    adapter: str | None = None
    force: bool = False
    device: torch.device = _HOST

    @functools.cached_property
    def is_merged(self) -> bool:
        """Return whether these are plain weights with the adapter in them."""
        return Artifact.open(self.path).kind == "merged export"

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        """Return the codes and what is not quantized.

        Raises:
            FormatError: there is no checkpoint, or it is damaged.
        """
        return Checkpoint.open(self.path)

    @functools.cached_property
    def adapter_folder(self) -> Path | None:
        """Return the folder of the adapter.

        Raises:
            RunDirectoryError, FormatError: there is none of this name.
        """
        return None if self.adapter is None else AdapterShelf.of(self.path).find(self.adapter)

    def check(self) -> None:
        """Refuse what is not there or does not fit, which is cheap, before anything is measured.

        Raises:
            UsageError: a merged export takes no adapter.
            BindingError: the adapter belongs to another base.
            FormatError: there is no checkpoint, or it is damaged.
        """
        if self.is_merged:
            if self.adapter is not None:
                raise UsageError(f"{self.path} is a merged export and takes no adapter; leave `adapter` out.")
            return
        checkpoint = self.checkpoint
        if self.adapter_folder is not None:
            read_bound_adapter(self.adapter_folder, checkpoint, force=self.force)

    @property
    def notes(self) -> list[str]:
        """Return what is to be known of what is measured here."""
        if self.is_merged or not self.checkpoint.needs_adapter:
            return []
        return [f"the figures of the codes without their adapter say nothing of this model: {WHY}"]

    def tokenizer(self) -> Any:
        """Return the tokenizer that lies beside the weights."""
        return read_tokenizer(Artifact.open(self.path).checkpoint_folder)

    def packed_model(self, session: Session) -> Any:
        """Return the packed model with its adapter, noting an adapter that was taken by force."""
        if self.adapter is not None and self.adapter_folder is not None and self.force:
            bound_to = read_adapter(self.adapter_folder).base_fingerprint
            note = forced_note(self.adapter, bound_to, self.checkpoint)
            session.notes += [note] if note else []
        return load(self.path, self.adapter, dtype=torch.float32, force=self.force)

    def merged_model(self) -> LoadedModel:
        """Return the model of a merged export."""
        return open_model(str(self.path), dtype=torch.float32, untie=True)


def choose_adapter(session: Session, path: Path, own: str) -> str | None:
    """Return the adapter to measure: the recipe's own if it is there, else the only one.

    Args:
        session: folders that hold no adapter are noted in it.
        path: a run directory, an export or a checkpoint folder.
        own: the name that the recipe gives.
    """
    shelf = AdapterShelf.of(path)
    session.notes.extend(shelf.notes)
    if own in shelf.folders:
        return own
    return shelf.names[0] if len(shelf.folders) == 1 else None


def measure_perplexity(
    session: Session,
    stored: StoredModel,
    on: TextWindows,
    loaded: LoadedModel | None,
    probes: dict[str, ProbeRecord] | None = None,
) -> PerplexityTable:
    """Return the perplexity of the float model, of the codes alone and of codes with adapter, on the same windows.

    It is measured from the files on disk, so that what is reported is what was written.

    Args:
        session: where progress and notes go.
        stored: what is measured.
        on: the text.
        loaded: the float model; None measures none.
        probes: filled with what the model says, by name of the adapter.
    """
    merged = stored.is_merged
    model = stored.merged_model().model if merged else stored.packed_model(session)
    model = model.to(_fitting(session, model, stored.device, "the quantized model"))
    tokenizer = loaded.tokenizer if loaded is not None else stored.tokenizer()

    def models() -> Iterator[tuple[str, nn.Module]]:
        if loaded is not None:
            with lent(loaded.model, _fitting(session, loaded.model, stored.device, "the float model")):
                yield "float", loaded.model
        if merged:
            yield "merged", model
            return
        for name, shown in _as_stored(model, stored.adapter):
            if probes is not None:
                probes[name] = probe_model(shown, tokenizer)
            yield "quantized" if name == CODES_ALONE else "adapter", shown

    begin_tokens = tuple(TextTokens(tokenizer).window_begin(on.bos))
    return measure(models(), on.tokens(tokenizer), on, begin_tokens=begin_tokens, console=session.console)


def probe_stored(session: Session, stored: StoredModel, tokenizer: Any, probes: dict[str, ProbeRecord]) -> None:
    """Note what the model on disk says of the fixed probes, without its adapter and with it.

    Args:
        session: where progress and notes go.
        stored: what is asked; its weights are packed codes.
        tokenizer: of the model.
        probes: filled, by name of the adapter.
    """
    model = stored.packed_model(session)
    model = model.to(_fitting(session, model, stored.device, "the quantized model"))
    for name, _ in _as_stored(model, stored.adapter):
        probes[name] = probe_model(model, tokenizer)


def _as_stored(model: Any, adapter: str | None) -> Iterator[tuple[str, nn.Module]]:
    """Yield a packed model with its adapter switched off, then on, by name of the adapter."""
    if adapter is not None:
        model.disable_adapters()
    yield CODES_ALONE, model
    if adapter is not None:
        model.enable_adapters()
        yield adapter, model


def _fitting(session: Session, model: nn.Module, device: torch.device, what: str) -> torch.device:
    """Return the device, or the CPU if a model does not fit there or its weights are on disk, and note that."""
    if device.type == "cpu":
        return _HOST
    if weights_on_disk(model) is not None:
        session.notes.append(f"{what} is measured on the CPU: its weights are on disk")
        return _HOST
    needed, free = model_bytes(model) + _BESIDE_WEIGHTS, cuda().free_bytes(device)
    if needed <= free:
        return device
    session.notes.append(
        f"{what} is measured on the CPU: it takes {needed / 10**9:.1f} GB, and {free / 10**9:.1f} GB of {device} are "
        "free"
    )
    return _HOST


def subjects_of(session: Session, stored: StoredModel, loaded: LoadedModel | None) -> Iterator[Subject]:
    """Yield what answers: the float model, and what is on disk, without and with the adapter.

    Args:
        session: where notes go.
        stored: what is on disk.
        loaded: the float model, or None.
    """
    if loaded is not None:
        yield Subject("float", float_model(loaded.model), None, loaded.source.fingerprint)
    if stored.is_merged:
        merged = stored.merged_model()
        yield Subject("merged", float_model(merged.model), None, merged.source.fingerprint)
        return
    base = stored.checkpoint.fingerprint
    model = stored.packed_model(session)
    if stored.adapter_folder is None:
        yield Subject("quantized", float_model(model), None, base)
        return
    model.disable_adapters()
    yield Subject("quantized", float_model(model), None, base)
    model.enable_adapters()
    # Its tensors too: an adapter that was trained on keeps its name.
    weights = stored.adapter_folder / WEIGHTS_NAME
    yield Subject("adapter", float_model(model), None, f"{base}+{hashlib.sha256(weights.read_bytes()).hexdigest()}")
