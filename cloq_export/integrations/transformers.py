"""Our quantizer in transformers' registry: `from_pretrained` fills models as `cloq_export.load` does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, auto, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cloq_export.artifact.checkpoint import Checkpoint, report_labels
from cloq_export.engines.transformers.loading import fill_packed, report_slow_layers
from cloq_export.errors import UnsupportedModelError, UsageError
from cloq_export.formats.registry import LAYOUTS
from cloq_export.models.experts import split_experts
from cloq_export.models.library_calls import NO_CODE
from cloq_export.models.model_class import model_class

METHOD = "cloq"
"""The name of the quantizer in transformers' registry."""

_claims_foreign = False


def register(*, foreign: bool = False) -> None:
    """Enter the quantizer, and let it claim our checkpoints, whose `quant_method` is that of their layout.

    Args:
        foreign: claim the checkpoints of other tools in these layouts too.
    """
    global _claims_foreign
    _claims_foreign = foreign
    if METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    register_quantization_config(METHOD)(CloqConfig)
    register_quantizer(METHOD)(CloqQuantizer)
    # The registry refuses a name that is taken, so the class that reads the entry is replaced by one that looks first.
    for method in {layout.quant_method for layout in LAYOUTS.values()}:
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = _claiming(auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method])


def _claiming(stock: type[QuantizationConfigMixin]) -> type[QuantizationConfigMixin]:
    class Claiming(stock):  # type: ignore[valid-type, misc]
        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            chosen = CloqConfig if _claims_foreign or METHOD in config_dict else stock
            return chosen.from_dict(config_dict, *args, **kwargs)

    return Claiming


class CloqConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint that is loaded packed, kept as its file has it.

    Args:
        description: its entries.
    """

    def __init__(self, **description: Any) -> None:
        self.quant_method = METHOD
        self.description: Mapping[str, Any] = description

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of the file, the `quant_method` of its layout among them."""
        return dict(self.description)


class CloqQuantizer(HfQuantizer):
    """Leaves a model empty while transformers loads, and then fills it as `cloq_export.load` does.

    Transformers would hold the packed words a second time, and give what is missing random numbers.
    """

    requires_calibration = True
    checkpoint: Checkpoint
    device: torch.device

    def update_device_map(self, device_map: Any) -> dict[str, Any]:
        """Return the one device that the model is put on.

        Raises:
            UsageError: the map names several devices.
        """
        if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            device_map = {"": accelerator or "cpu"}
        elif not isinstance(device_map, dict):
            device_map = {"": "cpu" if device_map is None else device_map}
        devices = {str(device): device for device in device_map.values()}
        if len(devices) != 1 or "disk" in devices:
            raise UsageError(
                f"device_map spreads the model over {', '.join(devices) or 'no device'}; a packed model is put on one "
                "device: give device_map='cuda' or another one."
            )
        self.device = torch.device(next(iter(devices.values())))
        return {"": self.device}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files")
        if not files:
            raise UsageError(
                "from_pretrained was given no folder; a packed model is filled from one: give the folder of the export."
            )
        with torch.device("cpu"):  # transformers makes what is new without memory meanwhile
            self.checkpoint = Checkpoint.open(Path(files[0]).parent)
        folder = self.checkpoint.folder
        whole = model_class(str(folder), AutoConfig.from_pretrained(folder, **NO_CODE))
        if not isinstance(model, whole):
            raise UnsupportedModelError(
                f"{folder} holds a {whole.__name__}, which {type(model).__name__} would open in part; open it with "
                f"transformers.{whole.__name__}.from_pretrained, or with cloq_export.load."
            )
        # Transformers looks for a place for each tensor of the files among these, and reads none that has no place.
        model.state_dict = lambda *_, **__: {}
        self._ignored, model._keys_to_ignore_on_load_unexpected = model._keys_to_ignore_on_load_unexpected, {""}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        del model.state_dict
        model._keys_to_ignore_on_load_unexpected = self._ignored
        report_labels(self.checkpoint)
        split_experts(model)
        fill_packed(model, self.checkpoint)
        model.to(self.device).eval()
        report_slow_layers(model)

    def is_serializable(self) -> bool:
        """Return that the packed model is not written again; its folder is there, and adapters are saved alone."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Return that adapters can be trained over the model."""
        return True
