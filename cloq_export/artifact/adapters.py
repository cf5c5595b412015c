"""The adapter shelf: which adapters lie in a folder, and whether one is bound to a base."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from cloq_export.artifact.run_manifest import MANIFEST_NAME
from cloq_export.errors import BindingError, FormatError, RunDirectoryError
from cloq_export.files.atomic import is_partial
from cloq_export.formats.onnx.record import ADAPTER_NAME as ONNX_ADAPTER_NAME
from cloq_export.formats.onnx.record import is_onnx_export
from cloq_export.formats.peft.codec import CONFIG_NAME, WEIGHTS_NAME, Adapter, is_adapter, read_adapter

ADAPTERS_NAME = "adapters"

# Beside A and B, what an engine or a tokenizer reads from an adapter's folder, or a tool from a folder of weights.
_READ_BY_ENGINES = re.compile(
    r"chat_template.*|additional_chat_templates|tokenizer.*|special_tokens_map\.json|added_tokens\.json|tekken\.json"
    r"|vocab\..*|merges\.txt|new_embeddings.*|.*\.safetensors|.*\.gguf|adapter_model\..*|pytorch_model.*|model\..*",
    re.IGNORECASE,
)


class QuantizedBase(Protocol):
    """What an adapter is bound to: a checkpoint or an ONNX export."""

    @property
    def folder(self) -> Path: ...

    @property
    def fingerprint(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class AdapterShelf:
    """The adapters that lie in a run, a checkpoint or an export.

    A folder on the shelf that holds no adapter is left out everywhere, and `notes` say so.

    Args:
        home: the run directory, or the folder of the checkpoint or export.
        folders: name -> folder of an adapter, sorted by name.
        notes: one sentence for each folder that was left out.
    """

    home: Path
    folders: Mapping[str, Path]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, home: str | os.PathLike[str]) -> AdapterShelf:
        """Return the shelf of a folder, empty if it has none.

        Raises:
            RunDirectoryError: the shelf cannot be read.
        """
        home = Path(home)
        place = home / ADAPTERS_NAME
        wanted = (CONFIG_NAME, ONNX_ADAPTER_NAME) if is_onnx_export(home) else (CONFIG_NAME,)
        folders: dict[str, Path] = {}
        notes: list[str] = []
        try:
            entries = sorted(place.iterdir()) if place.is_dir() else []
        except OSError as error:
            raise RunDirectoryError(
                f"{place} cannot be read: {error.strerror or error}; check its permissions."
            ) from error
        for entry in entries:
            if not entry.is_dir() or is_partial(entry.name):
                continue
            if any((entry / name).is_file() for name in wanted):
                folders[entry.name] = entry
            else:
                notes.append(
                    f"{entry} holds no {' and no '.join(wanted)}, so it is no adapter and was left out; remove it, or "
                    "complete it"
                )
        return cls(home, folders, tuple(notes))

    @property
    def names(self) -> list[str]:
        """Return the names of the adapters, sorted."""
        return list(self.folders)

    def find(self, adapter: str | os.PathLike[str]) -> Path:
        """Return the folder of an adapter.

        Args:
            adapter: the name of an adapter on the shelf, or an adapter folder.

        Raises:
            RunDirectoryError: the run has no adapter of that name.
            FormatError: there is no adapter.
        """
        if isinstance(adapter, str) and adapter in self.folders:
            return self.folders[adapter]
        # A folder on the shelf that was left out is named in full.
        left_out = self.home / ADAPTERS_NAME / adapter
        named = isinstance(adapter, str) and Path(adapter).name == adapter
        folder = left_out if named and left_out.is_dir() else Path(adapter)
        onnx = is_onnx_export(self.home)
        if is_adapter(folder) or (onnx and (folder / ONNX_ADAPTER_NAME).is_file()):
            return folder
        if (self.home / MANIFEST_NAME).is_file() and not folder.is_dir():
            raise RunDirectoryError(
                f"{self.home} has no adapter {os.fspath(adapter)!r}; it has {', '.join(self.folders) or 'none'}. Give "
                "one of these, or an adapter folder."
            )
        if onnx:
            raise FormatError(
                f"{adapter} is no adapter in {self.home} and no adapter folder; give a name in its {ADAPTERS_NAME}/, "
                f"or the folder that holds {ONNX_ADAPTER_NAME} or {CONFIG_NAME}."
            )
        raise FormatError(
            f"{folder} is no adapter folder; give the folder that holds {CONFIG_NAME}, or give the run directory as "
            "the path to name one of its adapters."
        )


def read_bound_adapter(folder: Path, base: QuantizedBase, *, force: bool, trust_unbound: bool = False) -> Adapter:
    """Return the adapter of a folder, PEFT's or of ONNX Runtime, refusing one that belongs to another base.

    Args:
        folder: the adapter folder.
        base: that it is to be served on.
        force: take it even if it is bound to another base.
        trust_unbound: take it if it is bound to none.

    Raises:
        BindingError: it is bound to another base, or to none.
        FormatError: a file is missing or damaged.
    """
    if (folder / ONNX_ADAPTER_NAME).is_file():
        # Needs onnxruntime, which only exports to ONNX ask for.
        from cloq_export.formats.onnx.adapter import read_onnx_adapter

        adapter = read_onnx_adapter(folder)
    else:
        adapter = read_adapter(folder)
    if not force and not (trust_unbound and adapter.base_fingerprint is None):
        refuse_other_base(folder, adapter.base_fingerprint, base)
    return adapter


def is_bound(bound_to: str | None, base: QuantizedBase) -> bool:
    """Return whether an adapter that carries a base fingerprint, or None, was made for a base."""
    return bound_to == base.fingerprint


def refuse_other_base(folder: Path, bound_to: str | None, base: QuantizedBase) -> None:
    """Refuse an adapter unless it is bound to a base.

    Args:
        folder: of the adapter, for messages.
        bound_to: the base fingerprint that the adapter carries, or None.
        base: that it is to be served on.

    Raises:
        BindingError: it is bound to another base, or to none.
    """
    if is_bound(bound_to, base):
        return
    if bound_to is None:
        raise BindingError(
            f"{folder} does not say which quantized base it belongs to; {base.folder} is {base.fingerprint}. Only if "
            "it was trained on this base, take it with `force`."
        )
    raise BindingError(
        f"{folder} is bound to the base {bound_to}, but {base.folder} is {base.fingerprint}; an adapter is wrong on "
        "any other quantization. Make one for this base with `cloq adapt`, or take this one with `force`."
    )


def forced_note(name: str, bound_to: str | None, base: QuantizedBase) -> str | None:
    """Return what is to be said of an adapter that was taken by force, None if it belongs to the base."""
    if is_bound(bound_to, base):
        return None
    return f"the adapter {name} is bound to {bound_to or 'no base'}, not to {base.fingerprint}; it was taken by force"


def unbound_note(name: str, base: QuantizedBase) -> str:
    """Return what is to be said of an adapter that names no base and was trusted."""
    return (
        f"the adapter {name} does not say which quantized base it belongs to and was trusted; it is right only if it "
        f"was trained on {base.folder}"
    )


def carried_beside(folder: Path) -> list[str]:
    """Return what engines or tokenizers may read in an adapter's folder besides the adapter, sorted."""
    own = {CONFIG_NAME, WEIGHTS_NAME, ONNX_ADAPTER_NAME}
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.name not in own and _READ_BY_ENGINES.fullmatch(entry.name) is not None
    )


def carried_note(name: str, folder: Path) -> str | None:
    """Return what is to be said of an adapter's folder that holds more than an adapter, None if it does not."""
    beside = carried_beside(folder)
    if not beside:
        return None
    listed = ", ".join(f"{entry!a:.80}" for entry in beside[:4]) + (" and more" if len(beside) > 4 else "")
    return (
        f"the folder of the adapter {name}, {folder}, holds more than an adapter: {listed}. A and B alone are read "
        "here, and an engine may read these too: remove them if the adapter was not trained with them"
    )
