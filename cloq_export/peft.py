"""What people who start from PEFT need: CLoQ's weights for the LoRA layers that PEFT has put over a packed model."""

from __future__ import annotations

from cloq_export.integrations.cloq_weights import replace_lora_weights_cloq

__all__ = ["replace_lora_weights_cloq"]
