"""What lies in a folder, asked in one place: a run, a checkpoint, an export or an adapter."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cloq_export.artifact.adapters import AdapterShelf
from cloq_export.artifact.checkpoint import Checkpoint, checkpoint_folder
from cloq_export.artifact.checkpoint_writer import FloatPart, LayerSource
from cloq_export.artifact.empty_model import float_part
from cloq_export.artifact.merged import is_merged
from cloq_export.artifact.quantization_description import CONFIG_NAME
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.formats.onnx.packages import require_packages
from cloq_export.formats.onnx.record import ADAPTER_NAME as ONNX_ADAPTER_NAME
from cloq_export.formats.onnx.record import is_onnx_export
from cloq_export.formats.peft.codec import is_adapter

if TYPE_CHECKING:
    from cloq_export.formats.onnx.reading import OnnxExport

Kind = Literal["run", "checkpoint", "merged export", "onnx export", "adapter", "onnx adapter", "unknown"]


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A folder and what it holds, by the files that mark it; nothing else is read before it is asked for.

    Args:
        path: the folder.
        kind: "checkpoint" is one of ours or of another tool, whether it can be read or not, an export among them;
            "unknown" is a folder of something else, or none.
    """

    path: Path
    kind: Kind

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Artifact:
        """Return what lies in a folder."""
        return cls(Path(path), _kind_of(Path(path)))

    @functools.cached_property
    def run(self) -> RunDirectory | None:
        """The run that the folder is, None if it is none.

        Raises:
            RunDirectoryError, FormatError: its run.json cannot be read.
        """
        return RunDirectory.open(self.path) if self.kind == "run" else None

    @property
    def checkpoint_folder(self) -> Path:
        """Return the folder that holds config.json: the folder itself, or that of the run's checkpoint.

        Raises:
            FormatError: there is none.
        """
        return checkpoint_folder(self.path)

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        """The quantized checkpoint, of a run its own.

        Raises:
            FormatError: there is none, or it is damaged.
        """
        return Checkpoint.open(self.path)

    @functools.cached_property
    def base(self) -> Checkpoint | OnnxExport:
        """The quantized base that adapters are bound to: the graph of an ONNX export, else the checkpoint.

        Raises:
            FormatError: there is none, or it is damaged.
            MissingPackageError: it is an ONNX export, and the packages that read it are not installed.
        """
        if self.kind != "onnx export":
            return self.checkpoint
        require_packages()
        from cloq_export.formats.onnx.reading import OnnxExport

        return OnnxExport.open(self.path)

    @property
    def layers(self) -> LayerSource:
        """Return the quantized layers: those that a run keeps, else those that are packed.

        Raises:
            FormatError: there are none, or they are damaged.
        """
        if self.run is not None:
            return LayerSource.of_run(self.run)
        base = self.base
        if isinstance(base, Checkpoint):
            return LayerSource.of_checkpoint(base)
        return LayerSource(base.specs, base.shapes, base.read_layer, base.needs_adapter)

    @property
    def floats(self) -> FloatPart:
        """Return everything besides the quantized layers of a checkpoint.

        Raises:
            FormatError: there is no checkpoint, or its config describes no model.
        """
        return float_part(self.checkpoint)

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of the quantized base, computed only where nothing carries it.

        Raises:
            FormatError: there is no base, or it is damaged.
        """
        return self.base.fingerprint if self.run is None else self.run.base_fingerprint()

    @functools.cached_property
    def adapters(self) -> AdapterShelf:
        """The adapters that lie in the folder.

        Raises:
            RunDirectoryError: they cannot be read.
        """
        return AdapterShelf.of(self.path)


def _kind_of(folder: Path) -> Kind:
    if RunDirectory.is_run(folder):
        return "run"
    if is_adapter(folder):
        return "adapter"
    if is_merged(folder):
        return "merged export"
    if is_onnx_export(folder):
        return "onnx export"
    if (folder / ONNX_ADAPTER_NAME).is_file():
        return "onnx adapter"
    return "checkpoint" if (folder / CONFIG_NAME).is_file() else "unknown"
