"""Adapters on any base that transformers or this package reads: the reference, and PEFT's own way to serve them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from cloq_export.artifact.adapters import read_bound_adapter
from cloq_export.artifact.artifact import Artifact
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.quantization_description import CONFIG_NAME
from cloq_export.engines.transformers.loading import attach_adapter
from cloq_export.engines.transformers.reference import ReferenceModel, reference_model
from cloq_export.engines.transformers.served import TransformersModel, over_one_base, packed_model
from cloq_export.files.safe_json import read_json
from cloq_export.formats.peft.codec import Adapter, read_adapter
from cloq_export.models.source import find_source, open_model


class AnyBase:
    """A base with adapters that are not bound to it: a float model, or a quantized checkpoint of any tool.

    Args:
        name: folder of a quantized checkpoint or a run, or folder or hub id of a float model.
        folders: name -> folder of each adapter.

    Raises:
        FormatError: a quantized checkpoint or an adapter is damaged, or in a layout that is not read.
        BindingError: an adapter says that it belongs to another base.
        SourceError: there is no model.
    """

    def __init__(self, name: str, folders: Mapping[str, Path]) -> None:
        self.folders = dict(folders)
        self.checkpoint = Checkpoint.open(name) if _is_quantized(Path(name)) else None
        self.folder = find_source(name).folder if self.checkpoint is None else self.checkpoint.folder
        self.adapters: dict[str, Adapter] = {
            each: read_adapter(folder)
            if self.checkpoint is None
            else read_bound_adapter(folder, self.checkpoint, force=False, trust_unbound=True)
            for each, folder in folders.items()
        }

    def reference(self) -> ReferenceModel:
        """Return the float32 model with every pair put into its place by name."""
        if self.checkpoint is not None:
            return reference_model(self.folder, self.folders, force=True)

        def load(adapter: str | None) -> nn.Module:
            model = self.float_model(torch.float32)
            if adapter is not None:
                attach_adapter(model, self.folders[adapter], self.adapters[adapter], trainable=False)
            return model.eval()

        return ReferenceModel(over_one_base(load))

    def served(self, dtype: torch.dtype) -> TransformersModel:
        """Return what transformers serves: this package's packed runtime, or a float model with PEFT's own loader."""
        if self.checkpoint is not None:
            return packed_model(self.folder, self.folders, dtype=dtype, force=True)
        import peft

        def load(adapter: str | None) -> nn.Module:
            model = self.float_model(dtype)
            return model if adapter is None else peft.PeftModel.from_pretrained(model, self.folders[adapter]).eval()

        return TransformersModel(load)

    def float_model(self, dtype: torch.dtype) -> nn.Module:
        """Return the float model, in evaluation mode."""
        model: nn.Module = open_model(str(self.folder), dtype=dtype).model
        return model


def _is_quantized(folder: Path) -> bool:
    config = folder / CONFIG_NAME
    return Artifact.open(folder).kind == "run" or (config.is_file() and "quantization_config" in read_json(config))
