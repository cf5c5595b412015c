"""Which adapters lie in a folder, and to which base they belong."""

from __future__ import annotations

import os
from pathlib import Path

from cloq_export.artifact.checkpoint import ADAPTERS_NAME, Checkpoint
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.errors import BindingError, FormatError, RunDirectoryError
from cloq_export.formats.peft.codec import Adapter, is_adapter, read_adapter


def find_adapter(path: str | os.PathLike[str], adapter: str | os.PathLike[str]) -> Path:
    """Return the folder of an adapter.

    Args:
        path: a run directory or a checkpoint folder.
        adapter: the name of an adapter in it, or an adapter folder.

    Raises:
        RunDirectoryError: the run has no adapter of that name.
        FormatError: there is no adapter.
    """
    inside = Path(path) / ADAPTERS_NAME / os.fspath(adapter)
    if isinstance(adapter, str) and Path(adapter).name == adapter and is_adapter(inside):
        return inside
    if RunDirectory.is_run(path):
        run = RunDirectory.open(path)
        if isinstance(adapter, str) and adapter in run.adapters():
            return run.adapter_path(adapter)
        if not Path(adapter).is_dir():
            names = ", ".join(run.adapters()) or "none"
            raise RunDirectoryError(
                f"{path} has no adapter {os.fspath(adapter)!r}; it has {names}. Give one of these, or an adapter "
                "folder."
            )
    folder = Path(adapter)
    if not is_adapter(folder):
        raise FormatError(
            f"{folder} is no adapter folder; give the folder that holds adapter_config.json, or give the run "
            "directory as the path to name one of its adapters."
        )
    return folder


def read_bound_adapter(folder: Path, checkpoint: Checkpoint, *, force: bool) -> Adapter:
    """Return the adapter of a folder, refusing one that belongs to another base.

    Args:
        folder: the adapter folder.
        checkpoint: the base that it is to be served on.
        force: take it whatever it is bound to.

    Raises:
        BindingError: it is bound to another base, or to none.
        FormatError: a file is missing or damaged.
    """
    read = read_adapter(folder)
    if force:
        return read
    base = checkpoint.fingerprint
    if read.base_fingerprint is None:
        raise BindingError(
            f"{folder} does not say which quantized base it belongs to; {checkpoint.folder} is {base}. Only if it was "
            "trained on this base, load it with force=True."
        )
    if read.base_fingerprint != base:
        raise BindingError(
            f"{folder} is bound to the base {read.base_fingerprint}, but {checkpoint.folder} is {base}; an adapter is "
            "wrong on any other quantization. Make one for this base with `cloq adapt`, or load it with force=True."
        )
    return read
