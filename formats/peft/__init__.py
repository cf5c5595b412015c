"""LoRA adapters in PEFT's layout, bound to their quantized base; see SPEC.md."""

from cloq_export.formats.peft.codec import Adapter, is_adapter, read_adapter, write_adapter

__all__ = ["Adapter", "is_adapter", "read_adapter", "write_adapter"]
